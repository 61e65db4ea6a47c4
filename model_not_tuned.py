"""Two folders of images in; a ranking by a pretrained network, submission.json and a score out.

    python model_not_tuned.py --query_dir data/test/query --gallery_dir data/test/gallery \\
        --server_url http://HOST:3001/retrieval/ --group_name "Team AAA"

Edit the settings below, or give them as flags, in the environment or in .env (there in capitals).
"""

from pathlib import Path

from get_images import find_query_and_gallery
from retrieval.backbones import ModelType, load_backbone
from retrieval.embedding import embed
from retrieval.ledger import Run
from retrieval.metrics import measure, require_labels
from retrieval.ranking import rank
from retrieval.report import draw_matches
from retrieval.sending import NOT_SENT, send_submission
from retrieval.settings import (
    Crop,
    Device,
    File,
    Folder,
    Form,
    GroupName,
    NewFolder,
    PositiveInt,
    PositiveShare,
    ServerUrl,  # fmt: skip
    Share,
    run_script,
)
from retrieval.submission import NAMES_PER_QUERY, make_submission, save_submission


class Settings(Form):
    """Rank a gallery for each query with a pretrained network, and submit the ranking."""

    model_type: ModelType = "efficientnet_lite0"
    query_dir: Folder = Path("data/test/query")
    gallery_dir: Folder = Path("data/test/gallery")
    top_k: PositiveInt = 10
    custom_dataset: bool = False  # True: score by the folder labels, and send nothing
    server_url: ServerUrl = ""  # such as "http://10.0.0.7:3001/retrieval/"; empty: only save
    group_name: GroupName = "my-team"
    output_dir: NewFolder = Path("results")
    batch_size: PositiveInt = 32
    device: Device = "auto"  # or "cpu", "cuda", "mps"
    weights: File | None = None  # instead of the word's own
    crop: Crop = "auto"  # "face", "none", or what the word is for
    image_size: PositiveInt | None = None  # this and the next two: None is what the word was trained with
    face_margin: Share | None = None
    min_face_size: PositiveShare | None = None
    save_crops: NewFolder | None = None  # to look at


def main(settings: Settings) -> None:
    run = Run(settings)  # its clock, its files, its line in the ledger
    queries, gallery = find_query_and_gallery(settings.query_dir, settings.gallery_dir)
    if settings.custom_dataset:
        require_labels(queries, gallery)
    run.check_output_dir(queries, gallery)
    run.done("find", f"found {len(queries)} query and {len(gallery)} gallery images")

    backbone = load_backbone(settings.model_type, settings.device, settings.weights, settings.crop,
                             settings.image_size, settings.face_margin, settings.min_face_size)  # fmt: skip
    run.done("load", f"loaded {backbone.word} on {backbone.device}")

    query_embeddings = embed(queries, backbone, settings.batch_size, "queries", settings.save_crops)
    gallery_embeddings = embed(gallery, backbone, settings.batch_size, "gallery images", settings.save_crops)
    run.done("embed", f"embedded {len(queries) + len(gallery)} images as {backbone.dimension}-d unit vectors")

    ranking = rank(query_embeddings, gallery_embeddings, keep=max(settings.top_k, NAMES_PER_QUERY))
    run.done("rank", f"ranked {len(gallery)} gallery images for each of {len(ranking)} queries")

    # Everything is on the disk before anything is sent.
    metrics = measure(ranking, query_embeddings, gallery_embeddings, settings.top_k)
    submission = make_submission(ranking, queries, gallery, settings.group_name)
    path = save_submission(submission, settings.output_dir)
    run.write_metrics(metrics)
    run.write_without_face(query_embeddings, gallery_embeddings)
    draw_matches(ranking, queries, gallery, settings.top_k, settings.output_dir / "matches.png")
    run.done("save", f"saved {path}, and metrics.json and matches.png beside it,")

    outcome = NOT_SENT if settings.custom_dataset else send_submission(path, settings.server_url)
    run.done("send")
    run.finish(metrics, outcome)


if __name__ == "__main__":
    run_script(main, Settings)
