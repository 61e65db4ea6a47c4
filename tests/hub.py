"""The Hugging Face hub's cache, laid out without a network."""


def lay_in_hub(home, repository, **files):
    """A repository in huggingface_hub's cache; `files`: a name → the function that writes it."""
    folder = home / "hub" / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    for name, write in files.items():
        file = folder / "snapshots" / ("0" * 40) / name
        file.parent.mkdir(exist_ok=True)
        write(file)
