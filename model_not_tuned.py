"""Two folders of images in; a ranking by a pretrained network, submission.json and a score out.

    python model_not_tuned.py --query_dir data/test/query --gallery_dir data/test/gallery \\
        --server_url http://HOST:3001/retrieval/ --group_name "Team AAA"

Edit the settings below, or give them as flags, in the environment or in .env (there in capitals).
"""

from pathlib import Path

from retrieval.backbones.backbone import find_backbone
from retrieval.backbones.zoo import ModelType
from retrieval.console import run_script
from retrieval.pipeline import embed_both, find, rank_both, save, send, show
from retrieval.run import Run
from retrieval.settings import (
    CACHE_DIR,
    Crop,
    Device,
    EngineWord,
    File,
    Folder,
    Form,
    GroupName,
    GroupToken,
    NewFolder,
    PositiveInt,
    PositiveShare,
    Search,
    ServerUrl,
    Share,
    Side,
    Tracker,
)


class Settings(Form):
    """Rank a gallery for each query with a pretrained network, and submit the ranking."""

    model_type: ModelType = "efficientnet_lite0"
    query_dir: Folder = Path("data/test/query")
    gallery_dir: Folder = Path("data/test/gallery")
    top_k: PositiveInt = 10
    custom_dataset: bool = False  # True: score by the folder labels, and send nothing
    server_url: ServerUrl = ""  # such as "http://10.0.0.7:3001/retrieval/", or "local"; empty: only save
    group_name: GroupName = "my-team"
    group_token: GroupToken = GroupToken("")  # where the server asks for one; better in .env than here
    output_dir: NewFolder = Path("results")
    batch_size: PositiveInt = 32
    device: Device = "auto"  # or "cpu", "cuda", "mps"
    engine: EngineWord = "auto"  # or "torch", "onnx"
    weights: File | None = None  # instead of the word's own
    crop: Crop = "auto"  # "face", "none", or what the word is for
    image_size: Side | None = None  # this and the next two: None is what the word was trained with
    face_margin: Share | None = None
    min_face_size: PositiveShare | None = None
    save_crops: NewFolder | None = None  # to look at
    cache_dir: NewFolder = CACHE_DIR  # of embeddings, faces, exported networks
    no_cache: bool = False
    verify_cache: bool = False  # True: read images whose size and time are what they were, too
    no_report: bool = False  # True: no report.html, no pictures
    search: Search = "exact"  # or by FAISS "flat", "ivf", "hnsw"
    tracker: Tracker = "none"  # or "tensorboard", "wandb"


def main(settings: Settings) -> None:
    with Run(settings) as run:  # its clock, its files, its line in the ledger
        images = find(run)
        backbone = find_backbone(
            settings.model_type, settings.device, settings.weights, settings.crop,
            settings.image_size, settings.face_margin, settings.min_face_size)  # fmt: skip
        vectors = embed_both(run, images, backbone)
        ranking = rank_both(run, vectors, backbone)
        found = save(run, images, vectors, ranking, backbone)  # all is on the disk before anything is sent
        outcome = send(run, found)
        show(run, found, outcome)


if __name__ == "__main__":
    run_script(main, Settings)
