"""Embeddings of queries and gallery, and the user's choice of a search, in; a ranking and its figures out.

`exact` is retrieval/ranking.py. The others are indexes of FAISS (Douze et al., The Faiss library, 2024):
`flat` compares everything in float32, `ivf` looks into the cells nearest to the query, `hnsw` walks a graph.
"""

from __future__ import annotations

import logging
import time
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np

from retrieval.errors import InputError
from retrieval.ranking.exact import rank
from retrieval.records import Embeddings, chunks, rows_of_chunk, zero_rows
from retrieval.settings import Search

if TYPE_CHECKING:
    import faiss

SAMPLE = 200  # queries that are ranked exactly, too
SEED = 0
TRAINING_IMAGES = 39  # for each cell: with fewer FAISS warns
PROBED = 16  # the cells looked into are at least so many, and at least a sixteenth of all
NEIGHBOURS = 32  # of an image in the graph, the M of HNSW
BUILD_BREADTH, SEARCH_BREADTH = 200, 128  # candidates that a walk keeps, at least

log = logging.getLogger("retrieval.neighbours")


def check_search(search: Search) -> None:
    """Raise InputError, with what to do, where this search cannot be used: before any image is read."""
    found = find_spec("faiss") if search != "exact" else None
    if search != "exact" and not (found and found.origin):  # a folder of that name is not the package
        raise InputError(
            f"--search {search} needs the package faiss: run `pip install faiss-cpu`, or use --search exact"
        )


def rank_by(
    search: Search, queries: Embeddings, gallery: Embeddings, keep: int = 10
) -> tuple[dict[str, list[str]], dict[str, float]]:
    """The ranking as of retrieval.ranking.rank, by this search; and its figures, which are said, too.

    The figures are `search_recall`, the share of the `keep` nearest images that it finds, on a sample of up
    to SAMPLE queries that are ranked exactly, too, and `index_seconds` and `search_seconds`, to build the
    index and to search it; `exact` has none. Gallery images that could not be read come last. Queries that
    could not be read are ranked by `rank`, as are those for which the index finds too few images. The index
    holds all of the gallery in memory, 4 · dimension bytes an image, and `hnsw` 8 · NEIGHBOURS more.
    """
    zeros = zero_rows(gallery.vectors) if search != "exact" else ()
    if search == "exact" or len(zeros) == len(gallery.names):
        return rank(queries, gallery, keep), {}
    readable = np.setdiff1d(np.arange(len(gallery.names)), zeros, assume_unique=True)
    keep = min(keep, len(gallery.names))
    start = time.perf_counter()
    index = _build(search, gallery.vectors, readable, keep)
    built = time.perf_counter()
    places = _search(index, queries.vectors, min(keep, len(readable)))  # among the readable; -1: none
    searched = time.perf_counter()
    rows = np.append(readable, -1)[places]  # place -1 is the last
    rows = np.hstack([rows, np.tile(zeros[: keep - rows.shape[1]], (len(rows), 1))])
    short = np.union1d(np.flatnonzero((rows < 0).any(axis=1)), zero_rows(queries.vectors))
    ranking = {
        name: [gallery.names[row] for row in best] for name, best in zip(queries.names, rows, strict=True)
    }
    ranking |= rank(_some(queries, short), gallery, keep)
    figures = {"search_recall": _recall(queries, gallery, ranking, places.shape[1], short)}
    figures |= {"index_seconds": round(built - start, 3), "search_seconds": round(searched - built, 3)}
    _say(search, figures, keep, len(short))
    return ranking, figures


def _say(search: Search, figures: dict[str, float], keep: int, short: int) -> None:
    log.info(
        "--search %s finds %.4f of the %d nearest images; the index took %.1f s to build, %.1f s to search",
        search, figures["search_recall"], keep, figures["index_seconds"], figures["search_seconds"],
    )  # fmt: skip
    if short:
        log.info("%d queries that the index could not answer in full were ranked exactly", short)


# ---- the indexes ----------------------------------------------------------------------------------


def _build(search: Search, vectors: np.ndarray, readable: np.ndarray, keep: int) -> faiss.Index:
    """An index of these rows, in their order, by inner product."""
    import faiss

    dimension = vectors.shape[1]
    if search == "ivf":
        index = _trained_cells(vectors, readable)
    elif search == "hnsw":
        index = faiss.IndexHNSWFlat(dimension, NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = BUILD_BREADTH
        index.hnsw.efSearch = max(SEARCH_BREADTH, 2 * keep)
    else:
        index = faiss.IndexFlatIP(dimension)
    for start, chunk in chunks(vectors, rows_of_chunk(vectors)):
        inside = readable[np.searchsorted(readable, start) : np.searchsorted(readable, start + len(chunk))]
        index.add(np.ascontiguousarray(chunk[inside - start]))
    return index


def cells_for(images: int) -> int:
    """How many cells `ivf` makes: 4 √images, as FAISS advises, unless that leaves too few images for each.

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


def _search(index: faiss.Index, queries: np.ndarray, keep: int) -> np.ndarray:
    """The places (queries, keep) of the nearest vectors in the index, best first; -1 where it finds none."""
    found = [index.search(np.ascontiguousarray(part), keep)[1]
             for _, part in chunks(queries, rows_of_chunk(queries))]  # fmt: skip
    return np.concatenate(found)


# ---- how much it finds ----------------------------------------------------------------------------


def _some(embeddings: Embeddings, rows: np.ndarray) -> Embeddings:
    return Embeddings([embeddings.names[row] for row in rows], embeddings.vectors[rows])


def _recall(
    queries: Embeddings, gallery: Embeddings, ranking: dict[str, list[str]], keep: int, short: np.ndarray
) -> float:
    """The share of found images that are at least as similar as the keep-th of the exact ranking."""
    asked = np.setdiff1d(np.arange(len(queries.names)), short)
    taken = np.random.default_rng(SEED).choice(asked, min(SAMPLE, len(asked)), replace=False)
    if not len(taken):
        return 1.0  # all are ranked exactly
    sample = _some(queries, np.sort(taken))
    place = {name: row for row, name in enumerate(gallery.names)}
    hits = []
    exact = rank(sample, gallery, keep)
    for name, query in zip(sample.names, sample.vectors.astype(np.float64), strict=True):
        both = [place[other] for other in (*ranking[name][:keep], exact[name][-1])]
        cosines = (gallery.vectors[both] * query).sum(axis=1)
        hits.append(np.mean(cosines[:-1] >= cosines[-1]))
    return round(float(np.mean(hits)), 4)
