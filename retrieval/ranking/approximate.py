"""Embeddings of queries and gallery, and a choice of search, in; a ranking and the search's metrics out.

If several processes hold the gallery, each ranks its shard, and rank 0 merges the rankings.

`exact` is retrieval/ranking/exact.py. The others are indexes of FAISS (Douze et al., The Faiss library,
2024) for galleries beyond a million images: `flat` compares all vectors in float32, `ivf` searches the cells
nearest to the query, `hnsw` walks a graph.
"""

from __future__ import annotations

import logging
import time
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from retrieval.distributed import gather
from retrieval.errors import InputError
from retrieval.ranking.exact import check_finite, cosines_of, merge, rank
from retrieval.records import (
    UNREADABLE,
    Embeddings,
    Ranking,
    ShardedEmbeddings,
    chunks,
    rows_of_chunk,
    zero_rows,
)
from retrieval.settings import Search

if TYPE_CHECKING:
    import faiss

SAMPLE = 200  # queries that are also ranked exactly, to measure the recall
SEED = 0
TIE = 1e-6  # cosines that differ by less may be in either order in float32
TRAINING_IMAGES = 39  # for each cell: with fewer FAISS warns
PROBED = 16  # the search probes at least this many cells, and at least a sixteenth of all
NEIGHBOURS = 32  # edges of an image in the graph: the M of HNSW
BUILD_BREADTH, SEARCH_BREADTH = 200, 128  # candidates that a walk through the graph keeps, at least

log = logging.getLogger("retrieval.ranking")


def check_search(search: Search) -> None:
    """Raise InputError, which says what to do, if this search needs FAISS and FAISS is not installed."""
    if search != "exact" and find_spec("faiss") is None:
        raise InputError(
            f"--search {search} needs the package faiss: run `pip install faiss-cpu`, or use --search exact"
        )


def rank_by(
    search: Search, queries: Embeddings, gallery: Embeddings, k: int = 10, device: Any = "cpu"
) -> tuple[Ranking, dict[str, float]]:
    """Rank the k nearest gallery images of each query, exactly or by FAISS; also return the metrics.

    An exact search has no metrics. A search by FAISS has three, which are also logged: `search_recall` is the
    share of the k nearest images that FAISS finds, measured on up to SAMPLE queries that are also ranked
    exactly; `index_seconds` and `search_seconds` are the times to build and to search the index.

    FAISS's images are ordered by their exact cosines. Unreadable queries, queries for which FAISS finds too
    few images, and queries whose image k + 1 ties with image k are ranked exactly, so that ties keep the
    gallery's order. The index holds the whole gallery in memory, 4 · dimension bytes for each image; `hnsw`
    needs 8 · NEIGHBOURS bytes more for each. Raises InputError where a vector holds NaN or infinity.
    """
    k = min(k, len(gallery.names))
    if search == "exact" or not k:
        return rank(queries, gallery, k, device), {}
    for side in (queries, gallery):
        check_finite(side)
    start = time.perf_counter()
    index = _build(search, gallery.vectors, k)
    built = time.perf_counter()
    more = min(k + 1, len(gallery.names))  # one more than is wanted shows a tie
    found = [index.search(np.ascontiguousarray(some), more)[1]  # rows of the gallery; -1: none
             for _, some in chunks(queries.vectors, rows_of_chunk(queries.vectors))]  # fmt: skip
    searched = time.perf_counter()
    ranking, short = _exact_order(queries, gallery, np.concatenate(found), k)
    exact = rank(queries.some(short), gallery, k, device)
    ranking.rows[short], ranking.cosines[short] = exact.rows, exact.cosines
    metrics = {"search_recall": _recall(queries, gallery, ranking, device)}
    metrics |= {"index_seconds": round(built - start, 3), "search_seconds": round(searched - built, 3)}
    log.info(
        "--search %s finds %.4f of the %d nearest images; the index took %.1f s to build, %.1f s to search",
        search, metrics["search_recall"], k, metrics["index_seconds"], metrics["search_seconds"],
    )  # fmt: skip
    if len(short):
        log.info(
            "%d queries for which the index found too few images or ties were ranked exactly", len(short)
        )
    return ranking, metrics


def merge_shards(
    ranking: Ranking, metrics: dict[str, float], gallery: ShardedEmbeddings, k: int
) -> tuple[Ranking, dict[str, float]] | None:
    """Merge what rank_by returned for the shards of all processes; None on other ranks than 0.

    The k best images of a shard are ranked there, so the k best of all are among them. The recall is the mean
    of the shards, the seconds are the slowest process's. Raises RunError if another process has ended.
    """
    shards = gather((ranking.cosines, ranking.rows + gallery.start, metrics))
    if shards is None:
        return None
    *candidates, metrics_of_shards = zip(*shards, strict=True)
    cosines, rows = merge(*(np.concatenate(parts, axis=1) for parts in candidates), k)
    merged = {}
    for name in metrics:
        values = [metrics[name] for metrics in metrics_of_shards if name in metrics]
        merged[name] = max(values) if name.endswith("seconds") else round(sum(values) / len(values), 4)
    return Ranking(ranking.queries, gallery.names, rows, cosines), merged


def _exact_order(
    queries: Embeddings, gallery: Embeddings, found: np.ndarray, k: int
) -> tuple[Ranking, np.ndarray]:
    """Order the images that the index found by their float64 cosines, and ties by the gallery's order.

    Return the ranking by the first k of them, and the rows of the queries for which it may lack images.
    """
    zeros = zero_rows(gallery.vectors)
    rows, cosines = np.empty_like(found), np.empty(found.shape)
    for start, some in chunks(queries.vectors, rows_of_chunk(queries.vectors)):
        part = slice(start, start + len(some))
        owners = np.repeat(np.arange(len(some)), found.shape[1])
        of_pairs = cosines_of(some, owners, gallery.vectors, found[part].ravel()).reshape(len(some), -1)
        of_pairs[np.isin(found[part], zeros)] = UNREADABLE
        of_pairs[found[part] < 0] = UNREADABLE - 1  # none was found
        cosines[part], rows[part] = merge(of_pairs, found[part], found.shape[1])
    short = (found[:, :k] < 0).any(axis=1)
    if found.shape[1] > k:
        short |= cosines[:, k - 1] - cosines[:, k] < TIE
    if len(zeros):  # FAISS ranks a row of zeros above an image with a negative cosine
        short |= (cosines[:, :k] < 0).any(axis=1)
    short = np.union1d(np.flatnonzero(short), zero_rows(queries.vectors))
    return Ranking(queries.names, gallery.names, rows[:, :k].copy(), cosines[:, :k].copy()), short


# ---- the indexes ----------------------------------------------------------------------------------


def _build(search: Search, vectors: np.ndarray, k: int) -> faiss.Index:
    """Build an index of the vectors by inner product."""
    import faiss

    images, dimension = vectors.shape
    cells = cells_for(images)
    description = {"flat": "Flat", "ivf": f"IVF{cells},Flat", "hnsw": f"HNSW{NEIGHBOURS}"}[search]
    index = faiss.index_factory(dimension, description, faiss.METRIC_INNER_PRODUCT)
    if search == "ivf":
        index.nprobe = min(cells, max(PROBED, cells // 16))
        most = min(images, 2 * TRAINING_IMAGES * cells)
        taken = np.sort(np.random.default_rng(SEED).choice(images, most, replace=False))
        index.train(np.ascontiguousarray(vectors[taken]))
    elif search == "hnsw":
        index.hnsw.efConstruction = BUILD_BREADTH
        index.hnsw.efSearch = max(SEARCH_BREADTH, 2 * k)
    for _, chunk in chunks(vectors, rows_of_chunk(vectors)):
        index.add(np.ascontiguousarray(chunk))
    return index


def cells_for(images: int) -> int:
    """Return how many cells `ivf` makes: 4 √images, as FAISS advises, or fewer if a cell got too few images.

    >>> cells_for(1_000_000), cells_for(5000), cells_for(30)
    (4000, 128, 1)
    """
    return max(1, min(round(4 * images**0.5), images // TRAINING_IMAGES))


# ---- the recall -----------------------------------------------------------------------------------


def _recall(queries: Embeddings, gallery: Embeddings, ranking: Ranking, device: Any) -> float:
    """Return the share of found images that are at least as similar as the k-th of the exact ranking."""
    count = len(queries.names)
    sample = np.random.default_rng(SEED).choice(count, min(SAMPLE, count), replace=False)
    exact = rank(queries.some(sample), gallery, ranking.rows.shape[1], device)
    return round(float(np.mean(ranking.cosines[sample] >= exact.cosines[:, -1:])), 4)
