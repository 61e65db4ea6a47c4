"""Embeddings of queries and gallery in; a ranking {query: [gallery names, best first]} out."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

BLOCK_BYTES = 2**27  # 128 MiB of similarities at a time
LAST = -2.0  # below every cosine

log = logging.getLogger("retrieval.ranking")


@dataclass(frozen=True)
class Embeddings:
    """Unit vectors with their names: row i of `vectors` (images, dimension), float32, belongs to names[i].

    An image that could not be embedded has a row of zeros. `without_face` are the names of those in which a
    face was looked for and not found; None if none was looked for.
    """

    names: list[str]
    vectors: np.ndarray
    without_face: list[str] | None = None

    @property
    def unreadable(self) -> list[str]:
        """The names whose rows are zeros."""
        return [self.names[row] for row in np.flatnonzero(~self.vectors.any(axis=1))]


def rank(queries: Embeddings, gallery: Embeddings, keep: int = 10) -> dict[str, list[str]]:
    """The `keep` gallery names most similar to each query by cosine, best first; all of a smaller gallery.

    Exact: cosines are compared in float64, and equal ones keep the gallery's order. Gallery images that
    could not be read come last; a query that could not be read gets the gallery in its order.

    Memory beyond the vectors and the result: about twice BLOCK_BYTES (256 MiB), or two rows of the
    similarity matrix where one is longer than that, for any number of queries and images.
    """
    keep = min(keep, len(gallery.names))
    if queries.unreadable:
        log.warning("%d queries without an embedding get the gallery in its order", len(queries.unreadable))
    ranking = {}
    for name, best in zip(queries.names, _best_rows(queries.vectors, gallery.vectors, keep), strict=True):
        ranking[name] = [gallery.names[row] for row in best]
    return ranking


def _best_rows(queries: np.ndarray, gallery: np.ndarray, keep: int) -> Iterator[np.ndarray]:
    """Yield for each query the rows of its `keep` nearest gallery vectors, block by block of queries."""
    unreadable = ~gallery.any(axis=1)
    block = max(1, BLOCK_BYTES // (4 * len(gallery)))
    for start in range(0, len(queries), block):
        yield from _best_in_block(queries[start : start + block], gallery, unreadable, keep)


def _best_in_block(
    queries: np.ndarray, gallery: np.ndarray, unreadable: np.ndarray, keep: int
) -> list[np.ndarray]:
    """A float32 product finds the candidates, float64 decides between them.

    For unit vectors of dimension d the float32 sum, in whatever order, is within γ = d·u/(1 − d·u) of the
    cosine, u = 2⁻²⁴ (Higham, Accuracy and Stability of Numerical Algorithms, 2002, §3.1): whatever is among
    the best lies no more than 2γ below the keep-th best float32 value.
    """
    images, dimension = gallery.shape
    gamma = dimension * 2.0**-24 / (1 - dimension * 2.0**-24)
    similarity = queries @ gallery.T  # (block, gallery)
    similarity[:, unreadable] = LAST
    floor = np.partition(similarity, images - keep, axis=1)[:, images - keep]
    floor -= np.float32(2.01 * gamma)  # a little more than 2γ, for lengths that are 1 within rounding
    best = []
    for query, row, least in zip(queries, similarity, floor, strict=True):
        candidates = np.flatnonzero(row >= least)  # in gallery order
        cosines = _cosines(query, gallery, candidates)
        cosines[unreadable[candidates]] = LAST
        best.append(candidates[np.argsort(-cosines, kind="stable")[:keep]])
    return best


def _cosines(query: np.ndarray, gallery: np.ndarray, rows: np.ndarray, chunk: int = 4096) -> np.ndarray:
    """float64 cosines of one query with some gallery rows; equal vectors give equal numbers, bit for bit."""
    query = query.astype(np.float64)
    chunks = np.split(rows, range(chunk, len(rows), chunk))
    return np.concatenate([(gallery[part] * query).sum(axis=1) for part in chunks])
