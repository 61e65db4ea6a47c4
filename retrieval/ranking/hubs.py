"""Embeddings in; a ranking in which hubs, gallery images that are near to many queries, count less, out."""

from __future__ import annotations

from typing import Any

import numpy as np

from retrieval.machine import zeros
from retrieval.ranking.exact import cosines_of, rank
from retrieval.ranking.neighbours import nearest
from retrieval.records import (
    UNREADABLE,
    Embeddings,
    Ranking,
    chunks,
    readable_rows,
    rows_of_chunk,
    zero_rows_of,
)

LONGER = 4  # a shortlist has 4 k images; where that is too few, 16 k …
ROUNDING = 1e-5  # more than the lifted vectors' float32 changes a score


def rank_without_hubs(
    queries: Embeddings, gallery: Embeddings, k: int = 10, neighbours: int = 10, device: Any = "cpu"
) -> Ranking:
    """Rank by cross-domain similarity local scaling (CSLS), with the scores beside the cosines.

        score(q, g) = 2 cos(q, g) − r(q) − r(g)

    r(q) is the mean cosine of q's nearest `neighbours` gallery images, r(g) that of g's nearest queries: an
    image that is near to many queries is a hub, and has to be nearer than others. So the ranking of a query
    depends on the other queries; a single query is ranked as by the cosine. Conneau et al., Word translation
    without parallel data, ICLR 2018, arXiv 1710.04087, §2.3.

    The ranking is exact, the same on every device, and equal scores keep the gallery's order. Unreadable
    gallery images come last, with a score of −∞; an unreadable query gets the gallery in its order.
    """
    plain = rank(queries, gallery, max(k, neighbours), device)
    images = len(readable_rows(gallery.vectors))
    r_queries = plain.cosines[:, : min(neighbours, images)].mean(axis=1)
    r_gallery = np.zeros(len(gallery.names))
    for rows, near in nearest(gallery, queries, neighbours, device):
        r_gallery[rows] = near.cosines.mean(axis=1)
    rows, cosines, scores = (array[:, :k].copy() for array in (plain.rows, plain.cosines, plain.cosines))
    lifted_queries, lifted_gallery, scale = _lift(queries, gallery, r_gallery)
    asked, length = readable_rows(queries.vectors), LONGER * k
    while len(asked):
        near = rank(lifted_queries.some(asked), lifted_gallery, length, device)
        found = _scored(near, queries.vectors[asked], gallery.vectors, r_queries[asked], r_gallery)
        rows[asked], cosines[asked], scores[asked] = _best(*found, k)
        if length >= len(gallery.names):
            break
        # The score of the shortlist's last lifted cosine: no image outside the shortlist has a higher one.
        others = scale * near.cosines[:, -1] - r_queries[asked] + ROUNDING
        asked = asked[(scores[asked, -1] <= others) & (near.cosines[:, -1] != UNREADABLE)]
        length *= LONGER
    return Ranking(queries.names, gallery.names, rows, cosines, scores)


def _lift(queries: Embeddings, gallery: Embeddings, r: np.ndarray) -> tuple[Embeddings, Embeddings, float]:
    """Return unit vectors with two more dimensions, and `scale`: scale · their cosine is 2 cos(q, g) − r(g).

        q″ = (q, 1, 0) / √2      g″ = (g, −r/2, √(R² − r²)/2) / √(1 + R²/4)      R = max |r|

    So a search by the cosine finds the highest scores. Bachrach et al., Speeding up the Xbox recommender
    system using a Euclidean transformation for inner-product spaces, RecSys 2014.
    """
    most = np.abs(r).max()
    length = np.sqrt(1 + most**2 / 4)
    of_gallery = np.stack([-r / 2, np.sqrt(most**2 - r**2) / 2], axis=1)
    of_queries = np.tile([1.0, 0.0], (len(queries.names), 1))
    lifted = _joined(queries, of_queries, np.sqrt(2)), _joined(gallery, of_gallery, length)
    return *lifted, 2 * np.sqrt(2) * length


def _joined(embeddings: Embeddings, more: np.ndarray, length: float) -> Embeddings:
    """Return the vectors with more dimensions, divided by `length`; rows of zeros stay so."""
    images, dimension = embeddings.vectors.shape
    joined = zeros((images, dimension + more.shape[1]), np.float32, "vectors")
    for start, chunk in chunks(embeddings.vectors, rows_of_chunk(embeddings.vectors)):
        part = slice(start, start + len(chunk))
        joined[part, :dimension], joined[part, dimension:] = chunk / length, more[part] / length
        joined[start + zero_rows_of(chunk)] = 0
    return Embeddings(embeddings.names, joined)


def _scored(
    near: Ranking, queries: np.ndarray, gallery: np.ndarray, r_queries: np.ndarray, r_gallery: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the rows of a shortlist, their cosines and their scores, each (queries, length)."""
    owners = np.repeat(np.arange(len(queries)), near.rows.shape[1])
    cosines = cosines_of(queries, owners, gallery, near.rows.ravel()).reshape(near.rows.shape)
    scores = 2 * cosines - r_queries[:, None] - r_gallery[near.rows]
    unreadable = near.cosines == UNREADABLE
    cosines[unreadable], scores[unreadable] = UNREADABLE, -np.inf
    return near.rows, cosines, scores


def _best(
    rows: np.ndarray, cosines: np.ndarray, scores: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the k best of each query: by falling score, then by ascending row."""
    order = np.lexsort((rows, -scores), axis=1)[:, :k]
    return tuple(np.take_along_axis(array, order, 1) for array in (rows, cosines, scores))
