"""Embeddings of queries and gallery in; the nearest gallery images of each query, with their cosines, out."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np

from retrieval.errors import InputError
from retrieval.machine import cores
from retrieval.records import UNREADABLE, Embeddings, Ranking, chunks, rows_of_chunk, zero_rows, zero_rows_of

IMAGES = 8192  # gallery images in a chunk; more where k is large
TILE = 2**22  # float32 products of a query and an image in memory: 16 MiB
CANDIDATES = 2**20  # pairs of a query and an image whose float64 cosines are computed at a time
PIECE = 2**15  # float64 components of a block of vectors: as many as fit into a core's cache
UNIT = 1e-5  # a squared length within this of 1 differs from 1 by float32 rounding only
SMALL = 2**36  # multiply-adds, about a second on two cores

log = logging.getLogger("retrieval.ranking")


def rank(queries: Embeddings, gallery: Embeddings, k: int = 10, device: Any = "cpu") -> Ranking:
    """Rank the k gallery images with the highest cosine for each query; all images of a smaller gallery.

    The ranking is exact: float64 decides between cosines, and equal cosines keep the gallery's order. It is
    the same, bit for bit, on every `device`: a GPU computes float32 products only. Vectors that are not of
    unit length are divided by their length. Unreadable gallery images (rows of zeros) come last, and an
    unreadable query gets the gallery in its order. Raises InputError where a vector holds NaN or infinity, or
    where queries and gallery differ in dimension.

    Memory beyond the vectors and the result stays below 256 MiB for any number of images and k < 100 000. The
    gallery may be a numpy.memmap, which is read once.
    """
    images = len(gallery.names)
    k = min(k, images)
    best = Ranking(queries.names, gallery.names, np.zeros((len(queries.names), k), np.int64),
                   np.full((len(queries.names), k), UNREADABLE))  # fmt: skip
    if not best.rows.size:
        return best
    dimensions = queries.vectors.shape[1], gallery.vectors.shape[1]
    if dimensions[0] != dimensions[1]:
        raise InputError("the queries have {} dimensions and the gallery images have {}: embed both with the "
                         "same network".format(*dimensions))  # fmt: skip
    missing = zero_rows(queries.vectors)
    best.cosines[missing] = np.inf  # so that no image is a candidate
    with _choose_library(str(device), len(queries.names) * gallery.vectors.size) as library:
        zeros = _search(queries, gallery, best, *library)
    if len(missing):
        log.warning("%d queries without an embedding get the gallery in its order", len(missing))
        in_order = np.setdiff1d(np.arange(min(images, k + len(zeros))), zeros)[:k]
        best.rows[missing, : len(in_order)], best.cosines[missing] = in_order, 0
    readable = min(k, images - len(zeros))
    best.rows[:, readable:], best.cosines[:, readable:] = zeros[: k - readable], UNREADABLE
    return best


def merge(cosines: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the best k of each query's candidates (queries, n): by falling cosine, then by ascending row.

    >>> merge(np.array([[0.5, 0.9, 0.5]]), np.array([[7, 3, 2]]), k=2)
    (array([[0.9, 0.5]]), array([[3, 2]]))
    """
    order = np.lexsort((rows, -cosines), axis=1)[:, :k]
    return np.take_along_axis(cosines, order, 1), np.take_along_axis(rows, order, 1)


def cosines_of(queries: np.ndarray, owners: np.ndarray, gallery: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return the float64 cosines of queries[owners] and gallery[rows], which are unit vectors in float32.

    Equal vectors have equal cosines, bit for bit, in each chunk and in each shard of a gallery.
    """
    cosines = np.empty(len(owners))
    step = max(1, PIECE // gallery.shape[1])

    def _compute(start: int) -> None:
        pairs = slice(start, start + step)
        query, image = queries[owners[pairs]], gallery[rows[pairs]]
        cosines[pairs] = np.einsum("nd,nd->n", query.astype(np.float64), image.astype(np.float64))

    with ThreadPoolExecutor(cores()) as threads:  # numpy releases the GIL here
        list(threads.map(_compute, range(0, len(owners), step)))
    return cosines


# ---- candidates by float32 ------------------------------------------------------------------------


def _search(
    queries: Embeddings, gallery: Embeddings, best: Ranking, put: Callable, take: Callable
) -> np.ndarray:
    """Update `best` with one chunk of the gallery after another; return the gallery's rows of zeros."""
    k = best.rows.shape[1]
    images = min(max(IMAGES, 4 * k), rows_of_chunk(gallery.vectors), len(gallery.names))
    zeros = []
    for start, vectors in chunks(gallery.vectors, images):
        zeros.append(start + zero_rows_of(vectors))
        vectors = _unit(gallery, start, vectors)
        on_device = put(vectors)
        for first, some in chunks(queries.vectors, max(1, TILE // (images + k))):
            some = _unit(queries, first, some)
            products = take(put(some) @ on_device.T)  # (queries, images)
            products[:, zeros[-1] - start] = -np.inf
            part = slice(first, first + len(some))
            candidates = _candidates(products, best.cosines[part, -1], k, len(vectors.T))
            for _, pairs in chunks(candidates, CANDIDATES):
                owners, columns = np.divmod(pairs, len(vectors))  # the query and the image of each pair
                found = cosines_of(some, owners, vectors, columns)
                _update(best.rows[part], best.cosines[part], owners, start + columns, found)
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


def _candidates(products: Any, worst: np.ndarray, k: int, dimension: int) -> np.ndarray:
    """Return where in the flattened `products` (queries, images) those of the k best of a query may be.

    `worst` are the k-th best cosines so far. The float32 product of unit vectors of dimension d, summed in
    any order, is within γ = d·u/(1 − d·u) of their cosine, u = 2⁻²⁴ (Higham, Accuracy and Stability of
    Numerical Algorithms, 2002, §3.1). So an image whose product is more than γ below the k-th best cosine so
    far, or more than 2γ below the k-th highest product of these images, is not among the best k.
    """
    d = dimension + 8  # a little more: lengths are 1 within rounding, and `floor` is rounded
    gamma = d * 2.0**-24 / (1 - d * 2.0**-24)
    floor = (worst - gamma).astype(np.float32)
    if not isinstance(products, np.ndarray):
        floor = products.new_tensor(floor)
    near = products >= floor[:, None]
    many = near.sum(1) > k
    if many.any():
        floor[many] = _kth_highest(products[many], k) - 2 * gamma
        near = products >= floor[:, None]
    near = near.reshape(-1)
    return near.nonzero()[0] if isinstance(near, np.ndarray) else near.nonzero()[:, 0].cpu().numpy()


def _kth_highest(products: Any, k: int) -> Any:
    if isinstance(products, np.ndarray):
        return np.partition(products, -k)[:, -k]
    return products.topk(k).values[:, -1]


def _update(
    best_rows: np.ndarray, best_cosines: np.ndarray, owners: np.ndarray, rows: np.ndarray, cosines: np.ndarray
) -> None:
    """Merge candidates, each with its query, into the best rows and cosines (queries, k) so far, in place."""
    k, asked = best_rows.shape[1], np.unique(owners)
    owners = np.concatenate([np.repeat(asked, k), owners])
    rows = np.concatenate([best_rows[asked].ravel(), rows])
    cosines = np.concatenate([best_cosines[asked].ravel(), cosines])
    order = np.lexsort((rows, -cosines, owners))
    first = np.searchsorted(owners[order], owners[order])  # the place of each query's best candidate
    best = order[np.arange(len(order)) - first < k].reshape(-1, k)
    best_rows[asked], best_cosines[asked] = rows[best], cosines[best]


# ---- numpy or torch -------------------------------------------------------------------------------


@contextmanager
def _choose_library(device: str, multiply_adds: int) -> Iterator[tuple[Callable, Callable]]:
    """Yield a function that moves a numpy array to the device, and one that prepares products for the search.

    torch multiplies, and on a GPU it also finds the candidates. While torch is not imported, numpy multiplies
    on the CPU up to SMALL multiply-adds: this saves the import of torch, 1 to 3 s, in a run that finds all
    vectors in the cache and otherwise takes 0.7 s. "mps" counts as "cpu". Meanwhile torch multiplies float32
    as float32, not as TF32.
    """
    if device == "cpu" and "torch" not in sys.modules and multiply_adds <= SMALL:
        yield np.asarray, np.asarray
        return
    import torch

    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        if device in ("cpu", "mps"):
            yield torch.from_numpy, np.asarray
        else:
            yield lambda array: torch.from_numpy(array).to(device), lambda products: products
    finally:
        torch.set_float32_matmul_precision(precision)
