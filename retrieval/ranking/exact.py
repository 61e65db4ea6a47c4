"""Embeddings of queries and gallery in; the nearest gallery images of each query, with their cosines, out."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from retrieval.errors import InputError
from retrieval.records import UNREADABLE, Embeddings, Ranking, chunks, rows_of_chunk, zero_rows, zero_rows_of

IMAGES = 8192  # gallery images in a chunk; more where k is large
TILE = 2**21  # float32 products of a query and an image in memory: 8 MiB
SMALL = 2**36  # multiply-adds, about a second on two cores
UNIT = 1e-5  # a squared length within this of 1 differs from 1 by float32 rounding only

log = logging.getLogger("retrieval.ranking")


def rank(queries: Embeddings, gallery: Embeddings, k: int = 10, device: Any = "cpu") -> Ranking:
    """Rank the k gallery images with the highest cosine for each query; all images of a smaller gallery.

    The ranking is exact: float64 decides between cosines, and equal cosines keep the gallery's order. Vectors
    that are not of unit length are divided by their length. Unreadable gallery images (rows of zeros) come
    last, and an unreadable query gets the gallery in its order. Raises InputError where a vector holds NaN or
    infinity, or where queries and gallery differ in dimension.

    torch computes on `device` ("mps" has no float64 and counts as "cpu"). As long as torch is not imported,
    numpy computes up to SMALL multiply-adds, with the same result bit for bit. This saves the import of
    torch, 1 to 3 s, in a run that finds all vectors in the cache and otherwise takes 0.7 s.

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
    with _library(str(device), len(queries.names) * gallery.vectors.size) as library:
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


class _Library(NamedTuple):
    """What numpy and torch write differently; an array is numpy's, or a tensor on a device."""

    put: Callable  # a numpy array → an array
    host: Callable  # an array → a numpy array
    maximum: Callable  # (queries, images) → the maximum of each row
    highest: Callable  # (queries, images), width → the `width` highest values of each row, and their columns
    piece: int  # float64 products at a time: numpy's fit into a core's cache, torch's occupy all cores


def _highest_by_numpy(products: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    columns = np.argpartition(products, -width)[:, -width:]
    return np.take_along_axis(products, columns, 1), columns


NUMPY = _Library(np.asarray, np.asarray, lambda x: x.max(1), _highest_by_numpy, piece=2**15)


@contextmanager
def _library(device: str, multiply_adds: int) -> Iterator[_Library]:
    """Choose numpy or torch; torch multiplies float32 as float32 meanwhile, not as TF32."""
    if device == "cpu" and "torch" not in sys.modules and multiply_adds <= SMALL:
        yield NUMPY
        return
    import torch

    device, precision = "cpu" if device == "mps" else device, torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield _Library(
            lambda x: torch.from_numpy(x).to(device), lambda x: x.cpu().numpy(), lambda x: x.amax(1),
            lambda x, width: x.topk(width, sorted=False), piece=2**20,
        )  # fmt: skip
    finally:
        torch.set_float32_matmul_precision(precision)


def _search(queries: Embeddings, gallery: Embeddings, best: Ranking, library: _Library) -> np.ndarray:
    """Update `best` with one chunk of the gallery after another; return the gallery's rows of zeros."""
    images = min(max(IMAGES, 4 * best.rows.shape[1]), rows_of_chunk(gallery.vectors), len(gallery.names))
    zeros = []
    for start, vectors in chunks(gallery.vectors, images):
        zeros.append(start + zero_rows_of(vectors))
        chunk = library.put(_unit(gallery, start, vectors))
        for first, some in chunks(queries.vectors, max(1, TILE // images)):
            some = _unit(queries, first, some)
            products = library.put(some) @ chunk.T  # (queries, images)
            products[:, library.put(zeros[-1] - start)] = -np.inf
            part = slice(first, first + len(some))
            some = library.put(some.astype(np.float64))
            _update(best.rows[part], best.cosines[part], products, some, chunk, start, library)
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
    rows: np.ndarray,
    cosines: np.ndarray,
    products: Any,
    queries: Any,
    chunk: Any,
    start: int,
    library: _Library,
) -> None:
    """Merge the nearest images of a chunk into the best `rows` and `cosines` so far, in place.

    The float32 product of unit vectors of dimension d, summed in any order, is within γ = d·u/(1 − d·u) of
    their cosine, u = 2⁻²⁴ (Higham, Accuracy and Stability of Numerical Algorithms, 2002, §3.1). So an image
    whose product is more than γ below the k-th best cosine so far, or more than 2γ below the k-th highest
    product of the chunk, is not among the best k. All others are candidates, between which float64 decides.
    Where the `width` highest products are all candidates, `width` grows, since there may be more.
    """
    k, images = rows.shape[1], products.shape[1]
    d = chunk.shape[1] + 4  # a little more, for lengths that are 1 within rounding
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
        settled, columns, near = asked[~crowded], columns[~crowded], near[~crowded]
        found = np.full(near.shape, -np.inf)
        found[near] = cosines_of(queries, settled[np.nonzero(near)[0]], chunk, columns[near], library)
        both = np.hstack([cosines[settled], found]), np.hstack([rows[settled], start + columns])
        cosines[settled], rows[settled] = merge(*both, k)
        asked, width = asked[crowded], min(4 * width, images)
        if 2 * len(asked) > len(rows):  # most likely, images have many copies
            products[:, library.put(_surplus(library.host(chunk), k))] = -np.inf


def _surplus(vectors: np.ndarray, k: int) -> np.ndarray:
    """Return the rows that have k equal rows before them: they are not among the best k of any query."""
    as_bytes = vectors.view(np.dtype((np.void, 4 * vectors.shape[1]))).ravel()
    order = np.argsort(as_bytes, kind="stable")
    return order[k:][as_bytes[order[k:]] == as_bytes[order[:-k]]]


def cosines_of(
    queries: Any, owners: np.ndarray, chunk: Any, columns: np.ndarray, library: _Library
) -> np.ndarray:
    """Return the cosines of pairs of rows, of float64 `queries` and of a float32 `chunk` of the gallery.

    The products are added up half onto half, so that equal vectors have equal cosines in each library, on
    each device and in each shard of a gallery.
    """
    cosines = np.empty(len(owners))
    step = max(1, library.piece // chunk.shape[1])
    for pairs in (slice(i, i + step) for i in range(0, len(owners), step)):
        products = queries[library.put(owners[pairs])] * chunk[library.put(columns[pairs])]
        left = products.shape[1]
        while left > 1:
            half = left // 2
            products[:, :half] += products[:, left - half : left]
            left -= half
        cosines[pairs] = library.host(products[:, 0])
    return cosines
