"""Embeddings of queries and gallery in; the nearest gallery images of each query, with their cosines, out."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import numpy as np

from retrieval.errors import InputError
from retrieval.ranking.libraries import Library, choose_library, cosines_of
from retrieval.records import UNREADABLE, Embeddings, Ranking, chunks, rows_of_chunk, zero_rows, zero_rows_of

IMAGES = 8192  # gallery images in a chunk; more where k is large
TILE = 2**22  # float32 products of a query and an image in memory: 16 MiB
CANDIDATES = 2**18  # candidates of several queries in memory
UNIT = 1e-5  # a squared length within this of 1 differs from 1 by float32 rounding only

log = logging.getLogger("retrieval.ranking")


def rank(queries: Embeddings, gallery: Embeddings, k: int = 10, device: Any = "cpu") -> Ranking:
    """Rank the k gallery images with the highest cosine for each query; all images of a smaller gallery.

    The ranking is exact: float64 decides between cosines, and equal cosines keep the gallery's order. Vectors
    that are not of unit length are divided by their length. Unreadable gallery images (rows of zeros) come
    last, and an unreadable query gets the gallery in its order. Raises InputError where a vector holds NaN or
    infinity, or where queries and gallery differ in dimension.

    A GPU `device` computes by torch, the CPU by numpy or torch as choose_library says; both find the same
    rows and cosines on the CPU, bit for bit, and a GPU's cosines differ by 1e-15.

    Memory beyond the vectors and the result stays below 256 MiB for any number of images and k < 100 000. The
    gallery may be a numpy.memmap, which is read once.
    """
    k = min(k, len(gallery.names))
    best = Ranking(queries.names, gallery.names, np.zeros((len(queries.names), k), np.int64),
                   np.full((len(queries.names), k), -np.inf))  # fmt: skip
    if not best.rows.size:
        return best
    dimensions = queries.vectors.shape[1], gallery.vectors.shape[1]
    if dimensions[0] != dimensions[1]:
        raise InputError("the queries have {} dimensions and the gallery images have {}: embed both with the "
                         "same network".format(*dimensions))  # fmt: skip
    missing = zero_rows(queries.vectors)
    best.cosines[missing] = np.inf  # so that no image is a candidate
    with choose_library(str(device), len(queries.names) * gallery.vectors.size) as library:
        zeros = _search(queries, gallery, best, library)
    place_unreadable(best, missing, zeros)
    return best


def place_unreadable(ranking: Ranking, queries: np.ndarray, gallery: np.ndarray) -> None:
    """Put unreadable gallery rows last, and give unreadable queries the gallery in its order, in place."""
    k, images = ranking.rows.shape[1], len(ranking.gallery)
    if len(queries):
        log.warning("%d queries without an embedding get the gallery in its order", len(queries))
        in_order = np.setdiff1d(np.arange(min(images, k + len(gallery))), gallery)[:k]
        ranking.rows[queries, : len(in_order)], ranking.cosines[queries] = in_order, 0
    readable = min(k, images - len(gallery))
    ranking.rows[:, readable:], ranking.cosines[:, readable:] = gallery[: k - readable], UNREADABLE


def merge(cosines: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the best k of each query's candidates (queries, n): by falling cosine, then by ascending row.

    >>> merge(np.array([[0.5, 0.9, 0.5]]), np.array([[7, 3, 2]]), k=2)
    (array([[0.9, 0.5]]), array([[3, 2]]))
    """
    order = np.lexsort((rows, -cosines), axis=1)[:, :k]
    return np.take_along_axis(cosines, order, 1), np.take_along_axis(rows, order, 1)


class _Chunk(NamedTuple):
    """Consecutive vectors of the gallery."""

    start: int  # the gallery's row of the first vector
    vectors: np.ndarray
    exact: Any  # the vectors where float64 computes


def _search(queries: Embeddings, gallery: Embeddings, best: Ranking, library: Library) -> np.ndarray:
    """Update `best` with one chunk of the gallery after another; return the gallery's rows of zeros."""
    images = min(max(IMAGES, 4 * best.rows.shape[1]), rows_of_chunk(gallery.vectors), len(gallery.names))
    zeros = []
    for start, vectors in chunks(gallery.vectors, images):
        zeros.append(start + zero_rows_of(vectors))
        vectors = _unit(gallery, start, vectors)
        chunk, on_device = _Chunk(start, vectors, library.put_exact(vectors)), library.put(vectors)
        for first, some in chunks(queries.vectors, max(1, TILE // images)):
            some = _unit(queries, first, some)
            products = library.put(some) @ on_device.T  # (queries, images)
            products[:, library.put(zeros[-1] - start)] = -np.inf
            part = slice(first, first + len(some))
            some = library.put_exact(some.astype(np.float64))
            _update(best.rows[part], best.cosines[part], products, some, chunk, library)
    return np.concatenate(zeros)


def _unit(embeddings: Embeddings, start: int, vectors: np.ndarray) -> np.ndarray:
    """Return some of the vectors, from row `start` on, as float32 of unit length; zeros stay zeros."""
    vectors = np.require(vectors, np.float32, ["C", "W"])
    squares = np.einsum("nd,nd->n", vectors, vectors)
    squares[zero_rows_of(vectors)] = 1
    wrong = np.flatnonzero(~((squares > 1e-30) & (squares < 1e30)))
    if len(wrong):
        raise InputError(f"the vector of {embeddings.names[start + wrong[0]]} holds NaN or infinity, or is "
                         "too long or too short: look at what the network returns for it")  # fmt: skip
    squares[np.abs(squares - 1) < UNIT] = 1
    return vectors if (squares == 1).all() else vectors / np.sqrt(squares)[:, None]


def _update(
    rows: np.ndarray, cosines: np.ndarray, products: Any, queries: Any, chunk: _Chunk, library: Library
) -> None:
    """Merge the nearest images of a chunk into the best `rows` and `cosines` so far, in place.

    The float32 product of unit vectors of dimension d, summed in any order, is within γ = d·u/(1 − d·u) of
    their cosine, u = 2⁻²⁴ (Higham, Accuracy and Stability of Numerical Algorithms, 2002, §3.1). So an image
    whose product is more than γ below the k-th best cosine so far, or more than 2γ below the k-th highest
    product of the chunk, is not among the best k. All others are candidates, between which float64 decides.
    Where the `width` highest products are all candidates, `width` grows, since there may be more.
    """
    k, images = rows.shape[1], products.shape[1]
    d = chunk.vectors.shape[1] + 4  # a little more, for lengths that are 1 within rounding
    gamma = d * 2.0**-24 / (1 - d * 2.0**-24)
    floor = cosines[:, -1] - gamma
    asked = np.flatnonzero(library.host(library.maximum(products)) >= floor)
    width = min(2 * k + 16, images)
    while len(asked):
        highest, columns = map(library.host, library.highest(products[library.put(asked)], width))
        if width >= k:
            floor[asked] = np.maximum(floor[asked], np.partition(highest, -k)[:, -k] - 2 * gamma)
        near = (highest >= floor[asked, None]) & (highest > -np.inf)
        crowded = near.all(axis=1) & (width < images)
        for some in (part for _, part in chunks(np.flatnonzero(~crowded), max(1, CANDIDATES // width))):
            owners, images_of, candidates = asked[some], columns[some], near[some]
            found = np.full(candidates.shape, -np.inf)
            found[candidates] = cosines_of(
                queries, owners[np.nonzero(candidates)[0]], chunk.exact, images_of[candidates], library
            )
            both = np.hstack([cosines[owners], found]), np.hstack([rows[owners], chunk.start + images_of])
            cosines[owners], rows[owners] = merge(*both, k)
        asked, width = asked[crowded], min(4 * width, images)
        if 2 * len(asked) > len(rows):  # most likely, images have many copies
            products[:, library.put(_surplus(chunk.vectors, k))] = -np.inf


def _surplus(vectors: np.ndarray, k: int) -> np.ndarray:
    """Return the rows that have k equal rows before them: they are not among the best k of any query."""
    as_bytes = vectors.view(np.dtype((np.void, 4 * vectors.shape[1]))).ravel()
    order = np.argsort(as_bytes, kind="stable")
    return order[k:][as_bytes[order[k:]] == as_bytes[order[:-k]]]
