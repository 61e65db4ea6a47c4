"""The steps of a run, in the order in which they happen; read this first.

    find → embed_both → rank_both → save → send → show

Each step takes what it needs, returns what it made, and logs a line with the seconds it took. With --fuse
each of its networks embeds the images after the run's own, and they are ranked by all of them. If torchrun
started several processes, each embeds and ranks its shard of the gallery, and rank 0 does the rest.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np

from get_images import ImageFile, find_images, find_query_and_gallery
from retrieval.backbones.backbone import LazyBackbone
from retrieval.datasets.readable import warn_of_unreadable
from retrieval.distributed import claim_devices, gather, rank_zero_only, set_up, several
from retrieval.embedding.cache import Cache
from retrieval.embedding.embeddings_file import write_embeddings
from retrieval.embedding.runtime import choose_runtime
from retrieval.embedding.shards import embed_shard, gather_shards
from retrieval.errors import InputError
from retrieval.flag_values import shares_of
from retrieval.machine import cores
from retrieval.metrics import measure, require_labels
from retrieval.ranking.approximate import check_search, merge_shards, rank_by
from retrieval.ranking.collapse import in_words as why_collapsed
from retrieval.ranking.collapse import spread_of
from retrieval.ranking.copies import find_copies, without_copies
from retrieval.ranking.fusion import in_words, names_unreadable_by_all
from retrieval.ranking.means import check_fused, check_means, means_of, rank_fused, rank_with
from retrieval.ranking.projections import check_classes
from retrieval.records import Embeddings, Ranking, ShardedEmbeddings
from retrieval.report.results import Results, Sample, sample_rows
from retrieval.run import EMBEDDINGS, SUBMISSION, Outcome, Run, stop_if_failed
from retrieval.server.answer_key import key_of_folders
from retrieval.server.serve import local_server
from retrieval.settings import LOCAL, RetrievalSettings
from retrieval.submission.client import NOT_SENT, command_to_send, send_submission
from retrieval.submission.protocol import NAMES_PER_QUERY
from retrieval.submission.submission_file import write_submission
from retrieval.tracking import check_tracker, track_run

log = logging.getLogger("retrieval.pipeline")


class Images(NamedTuple):
    """The images of all folders."""

    queries: list[ImageFile]
    gallery: list[ImageFile]
    train: list[ImageFile]  # labelled, for a means that is fitted; empty without one


class Vectors(NamedTuple):
    """The embeddings of all folders."""

    queries: Embeddings  # all of them, in every process
    gallery: ShardedEmbeddings  # a shard in each process
    train: Embeddings | None  # None if no means is fitted
    sample: Sample | None = None  # on rank 0, for the report's map
    others: Sequence[Vectors] = ()  # by the other networks of --fuse


def find(run: Run) -> Images:
    """Find the images of both folders. Raises InputError if the folders or a setting cannot be used."""
    settings = run.settings
    set_up()
    check_tracker(settings.tracker)
    check_search(settings.search)
    if settings.save_embeddings and several():
        raise InputError("--save_embeddings needs all vectors in one process: first run without it, and then "
                         "without torchrun, which takes the vectors from the cache")  # fmt: skip
    means = means_of(settings)
    check_means(means, settings.search, settings.train_dir is not None)
    if settings.fuse:
        check_fused(means, settings.search, settings.save_embeddings)
    queries, gallery = find_query_and_gallery(settings.query_dir, settings.gallery_dir)
    warn_of_unreadable(queries)
    train = find_images(settings.train_dir) if means.learns else []
    if train:
        check_classes([image.name for image in train])
    if settings.custom_dataset or settings.server_url == LOCAL:
        require_labels(queries, gallery)
    run.check_output_dir(queries, gallery)
    images = Images(queries, gallery, train)
    run.done("find", f"found {len(images.queries)} query and {len(images.gallery)} gallery images")
    return images


def embed_both(
    run: Run, images: Images, backbone: LazyBackbone, others: Sequence[LazyBackbone] = ()
) -> Vectors:
    """Embed the queries and the gallery, or take their vectors from the cache; so does each of the others.

    --save_crops and the report's map show what the run's own backbone sees. Raises as embed_shard, and
    InputError if ONNX Runtime is asked for and cannot be used.
    """
    run.done("backbone")
    settings = run.settings
    cache = None if settings.no_cache else Cache(settings.cache_dir, settings.verify_cache)
    own = _embed(run, images, backbone, settings.save_crops, cache)
    vectors = [_embed(run, images, other, None, cache) for other in others]
    sample = None if settings.no_report else _sample(own.queries, own.gallery)
    run.done("embed")
    return own._replace(sample=sample, others=vectors)


def _embed(
    run: Run, images: Images, backbone: LazyBackbone, crops: Path | None, cache: Cache | None
) -> Vectors:
    """Embed all images by one backbone, and log it; write its crops into a folder, if one is given."""
    settings = run.settings
    count = sum(map(len, images))
    claim_devices()
    runtime = choose_runtime(backbone, settings.engine, count, settings.batch_size, settings.cache_dir)
    if several():  # all choose one runtime, also a process whose shard is cached
        runtime.settle(images.gallery)
    # The larger part first: face detectors run in their own processes while the network loads.
    gallery = embed_shard(images.gallery, runtime, "gallery images", crops, cache)
    queries = gather_shards(embed_shard(images.queries, runtime, "queries", crops, cache))
    train = None
    if images.train:
        train = embed_shard(images.train, runtime, "training images", crops, cache).own
    dimension = queries.vectors.shape[1]
    run.done(
        "embed",
        f"embedded {count} images as {dimension}-d unit vectors ({runtime.description}, {backbone.device})",
    )
    spent = ", ".join(f"{part} {seconds:.1f}" for part, seconds in runtime.seconds.items())
    log.info("seconds inside embedding: %s; the readers took %.1f on %d cores",
             spent, runtime.readers_seconds, cores())  # fmt: skip
    return Vectors(queries, gallery, train)


def _sample(queries: Embeddings, gallery: ShardedEmbeddings) -> Sample | None:
    """Gather on rank 0 the vectors that the report draws."""
    rows = sample_rows(queries, gallery)
    of_queries = rows[rows < len(queries.names)]
    own = rows[len(of_queries) :] - len(queries.names) - gallery.start
    own = own[(own >= 0) & (own < len(gallery.own.names))]
    shards = gather(gallery.own.vectors[own])
    return shards and Sample(rows, np.concatenate([queries.vectors[of_queries], *shards]))


def rank_both(
    run: Run,
    images: Images,
    vectors: Vectors,
    backbone: LazyBackbone,
    others: Sequence[LazyBackbone] = (),
) -> tuple[Ranking, dict[str, Any]] | None:
    """Rank the gallery for each query, on the backbone's device; return the ranking and the search's metrics.

    With means or other backbones the metrics say which. Other ranks than 0 get None.
    """
    wanted = max(run.settings.top_k, NAMES_PER_QUERY)
    copies = find_copies(images.queries, images.gallery) if run.settings.exclude_self else {}
    k = wanted + max(map(len, copies.values()), default=0)
    queries, gallery, train, *_ = vectors
    means = means_of(run.settings)
    applied = means.applied()
    if others:
        merged = _rank_fused(run, vectors, [backbone, *others], k)
    elif applied:  # one process has the whole gallery: see check_means
        merged = rank_with(means, queries, gallery.own, train, k, backbone.device), {"means": applied}
    else:
        own = rank_by(run.settings.search, queries, gallery.own, k, backbone.device)
        merged = merge_shards(*own, gallery, k)
    if copies and merged:  # on rank 0
        merged = without_copies(merged[0], copies, wanted), merged[1] | {"queries_with_copies": len(copies)}
    by = f" by {merged[1]['backbone']}" if others else ""
    by += f" with {', '.join(applied)}" if applied else ""
    by += f", without the copies of {len(copies)} queries" if copies else ""
    run.done(
        "rank", f"ranked {len(gallery.names)} gallery images for each of {len(queries.names)} queries{by}"
    )
    return merged


def _rank_fused(
    run: Run, vectors: Vectors, backbones: list[LazyBackbone], k: int
) -> tuple[Ranking, dict[str, Any]]:
    """Rank by the similarities of all backbones, the run's own first; return also what metrics.json says.

    An image is unreadable if none of them could read it.
    """
    means, weights = means_of(run.settings), shares_of(run.settings.fuse)
    members = [(each.queries, each.gallery.own, each.train) for each in (vectors, *vectors.others)]
    queries, gallery, _ = zip(*members, strict=True)
    names = [backbone.model_name for backbone in backbones]
    metrics = {
        "backbone": in_words(names, weights),
        "weights": dict(zip(names, weights, strict=True)),
        "unreadable_queries": names_unreadable_by_all(queries),
        "unreadable_gallery_images": names_unreadable_by_all(gallery),
    }
    metrics |= {"means": means.applied()} if means.applied() else {}
    return rank_fused(means, members, weights, k, backbones[0].device), metrics


@rank_zero_only
def save(
    run: Run,
    images: Images,
    vectors: Vectors,
    ranked: tuple[Ranking, dict[str, Any]],
    backbone: LazyBackbone,
) -> Results:
    """Write submission.json and everything that can be known before it is sent; return the results."""
    (ranking, search), (queries, gallery, _, sample, _) = ranked, vectors
    metrics = {"backbone": backbone.model_name, "tuned": backbone.trained is not None}
    metrics |= {"names": run.write_names(queries.names, gallery.names)}
    metrics |= {"cached_gallery_images": gallery.cached}
    metrics |= measure(ranking, queries, gallery, run.settings.top_k) | search
    metrics |= spread_of(ranking, queries)
    if metrics["collapsed"]:
        log.warning("%s", why_collapsed(metrics))
    path = write_submission(ranking, run.settings.group_name, run.folder)
    run.write_metrics(metrics)
    run.write_without_face(queries, gallery)
    if run.settings.save_embeddings:
        write_embeddings(run.folder / EMBEDDINGS, queries, gallery.own)
    run.done("save", f"saved {path}, and metrics.json beside it,")
    return Results(
        images.queries, images.gallery, queries, gallery, ranking, metrics, backbone.trained, sample
    )


@rank_zero_only
def send(run: Run, results: Results) -> Outcome:
    """Send the saved submission, unless nothing is to be sent; log and record its outcome."""
    settings = run.settings
    path, token = run.folder / SUBMISSION, settings.group_token.get_secret_value()
    if settings.custom_dataset:
        outcome = NOT_SENT
    elif settings.server_url and results.metrics["collapsed"] and not settings.send_anyway:
        why, again = why_collapsed(results.metrics), command_to_send(path)
        outcome = Outcome("failed", f"{path} is saved and not sent: {why}. To send it all the same, give "
                                    f"--send_anyway, or run\n    {again}")  # fmt: skip
    elif settings.server_url == LOCAL:
        with TemporaryDirectory() as folder:
            key = key_of_folders(results.queries, results.gallery)
            with local_server(key, Path(folder) / "competition.sqlite") as url:
                outcome = send_submission(path, url, token)
    else:
        default = RetrievalSettings.model_fields["group_name"].default
        if settings.server_url and settings.group_name == default:
            log.warning("the group name is the default, %s: set GROUP_NAME in .env, or give --group_name",
                        settings.group_name)  # fmt: skip
        outcome = send_submission(path, settings.server_url, token)
    run.done("send")
    hits = {"first": results.first} if results.labelled else {}
    run.conclude(results.metrics, outcome, **hits)
    return outcome


@rank_zero_only
def show(run: Run, results: Results, outcome: Outcome) -> None:
    """Draw the report, unless it is not wanted, tell the tracker, and end with the outcome's status."""
    metrics = results.metrics | outcome.metrics
    if not run.settings.no_report and outcome.word != "interrupted":
        log.info("drawing the report (--no_report leaves it out)")
        from retrieval.report.run_report import write_report  # imports matplotlib

        try:
            run.done("report", f"drew {write_report(run, results, outcome)}")
        except OSError as error:  # a disk that is full now costs the pictures only
            log.warning("the page could not be drawn (%s: %s): make room, give another --output_dir, or "
                        "leave it out by --no_report", error.filename, error.strerror)  # fmt: skip
    seconds = run.rounded_seconds()
    log.info("seconds: %s", ", ".join(f"{step} {spent:.1f}" for step, spent in seconds.items()))
    track_run(run.settings.tracker, run.folder, metrics["backbone"], run.settings,
              metrics | {"seconds": seconds})  # fmt: skip
    stop_if_failed(outcome)
