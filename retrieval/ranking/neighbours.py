"""Embeddings in; the same embeddings, each moved towards its nearest neighbours, out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from retrieval.machine import zeros
from retrieval.ranking.exact import rank
from retrieval.ranking.projections import unit
from retrieval.records import Embeddings, Ranking, chunks, readable_rows, rows_of_chunk


def expand_queries(
    queries: Embeddings, gallery: Embeddings, neighbours: int, alpha: float, device: Any = "cpu"
) -> Embeddings:
    """Move each query towards its nearest gallery images: α-weighted query expansion.

        q′ = q + Σ cos(q, g)^α · g      over the nearest `neighbours` gallery images g; then of unit length

    A negative cosine counts as 0. Unreadable images stay rows of zeros. Radenović, Tolias and Chum,
    Fine-tuning CNN image retrieval with no human annotation, TPAMI 2019, arXiv 1711.02512.
    """
    expanded = zeros(queries.vectors.shape, np.float32, "expanded queries")
    for rows, near in nearest(queries, gallery, neighbours, device):
        expanded[rows] = unit(queries.vectors[rows] + _weighted_sum(near, gallery.vectors, alpha))
    return Embeddings(queries.names, expanded, queries.without_face)


def augment_gallery(gallery: Embeddings, neighbours: int, alpha: float, device: Any = "cpu") -> Embeddings:
    """Move each gallery image towards its nearest other gallery images: database augmentation.

        g′ = g + Σ cos(g, h)^α · h      over the nearest `neighbours` others h; then of unit length

    As expand_queries. Gordo et al., End-to-end learning of deep visual representations for image retrieval,
    IJCV 2017, arXiv 1610.07940.
    """
    augmented = zeros(gallery.vectors.shape, np.float32, "augmented gallery images")
    for rows, near in nearest(gallery, gallery, neighbours + 1, device):
        # The image itself is among its neighbours with a cosine of 1: it is the first term of the sum.
        augmented[rows] = unit(_weighted_sum(near, gallery.vectors, alpha))
    return Embeddings(gallery.names, augmented, gallery.without_face)


def nearest(
    images: Embeddings, others: Embeddings, neighbours: int, device: Any = "cpu"
) -> Iterator[tuple[np.ndarray, Ranking]]:
    """Yield the rows of the readable images, and the ranking of their nearest readable others, in chunks."""
    neighbours = min(neighbours, len(readable_rows(others.vectors)))
    for start, chunk in chunks(images.vectors, rows_of_chunk(images.vectors)):
        readable = readable_rows(chunk)
        some = Embeddings([images.names[start + row] for row in readable], chunk[readable])
        yield start + readable, rank(some, others, neighbours, device)


def _weighted_sum(near: Ranking, vectors: np.ndarray, alpha: float) -> np.ndarray:
    """Return Σ cosᵅ · vector over the neighbours of each image: (images, dimension), float64."""
    total = np.zeros((len(near.rows), vectors.shape[1]))
    for rows, cosines in zip(near.rows.T, near.cosines.T, strict=True):  # a neighbour of each image
        total += cosines.clip(0)[:, None] ** alpha * vectors[rows]
    return total
