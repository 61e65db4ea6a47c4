"""A run and its backbone in; the steps from two folders to a score, which the scripts share, out.

Each ends with a line that says what was done and how long it took.
"""

from __future__ import annotations

import logging
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from get_images import ImageFile, find_query_and_gallery
from retrieval.backbones.backbone import LazyBackbone
from retrieval.distributed import end_with_the_others, is_first, several, take_a_share
from retrieval.embedding.cache import Cache
from retrieval.embedding.embed import embed
from retrieval.embedding.runtime import choose_runtime
from retrieval.embedding.shards import are_left, embed_together, remove_shards, settle_together
from retrieval.machine import cores
from retrieval.metrics import measure, require_labels
from retrieval.ranking.approximate import check_search, rank_by
from retrieval.records import Embeddings, Ranking
from retrieval.report.results import Results
from retrieval.report.run_report import write_report
from retrieval.run import SUBMISSION, Outcome, Run, stop_if_failed
from retrieval.server.answer_key import key_of_folders
from retrieval.server.serve import local_server
from retrieval.settings import LOCAL
from retrieval.submission.client import NOT_SENT, send_submission
from retrieval.submission.protocol import NAMES_PER_QUERY
from retrieval.submission.submission_file import write_submission
from retrieval.tracking import check_tracker, track_run

log = logging.getLogger("retrieval.pipeline")


class Images(NamedTuple):
    """The two folders."""

    queries: list[ImageFile]
    gallery: list[ImageFile]


class Vectors(NamedTuple):
    """Their embeddings."""

    queries: Embeddings
    gallery: Embeddings


def find(run: Run) -> Images:
    """The images of both folders. Raises InputError if they, or the output folder, cannot serve."""
    settings = run.settings
    end_with_the_others()
    check_tracker(settings.tracker)
    check_search(settings.search)
    images = Images(*find_query_and_gallery(settings.query_dir, settings.gallery_dir))
    if settings.custom_dataset:
        require_labels(*images)
    elif settings.server_url == LOCAL:
        require_labels(*images, "--server_url local", "the URL of a server")
    if is_first():
        run.check_output_dir(*images)
    run.done("find", f"found {len(images.queries)} query and {len(images.gallery)} gallery images")
    return images


def embed_both(run: Run, images: Images, backbone: LazyBackbone) -> Vectors:
    """The unit vectors of both. Of several processes the first gets them, and the others end here.

    What a run of several has left in this output folder is gone on from, also by one. Raises as embed and
    embed_together, and InputError where ONNX Runtime is asked for and cannot be had.
    """
    settings = run.settings
    count = len(images.queries) + len(images.gallery)
    cache = None if settings.no_cache else Cache(settings.cache_dir, settings.verify_cache)
    runtime = choose_runtime(backbone, settings.engine, count, settings.batch_size, settings.cache_dir)
    sides = {"gallery images": images.gallery, "queries": images.queries}
    together = several() or any(are_left(run, files, runtime, kind) for kind, files in sides.items())
    if together:
        take_a_share()
        settle_together(runtime, images.queries)

    def _vectors_of(kind: str) -> Embeddings:
        if together:
            return embed_together(run, sides[kind], runtime, kind, cache)
        return embed(sides[kind], runtime, kind, settings.save_crops, cache)

    # First the larger part: processes that look for faces have the more to do while the network loads.
    gallery, queries = _vectors_of("gallery images"), _vectors_of("queries")
    if not is_first():
        raise SystemExit(0)
    run.inside = runtime.seconds | {"cores": cores()}
    dimension = queries.vectors.shape[1]
    run.done(
        "embed",
        f"embedded {count} images as {dimension}-d unit vectors ({runtime.description}, {backbone.device})",
    )
    return Vectors(queries, gallery)


def rank_both(run: Run, vectors: Vectors, backbone: LazyBackbone) -> Ranking:
    """Rank the gallery for each query on the backbone's device, as many images as are looked at."""
    keep = max(run.settings.top_k, NAMES_PER_QUERY)
    ranking, run.search = rank_by(run.settings.search, *vectors, keep, backbone.device)
    queries, gallery = len(ranking.queries), len(ranking.gallery)
    run.done("rank", f"ranked {gallery} gallery images for each of {queries} queries")
    return ranking


def save(run: Run, images: Images, vectors: Vectors, ranking: Ranking, backbone: LazyBackbone) -> Results:
    """Write submission.json and all else but the outcome; what was found, with its figures."""
    metrics = {"backbone": backbone.model_name, "tuned": backbone.trained is not None}
    metrics |= {"names": run.write_names(vectors.queries.names, vectors.gallery.names)}
    metrics |= measure(ranking, *vectors, run.settings.top_k) | run.search
    path = write_submission(ranking, run.settings.group_name, run.folder)
    run.write_metrics(metrics)
    run.write_without_face(*vectors)
    remove_shards(run)
    run.done("save", f"saved {path}, and metrics.json beside it,")
    return Results(*images, *vectors, ranking, metrics, backbone.trained)


def send(run: Run, found: Results) -> Outcome:
    """Send what was saved, unless nothing is to be sent; say what became of it, and keep that."""
    settings = run.settings
    path, token = run.folder / SUBMISSION, settings.group_token.get_secret_value()
    if settings.custom_dataset:
        outcome = NOT_SENT
    elif settings.server_url == LOCAL:
        with TemporaryDirectory() as folder:
            key = key_of_folders(found.queries, found.gallery)
            with local_server(key, Path(folder) / "competition.sqlite") as url:
                outcome = send_submission(path, url, token)
    else:
        outcome = send_submission(path, settings.server_url, token)
    run.done("send")
    hits = {"first": found.first} if found.labelled else {}
    run.conclude(found.metrics, outcome, **hits)
    return outcome


def show(run: Run, found: Results, outcome: Outcome) -> None:
    """Draw the page and its pictures, unless they are not wanted, tell a tracker, and end as the run went."""
    if not run.settings.no_report and outcome.word != "interrupted":
        try:
            run.done("report", f"drew {write_report(run, found, outcome)}")
            run.write_metrics(found.metrics)
        except OSError as error:  # a disk that is full now costs the pictures only
            log.warning("the page could not be drawn: %s", error)
    log.info("%s", run.where_the_seconds_went())
    seconds = run.rounded_seconds()
    track_run(run.settings.tracker, run.folder, found.metrics["backbone"], run.settings,
              found.metrics | {"seconds": seconds})  # fmt: skip
    stop_if_failed(outcome)
