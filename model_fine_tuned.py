"""Two folders of images in; a ranking by a fine-tuned network, submission.json and a score out.

    python model_fine_tuned.py --weights checkpoints/fine_tuned_model.pth \\
        --query_dir data/test/query --gallery_dir data/test/gallery \\
        --server_url http://HOST:3001/retrieval/ --group_name "Team AAA"

Edit the settings below, or give them as flags, in the environment or in .env (there in capitals).
"""

from retrieval.console import run_script  # first: it checks the packages, and lets Ctrl-C end the imports

# isort: split
from pathlib import Path
from typing import ClassVar

from retrieval.settings import (
    CheckpointSettings,
    File,
    Folder,
    GroupName,
    MeansSettings,
    NewFolder,
    PositiveInt,
    RetrievalSettings,
    ServerUrl,
)
from supcon.settings import OF_TRAINING


class Settings(RetrievalSettings, CheckpointSettings, MeansSettings):
    """Rank a gallery for each query with a network of fine_tuning.py, and submit the ranking."""

    weights: File = Path("checkpoints/fine_tuned_model.pth")  # it knows its network and its transform
    query_dir: Folder = Path("data/test/query")
    gallery_dir: Folder = Path("data/test/gallery")
    top_k: PositiveInt = 10
    custom_dataset: bool = False  # True: score by the folder labels, and send nothing
    server_url: ServerUrl = ""  # such as "http://10.0.0.7:3001/retrieval/", or "local"; empty: only save
    group_name: GroupName = "my-team"
    output_dir: NewFolder = Path("results")

    refused: ClassVar = (
        OF_TRAINING
        | dict.fromkeys(
            ("model_type", "crop", "image_size", "detector", "face_margin", "min_face_size"),
            "the checkpoint of --weights knows it; it is a setting of model_not_tuned.py",
        )
        | {"model": "the checkpoint of --weights knows it"}
    )


def main(settings: Settings) -> None:
    from retrieval.backbones.fine_tuned import find_fine_tuned
    from retrieval.backbones.fused import find_fused
    from retrieval.backbones.views import with_views
    from retrieval.pipeline import embed_both, find, rank_both, save, send, show
    from retrieval.run import Run

    with Run(settings) as run:  # its clock, its files, its line in the ledger
        images = find(run)
        backbone = find_fine_tuned(settings.weights, settings.device)
        backbone = with_views(backbone, settings.flip, settings.views)
        others = find_fused(settings, backbone)  # of --fuse, if it is given
        vectors = embed_both(run, images, backbone, others)
        ranking = rank_both(run, images, vectors, backbone, others)
        results = save(run, images, vectors, ranking, backbone)  # all is on the disk before anything is sent
        outcome = send(run, results)
        show(run, results, outcome)


if __name__ == "__main__":
    run_script(main, Settings)
