"""A device in; what numpy or torch computes there for the exact ranking, out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

SMALL = 2**36  # multiply-adds, about a second on two cores


class Library(NamedTuple):
    """Functions on arrays, which are numpy's, or tensors on torch's device."""

    put: Callable  # a numpy array → an array, for float32 products
    host: Callable  # an array → a numpy array
    maximum: Callable  # (queries, images) → the maximum of each row
    highest: Callable  # (queries, images), width → the `width` highest values of each row, and their columns
    put_exact: Callable  # a numpy array → an array, for float64 cosines
    dots: Callable  # float64 (n, dimension), float32 (n, dimension) → the float64 products of their rows (n,)
    piece: int  # numbers in a call of `dots`


@contextmanager
def choose_library(device: str, multiply_adds: int) -> Iterator[Library]:
    """Yield torch's functions for a device; numpy's for the CPU while torch is not imported.

    numpy computes up to SMALL multiply-adds. This saves the import of torch, 1 to 3 s, in a run that finds
    all vectors in the cache and otherwise takes 0.7 s. "mps" has no float64 and counts as "cpu". Meanwhile
    torch multiplies float32 as float32, not as TF32.
    """
    if device == "cpu" and "torch" not in sys.modules and multiply_adds <= SMALL:
        yield NUMPY
        return
    import torch

    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield _by_torch("cpu" if device == "mps" else device)
    finally:
        torch.set_float32_matmul_precision(precision)


def _by_torch(device: str) -> Library:
    import torch

    library = NUMPY._replace(
        put=lambda x: torch.from_numpy(x).to(device),
        host=lambda x: x.cpu().numpy(),
        maximum=lambda x: x.amax(1),
        highest=lambda x, width: x.topk(width, sorted=False),
    )
    if device == "cpu":
        return library
    return library._replace(put_exact=library.put, dots=_dots_of_tensors, piece=2**24)


def _highest(products: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    columns = np.argpartition(products, -width)[:, -width:]
    return np.take_along_axis(products, columns, 1), columns


def _dots(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.einsum("nd,nd->n", x, y.astype(np.float64))


def _dots_of_tensors(x: Any, y: Any) -> np.ndarray:
    """Add the products up half onto half: in this order equal rows have equal sums, wherever they lie."""
    products = x * y
    left = products.shape[1]
    while left > 1:
        half = left // 2
        products[:, :half] += products[:, left - half : left]
        left -= half
    return products[:, 0].cpu().numpy()


NUMPY = Library(
    put=np.asarray,
    host=np.asarray,
    maximum=lambda x: x.max(1),
    highest=_highest,
    put_exact=np.asarray,
    dots=_dots,
    piece=2**15,  # as many as fit into a core's cache
)


def cosines_of(
    queries: Any, owners: np.ndarray, gallery: Any, images: np.ndarray, library: Library = NUMPY
) -> np.ndarray:
    """Return the cosines of pairs of rows, of float64 `queries` and of a float32 `gallery`.

    Equal vectors have equal cosines, bit for bit, in each chunk and in each shard of a gallery.
    """
    cosines = np.empty(len(owners))
    step = max(1, library.piece // gallery.shape[1])
    for pairs in (slice(i, i + step) for i in range(0, len(owners), step)):
        query, image = library.put_exact(owners[pairs]), library.put_exact(images[pairs])
        cosines[pairs] = library.dots(queries[query], gallery[image])
    return cosines
