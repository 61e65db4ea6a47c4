"""Labelled images, two folders and some minutes in; the best recipe by evidence, and its submission, out.

    python choose.py --minutes 40 --train_dir data/train --query_dir data/test/query \\
        --gallery_dir data/test/gallery --server_url http://HOST:3001/retrieval/ --group_name "Team AAA"

From the first minute on, the output folder holds a valid submission: stop it whenever you like.
Edit the settings below, or give them as flags, in the environment or in .env (there in capitals).
"""

from retrieval.console import run_script  # first: it checks the packages, and lets Ctrl-C end the imports

# isort: split
import json
from pathlib import Path
from typing import ClassVar

from retrieval.choosing.recipes import Source
from retrieval.choosing.settings import ChoosingSettings, Models
from retrieval.settings import Folder, GroupName, NewFolder, PositiveAmount, ServerUrl
from supcon.settings import OF_TRAINING


class Settings(ChoosingSettings):
    """Choose networks and means by evidence on labelled images, and submit the ranking."""

    train_dir: Folder = Path("data/train")  # labelled: a folder per class
    query_dir: Folder = Path("data/test/query")
    gallery_dir: Folder = Path("data/test/gallery")
    minutes: PositiveAmount = 40
    models: Models = ["efficientnet_lite0", "dlib", "facenet", "clip:base", "clip"]  # noqa: RUF012
    server_url: ServerUrl = ""  # such as "http://10.0.0.7:3001/retrieval/", or "local"; empty: only save
    group_name: GroupName = "my-team"
    output_dir: NewFolder = Path("results")

    refused: ClassVar = OF_TRAINING | dict.fromkeys(("model", "model_type"), "here it is --models")


def main(settings: Settings) -> None:
    from get_images import find_images
    from retrieval.choosing.rehearsal import tell_rehearsal
    from retrieval.choosing.search import begin_search
    from retrieval.run import Run

    with Run(settings) as run, begin_search(run) as search:  # from here on a valid submission is on the disk
        if settings.send_first:
            search.send_first(settings)
        search.try_networks()
        if settings.fine_tune:
            search.try_tuned(tune)
        search.try_fusions()
        search.try_views()
        if settings.rehearse:
            tell_rehearsal(search, find_images(settings.train_dir))
    if not settings.rehearse:
        run_best(settings, search.arguments(settings))


def tune(source: Source, train_dir: Path, save_dir: Path, minutes: float, device: str) -> Path:
    """Fine-tune a network as fine_tuning.py does; return its checkpoint."""
    import fine_tuning
    from retrieval.forms import read_form

    given = {"model": source.model, "crop": source.crop, "minutes": f"{minutes:.2f}"}
    given |= {"train_dir": train_dir, "save_dir": save_dir, "device": device}
    arguments = [f"--{name}={value}" for name, value in given.items()]
    fine_tuning.main(read_form(fine_tuning.Settings, [*arguments, "--overwrite"]))
    return save_dir / "fine_tuned_model.pth"


def run_best(settings: Settings, arguments: list[str]) -> None:
    """Run the best recipe as its script would: save, send and show. The vectors come from the cache."""
    import model_fine_tuned
    import model_not_tuned
    from retrieval.forms import read_form

    recipe = json.loads((settings.output_dir / "recipe.json").read_bytes())
    script = model_fine_tuned if "weights" in recipe["settings"] else model_not_tuned
    script.main(read_form(script.Settings, arguments))


if __name__ == "__main__":
    run_script(main, Settings)
