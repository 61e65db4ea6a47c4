"""Embeddings of queries and gallery in; the nearest gallery images of each query, with their cosines, out."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np

from retrieval.errors import InputError
from retrieval.machine import cores
from retrieval.records import UNREADABLE, Embeddings, Ranking, chunks, rows_of_chunk, zero_rows, zero_rows_of

if TYPE_CHECKING:
    from torch import Tensor

IMAGES = 8192  # gallery images in a chunk; more where k is large
TILE, TILE_ON_GPU = 2**21, 2**24  # products of a query and an image in memory: 8 and 64 MiB
PIECE, PIECE_ON_GPU = 2**17, 2**23  # components of pairs at a time: a core's cache holds them; a GPU is busy
UNIT = 1e-5  # a squared length within this of 1 differs from 1 by float32 rounding only
SMALL = 2**36  # multiply-adds, about a second on two cores
MANY = 32  # a float64 product of all pairs takes as long as the exact cosines of a 32nd of them
ONE = 2.0**62  # as an integer, the cosine of equal vectors

log = logging.getLogger("retrieval.ranking")


def rank(queries: Embeddings, gallery: Embeddings, k: int = 10, device: Any = "cpu") -> Ranking:
    """Rank the k gallery images with the highest cosine for each query; all images of a smaller gallery.

    The ranking is exact: cosines are summed without rounding, and equal cosines keep the gallery's order. It
    is the same, bit for bit, on every `device`. Vectors that are not of unit length are divided by their
    length. Unreadable gallery images (rows of zeros) come last, and an unreadable query gets the gallery in
    its order. Raises InputError where a vector holds NaN or infinity, where queries and gallery differ in
    dimension, or where one of them is no Embeddings.

    Memory beyond the vectors and the result stays below 256 MiB for any number of images and k < 100 000. The
    gallery may be a numpy.memmap, which is read once.
    """
    for side in (queries, gallery):
        if not isinstance(side, Embeddings):
            raise InputError(f"rank takes Embeddings, as embed returns them, and not {side!r:.60}: write "
                             "rank(embed(queries, backbone), embed(gallery, backbone))")  # fmt: skip
    images = len(gallery.names)
    k = min(k, images)
    if not k or not queries.names:
        nothing = np.zeros((len(queries.names), k))
        return Ranking(queries.names, gallery.names, nothing.astype(np.int64), nothing)
    dimensions = queries.vectors.shape[1], gallery.vectors.shape[1]
    if dimensions[0] != dimensions[1]:
        raise InputError("the queries have {} dimensions and the gallery images have {}: embed both with the "
                         "same network".format(*dimensions))  # fmt: skip
    missing = zero_rows(queries.vectors)
    with _choose_library(str(device), len(queries.names) * gallery.vectors.size) as library:
        rows, cosines, zeros = _search(queries, gallery, k, missing, library)
    if len(missing):
        log.warning("%d queries without an embedding get the gallery in its order", len(missing))
        in_order = np.setdiff1d(np.arange(min(images, k + len(zeros))), zeros)[:k]
        rows[missing, : len(in_order)], cosines[missing] = in_order, 0
    readable = min(k, images - len(zeros))
    rows[:, readable:], cosines[:, readable:] = zeros[: k - readable], UNREADABLE
    return Ranking(queries.names, gallery.names, rows, cosines)


def merge(cosines: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the best k of each query's candidates (queries, n): by falling cosine, then by ascending row.

    >>> merge(np.array([[0.5, 0.9, 0.5]]), np.array([[7, 3, 2]]), k=2)
    (array([[0.9, 0.5]]), array([[3, 2]]))
    """
    order = np.lexsort((rows, -cosines), axis=1)[:, :k]
    return np.take_along_axis(cosines, order, 1), np.take_along_axis(rows, order, 1)


def cosines_of(queries: np.ndarray, owners: np.ndarray, gallery: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return the float64 cosines of queries[owners] and gallery[rows], which are unit vectors in float32.

    The product of two float32 numbers is exact in float64. Cut to an integer number of 2⁻⁶², the products add
    up to the same sum in every order. So equal vectors have equal cosines, bit for bit, on each device, in
    each chunk and in each shard of a gallery. They are within dimension · 2⁻⁶² + 2⁻⁵³ of the true cosines.
    """
    cosines = np.empty(len(owners))
    step = max(1, PIECE // gallery.shape[1])

    def _compute(start: int) -> None:
        pairs = slice(start, start + step)
        products = (queries[owners[pairs]] * ONE).astype(np.float64) * gallery[rows[pairs]]
        cosines[pairs] = products.astype(np.int64).sum(1) / ONE

    with ThreadPoolExecutor(cores()) as threads:  # numpy releases the GIL here
        list(threads.map(_compute, range(0, len(owners), step)))
    return cosines


def _cosines_on_gpu(queries: Tensor, owners: Tensor, gallery: Tensor, rows: Tensor) -> Tensor:
    """Do as cosines_of on a GPU."""
    cosines = queries.new_empty(len(owners)).double()
    step = max(1, PIECE_ON_GPU // gallery.shape[1])
    for start in range(0, len(owners), step):
        pairs = slice(start, start + step)
        products = (queries[owners[pairs]] * ONE).double() * gallery[rows[pairs]]
        cosines[pairs] = products.long().sum(1).double() / ONE
    return cosines


# ---- candidates by float32, ordered by their exact cosines ----------------------------------------


def _search(
    queries: Embeddings, gallery: Embeddings, k: int, missing: np.ndarray, library: _Library
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the best rows and their cosines (queries, k), and the gallery's rows of zeros.

    The chunks of the gallery follow one another, and each is compared with tiles of the queries.
    """
    rows = library.full((len(queries.names), k), 0, "int64")
    cosines = library.full((len(queries.names), k), UNREADABLE, "float64")
    cosines[library.put(missing)] = np.inf  # so that no image is a candidate
    images = min(max(IMAGES, 4 * k), rows_of_chunk(gallery.vectors), len(gallery.names))
    zeros = []
    for start, vectors in chunks(gallery.vectors, images):
        zeros.append(zero_rows_of(vectors))
        vectors = _unit(gallery, start, vectors, library)
        for first, some in chunks(queries.vectors, max(1, library.tile // (images + k))):
            some = _unit(queries, first, some, library)
            part = slice(first, first + len(some))
            worst = cosines[part, -1]
            near = _candidates(some, vectors, zeros[-1], worst, k, library)
            if near.sum() > max(2 * k * len(some), len(some) * len(vectors) // MANY):
                doubles = library.double(some), library.double(vectors)
                near = _candidates(*doubles, zeros[-1], worst, k, library)
            pairs = library.xp.where(near.reshape(-1))[0]  # flat: numpy takes a tenth of the time
            owners = pairs // len(vectors)  # the query of each candidate
            columns = pairs - owners * len(vectors)
            found = library.cosines(some, owners, vectors, columns)
            counts = library.xp.bincount(owners, minlength=len(some))
            _update(rows[part], cosines[part], counts, owners, start + columns, found, library)
        zeros[-1] += start
    return library.take(rows), library.take(cosines), np.concatenate(zeros)


def _unit(embeddings: Embeddings, start: int, vectors: np.ndarray, library: _Library) -> Any:
    """Return some of the vectors, from row `start` on, as float32 of unit length; zeros stay zeros."""
    zeros = zero_rows_of(vectors)
    vectors = library.put(np.require(vectors, np.float32, ["C", "W"]))
    squares = library.xp.einsum("nd,nd->n", vectors, vectors)
    squares[library.put(zeros)] = 1
    wrong = library.xp.where(~((squares > 1e-30) & (squares < 1e30)))[0]
    if len(wrong):
        _refuse(embeddings.names[start + int(wrong[0])])
    squares[abs(squares - 1) < UNIT] = 1
    return vectors if (squares == 1).all() else vectors / squares[:, None] ** 0.5


def check_finite(embeddings: Embeddings) -> None:
    """Raise InputError where a vector holds NaN or infinity."""
    for start, vectors in chunks(embeddings.vectors, rows_of_chunk(embeddings.vectors)):
        wrong = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if len(wrong):
            _refuse(embeddings.names[start + int(wrong[0])])


def _refuse(name: str) -> NoReturn:
    raise InputError(f"the vector of {name} holds NaN or infinity, or is too long or too short: look at what "
                     "the network returns for it")  # fmt: skip


def _candidates(queries: Any, vectors: Any, zeros: np.ndarray, worst: Any, k: int, library: _Library) -> Any:
    """Return as (queries, images) which images may be among the k best of a query; never the rows of `zeros`.

    `worst` are the k-th best cosines so far. The product of unit vectors of dimension d, summed in any order,
    is within γ = d·u/(1 − d·u) of their cosine, u = 2⁻²⁴ in float32 and 2⁻⁵³ in float64 (Higham, Accuracy and
    Stability of Numerical Algorithms, 2002, §3.1). So an image whose product is more than γ below the k-th
    best cosine so far, or more than 2γ below the k-th highest product of these images, is not among the best.
    """
    xp = library.xp
    products = library.multiply(queries, vectors)
    products[:, library.put(zeros)] = -np.inf
    d = vectors.shape[1] + 8  # a little more: lengths are 1 within rounding, and `floor` is rounded
    u = xp.finfo(products.dtype).eps / 2
    gamma = d * u / (1 - d * u)
    floor = xp.asarray(worst - gamma, dtype=products.dtype)
    near = products >= floor[:, None]
    many = near.sum(1) > k
    if many.any():
        highest = (
            np.partition(products[many], -k)[:, -k] if xp is np else products[many].topk(k).values[:, -1]
        )
        floor[many] = highest - 2 * gamma
        near = products >= floor[:, None]
    return near


def _update(
    rows: Any, cosines: Any, counts: Any, owners: Any, new_rows: Any, new_cosines: Any, library: _Library
) -> None:
    """Merge candidates into the best rows and cosines (queries, k) so far, in place.

    They are sorted by their queries, `owners`, which have `counts` of them, and then by their rows, which
    come after all rows so far: a stable sort by the cosine keeps the gallery's order.
    """
    xp, k = library.xp, rows.shape[1]
    each = xp.arange(len(counts), device=library.device)[:, None]
    place = k + xp.arange(len(owners), device=library.device) - (xp.cumsum(counts, 0) - counts)[owners]
    shape = len(counts), k + int(counts.max())
    all_rows, all_cosines = library.full(shape, 0, "int64"), library.full(shape, -np.inf, "float64")
    all_rows[:, :k], all_cosines[:, :k] = rows, cosines
    all_rows[owners, place], all_cosines[owners, place] = new_rows, new_cosines
    order = xp.argsort(-all_cosines, stable=True)[:, :k]
    rows[:], cosines[:] = all_rows[each, order], all_cosines[each, order]


# ---- numpy, or torch on a GPU ---------------------------------------------------------------------


class _Library(NamedTuple):
    """What computes: numpy on the CPU, where torch may multiply; torch on a GPU."""

    xp: Any  # numpy or torch: the functions used here have the same names in both
    device: str
    multiply: Callable[[Any, Any], Any]  # (queries, dimension), (images, dimension) → (queries, images)
    cosines: Callable[[Any, Any, Any, Any], Any]
    tile: int

    def put(self, array: np.ndarray) -> Any:
        """Return a numpy array as an array of the library."""
        return self.xp.asarray(array, device=self.device)

    def take(self, array: Any) -> np.ndarray:
        """Return an array of the library as a numpy array."""
        return array if self.xp is np else array.cpu().numpy()

    def double(self, array: Any) -> Any:
        """Return an array of the library in float64."""
        return self.xp.asarray(array, dtype=self.xp.float64)

    def full(self, shape: tuple[int, int], value: float, dtype: str) -> Any:
        """Return a new array of the library."""
        return self.xp.full(shape, value, dtype=getattr(self.xp, dtype), device=self.device)


@contextmanager
def _choose_library(device: str, multiply_adds: int) -> Iterator[_Library]:
    """Yield the library for a device and a size of the problem.

    While torch is not imported, numpy multiplies up to SMALL multiply-adds on the CPU: this saves the import
    of torch, 1 to 3 s, in a run that finds all vectors in the cache and otherwise takes 0.7 s. "mps" counts
    as "cpu", since it lacks float64. Meanwhile torch multiplies float32 as float32, not as TF32.
    """
    if device == "cpu" and "torch" not in sys.modules and multiply_adds <= SMALL:
        yield _Library(np, "cpu", lambda queries, images: queries @ images.T, cosines_of, TILE)
        return
    import torch

    def _multiply(queries: np.ndarray, images: np.ndarray) -> np.ndarray:
        return (torch.from_numpy(queries) @ torch.from_numpy(images).T).numpy()

    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        if device in ("cpu", "mps"):
            yield _Library(np, "cpu", _multiply, cosines_of, TILE)
        else:
            yield _library_of_gpu(device)
    finally:
        torch.set_float32_matmul_precision(precision)


def _library_of_gpu(device: str) -> _Library:
    import torch

    return _Library(torch, device, lambda queries, images: queries @ images.T, _cosines_on_gpu, TILE_ON_GPU)
