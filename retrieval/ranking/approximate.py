"""Embeddings of queries and gallery, and a choice of search, in; a ranking and the search's metrics out.

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

from retrieval.errors import InputError
from retrieval.ranking.exact import merge, place_unreadable, rank
from retrieval.ranking.libraries import cosines_of
from retrieval.records import Embeddings, Ranking, chunks, rows_of_chunk, zero_rows
from retrieval.settings import Search

if TYPE_CHECKING:
    import faiss

SAMPLE = 200  # queries that are also ranked exactly, to measure the recall
SEED = 0
TRAINING_IMAGES = 39  # for each cell: with fewer FAISS warns
PROBED = 16  # the search probes at least this many cells, and at least a sixteenth of all
NEIGHBOURS = 32  # edges of an image in the graph: the M of HNSW
BUILD_BREADTH, SEARCH_BREADTH = 200, 128  # candidates that a walk through the graph keeps, at least

log = logging.getLogger("retrieval.neighbours")


def check_search(search: Search) -> None:
    """Raise InputError, which says what to do, if this search needs FAISS and FAISS is not installed."""
    found = find_spec("faiss") if search != "exact" else None
    if search != "exact" and not (found and found.origin):  # a folder of that name is not the package
        raise InputError(
            f"--search {search} needs the package faiss: run `pip install faiss-cpu`, or use --search exact"
        )


def rank_by(
    search: Search, queries: Embeddings, gallery: Embeddings, k: int = 10, device: Any = "cpu"
) -> tuple[Ranking, dict[str, float]]:
    """Rank as retrieval.ranking.exact.rank does, but by this search; return the ranking and its metrics.

    The metrics, which are also logged, are `search_recall`, the share of the k nearest images that the search
    finds, measured on up to SAMPLE queries that are ranked exactly too; and `index_seconds` and
    `search_seconds`, to build the index and to search it. An exact search has none. Queries for which the
    index finds too few images are ranked exactly. The index holds the whole gallery in memory, 4 · dimension
    bytes for each image, and `hnsw` 8 · NEIGHBOURS bytes more.
    """
    zeros = zero_rows(gallery.vectors) if search != "exact" else ()
    if search == "exact" or len(zeros) == len(gallery.names):
        return rank(queries, gallery, k, device), {}
    readable = np.setdiff1d(np.arange(len(gallery.names)), zeros, assume_unique=True)
    k = min(k, len(gallery.names))
    start = time.perf_counter()
    index = _build(search, gallery.vectors, readable, k)
    built = time.perf_counter()
    places = _search(index, queries.vectors, min(k, len(readable)))  # among the readable; -1: none
    searched = time.perf_counter()
    ranking, missing = _exact_order(queries, gallery, readable, places, k), zero_rows(queries.vectors)
    place_unreadable(ranking, missing, zeros)
    short = np.setdiff1d(np.flatnonzero((places < 0).any(axis=1)), missing)
    exact = rank(_some(queries, short), gallery, k, device)
    ranking.rows[short], ranking.cosines[short] = exact.rows, exact.cosines
    answered = np.setdiff1d(np.arange(len(queries.names)), np.union1d(short, missing))
    metrics = {"search_recall": _recall(queries, gallery, ranking, answered, places.shape[1], device)}
    metrics |= {"index_seconds": round(built - start, 3), "search_seconds": round(searched - built, 3)}
    _log(search, metrics, k, len(short) + len(missing))
    return ranking, metrics


def _exact_order(
    queries: Embeddings, gallery: Embeddings, readable: np.ndarray, places: np.ndarray, k: int
) -> Ranking:
    """Order what the index found by the float64 cosines, and ties by the gallery's order."""
    rows = np.zeros((len(queries.names), k), np.int64)
    cosines = np.full(rows.shape, -np.inf)
    for start, some in chunks(queries.vectors, rows_of_chunk(queries.vectors)):
        part = slice(start, start + len(some))
        found, images = places[part] >= 0, readable[places[part]]
        exact = np.full(found.shape, -np.inf)
        owners = np.nonzero(found)[0]
        exact[found] = cosines_of(some.astype(np.float64), owners, gallery.vectors, images[found])
        cosines[part, : exact.shape[1]], rows[part, : exact.shape[1]] = merge(exact, images, k)
    return Ranking(queries.names, gallery.names, rows, cosines)


def _log(search: Search, metrics: dict[str, float], k: int, short: int) -> None:
    log.info(
        "--search %s finds %.4f of the %d nearest images; the index took %.1f s to build, %.1f s to search",
        search, metrics["search_recall"], k, metrics["index_seconds"], metrics["search_seconds"],
    )  # fmt: skip
    if short:
        log.info("%d queries that the index could not answer in full were ranked exactly", short)


# ---- the indexes ----------------------------------------------------------------------------------


def _build(search: Search, vectors: np.ndarray, readable: np.ndarray, k: int) -> faiss.Index:
    """Build an index of the readable rows, in their order, by inner product."""
    import faiss

    dimension = vectors.shape[1]
    if search == "ivf":
        index = _trained_cells(vectors, readable)
    elif search == "hnsw":
        index = faiss.IndexHNSWFlat(dimension, NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = BUILD_BREADTH
        index.hnsw.efSearch = max(SEARCH_BREADTH, 2 * k)
    else:
        index = faiss.IndexFlatIP(dimension)
    for start, chunk in chunks(vectors, rows_of_chunk(vectors)):
        inside = readable[np.searchsorted(readable, start) : np.searchsorted(readable, start + len(chunk))]
        index.add(np.ascontiguousarray(chunk[inside - start]))
    return index


def cells_for(images: int) -> int:
    """Return how many cells `ivf` makes: 4 √images, as FAISS advises, or fewer if a cell got too few images.

    >>> cells_for(1_000_000), cells_for(5000), cells_for(30)
    (4000, 128, 1)
    """
    return max(1, min(round(4 * images**0.5), images // TRAINING_IMAGES))


def _trained_cells(vectors: np.ndarray, readable: np.ndarray) -> faiss.IndexIVFFlat:
    import faiss

    cells = cells_for(len(readable))
    if cells < round(4 * len(readable) ** 0.5):
        log.info("--search ivf makes %d cells: %d images are too few for more", cells, len(readable))
    dimension = vectors.shape[1]
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dimension), dimension, cells, faiss.METRIC_INNER_PRODUCT)
    index.cp.seed, index.cp.spherical = SEED + 1, True
    index.nprobe = min(cells, max(PROBED, cells // 16))
    most = min(len(readable), 2 * TRAINING_IMAGES * cells)
    taken = np.sort(np.random.default_rng(SEED).choice(readable, most, replace=False))
    index.train(np.ascontiguousarray(vectors[taken]))
    return index


def _search(index: faiss.Index, queries: np.ndarray, k: int) -> np.ndarray:
    """Return the places (queries, k) of the vectors that the index finds, best first; -1: none."""
    found = [index.search(np.ascontiguousarray(part), k)[1]
             for _, part in chunks(queries, rows_of_chunk(queries))]  # fmt: skip
    return np.concatenate(found)


# ---- the recall -----------------------------------------------------------------------------------


def _some(embeddings: Embeddings, rows: np.ndarray) -> Embeddings:
    return Embeddings([embeddings.names[row] for row in rows], embeddings.vectors[rows])


def _recall(
    queries: Embeddings, gallery: Embeddings, ranking: Ranking, answered: np.ndarray, k: int, device: Any
) -> float:
    """Return the share of found images that are at least as similar as the k-th of the exact ranking."""
    sample = np.random.default_rng(SEED).choice(answered, min(SAMPLE, len(answered)), replace=False)
    if not len(sample):
        return 1.0  # all queries are ranked exactly
    exact = rank(_some(queries, sample), gallery, k, device)
    return round(float(np.mean(ranking.cosines[sample, :k] >= exact.cosines[:, -1:])), 4)
