"""Files of queries and gallery in; the copies of each query, and a ranking without them, out."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from get_images import ImageFile, UnreadableImageError, read_bytes
from retrieval.machine import cores
from retrieval.records import Ranking

Copies = dict[int, list[int]]  # the rows of the gallery images that have the bytes of a query, by its row


def find_copies(queries: list[ImageFile], gallery: list[ImageFile]) -> Copies:
    """Find the gallery images that hold the same bytes as a query. Only files of a query's size are read."""
    sizes = {_size(query) for query in queries} - {0}
    rows = [row for row, image in enumerate(gallery) if _size(image) in sizes]
    with ThreadPoolExecutor(cores()) as pool:
        of_gallery = pool.map(_digest, [gallery[row] for row in rows])
        of_queries = list(pool.map(_digest, queries))
    of_bytes: dict[bytes, list[int]] = defaultdict(list)
    for row, digest in zip(rows, of_gallery, strict=True):
        of_bytes[digest].append(row)
    found = {row: of_bytes.get(digest, []) for row, digest in enumerate(of_queries)}
    return {row: copies for row, copies in found.items() if copies}


def without_copies(ranking: Ranking, copies: Copies, k: int) -> Ranking:
    """Return the first k images of each query in their order, its copies behind all others.

    The ranking must have k images and as many more as a query has copies, or the whole gallery.
    """
    order = np.tile(np.arange(ranking.rows.shape[1]), (len(ranking.rows), 1))
    for query, rows in copies.items():
        order[query] = np.argsort(np.isin(ranking.rows[query], rows), kind="stable")
    order = order[:, :k]
    rows, cosines = (np.take_along_axis(values, order, axis=1) for values in (ranking.rows, ranking.cosines))
    scores = None if ranking.scores is None else np.take_along_axis(ranking.scores, order, axis=1)
    return replace(ranking, rows=rows, cosines=cosines, scores=scores, excluded=copies)


def _size(image: ImageFile) -> int:
    return image.path.stat().st_size if image.path.is_file() else -1


def _digest(image: ImageFile) -> bytes:
    """Return a digest of an image's bytes; of its path if it cannot be read, which is like no other."""
    try:
        return hashlib.sha256(read_bytes(image.path)).digest()
    except UnreadableImageError:
        return bytes(image.path)
