"""Embeddings in; a ranking by neighbours that are each other's neighbours, k-reciprocal re-ranking, out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from retrieval.ranking.exact import cosines_of, rank
from retrieval.records import Embeddings, Ranking, readable_rows

if TYPE_CHECKING:
    from scipy.sparse import csr_array

TILE = 2**21  # distances in memory, of some queries and all gallery images: 16 MiB
DECIMALS = 12  # of a distance: the same images have the same one, though sums in float64 differ by rounding


def rank_by_reciprocals(
    queries: Embeddings,
    gallery: Embeddings,
    k: int = 10,
    k1: int = 20,
    k2: int = 6,
    lam: float = 0.3,
    device: Any = "cpu",
) -> Ranking:
    """Rank by the Jaccard distance of k-reciprocal neighbours, mixed with the distance of the vectors.

        d*(q, g) = (1 − λ) · d_J(q, g) + λ · d(q, g)      d(q, g) = ‖q − g‖² = 2 − 2 cos(q, g)

    The scores are −d*, with the cosines beside them. Neighbours are sought among queries and gallery images
    together, so the ranking of a query depends on the other queries. Equal scores keep the gallery's order.
    Unreadable gallery images come last, with a score of −∞; an unreadable query gets the gallery in its
    order. Memory holds the vectors four times. Zhong, Zheng, Cao and Li, Re-ranking person re-identification
    with k-reciprocal encoding, CVPR 2017, arXiv 1701.08398.
    """
    plain = rank(queries, gallery, k, device)  # it also places what is unreadable
    asked = readable_rows(queries.vectors)
    images = readable_rows(gallery.vectors)
    some = queries.some(asked), gallery.some(images)
    vectors = np.concatenate([part.vectors for part in some])
    weights = encode(Embeddings(some[0].names + some[1].names, vectors), k1, k2, device)
    of_queries, holders = weights[: len(asked)], weights[len(asked) :].T.tocsr()
    vectors = vectors.astype(np.float64)
    found = min(k, len(images))
    rows, cosines, scores = plain.rows, plain.cosines, plain.cosines.copy()
    scores[asked] = -np.inf
    for start in range(0, len(asked), step := max(1, TILE // len(images))):
        block = slice(start, min(start + step, len(asked)))
        squares = 2 - 2 * vectors[block] @ vectors[len(asked) :].T  # d
        distances = ((1 - lam) * jaccard(of_queries[block], holders) + lam * squares).round(DECIMALS)
        best = np.argsort(distances, axis=1, kind="stable")[:, :found]
        rows[asked[block], :found] = images[best]
        cosines[asked[block], :found] = 1 - np.take_along_axis(squares, best, 1) / 2
        scores[asked[block], :found] = -np.take_along_axis(distances, best, 1)
    return Ranking(queries.names, gallery.names, rows, cosines, scores)


def encode(images: Embeddings, k1: int, k2: int, device: Any = "cpu") -> csr_array:
    """Return V (images, images), the weights of each image's k-reciprocal neighbours; each row sums to 1.

        R(p, k)  = the images g among the k nearest of p that have p among their k nearest
        R*(p)    = R(p, k1), with each R(c, k1/2), c in R(p, k1), of which two thirds lie in R(p, k1)
        V(p, g)  = exp(−d(p, g)) for g in R*(p), else 0; then divided by the sum of the row
        V(p)     ← the mean of V over the k2 nearest of p

    An image is its own nearest, and is not counted among the k1.
    """
    from scipy.sparse import csr_array

    near = rank(images, images, max(k1 + 1, k2), device).rows
    wide, narrow = _reciprocal(near[:, : k1 + 1]), _reciprocal(near[:, : k1 // 2 + 1])
    shared = (wide @ narrow.T).multiply(wide).tocsr()  # (p, c): the size of R(p, k1) ∩ R(c, k1/2)
    shared.data = (3 * shared.data >= 2 * narrow.sum(axis=1)[shared.indices]).astype(int)
    star = (wide + shared @ narrow).tocsr()  # R*: where it is not 0
    star.eliminate_zeros()
    owners = np.repeat(np.arange(len(near)), np.diff(star.indptr))
    cosines = cosines_of(images.vectors, owners, images.vectors, star.indices)
    weights = csr_array((np.exp(2 * cosines - 2), star.indices, star.indptr), star.shape)
    weights.data /= weights.sum(axis=1)[owners]
    nearest = near[:, :k2]
    return (_sets(nearest) @ weights).tocsr() / nearest.shape[1]


def jaccard(of_queries: csr_array, holders: csr_array) -> np.ndarray:
    """Return the Jaccard distances of weights in rows that sum to 1: (queries, gallery images).

        d_J(q, g) = 1 − Σ min(V(q, j), V(g, j)) / Σ max(V(q, j), V(g, j))

    The smaller and the larger of two weights sum to both, so Σ max = 2 − Σ min. Row j of `holders`
    (images, gallery images) has the weights V(g, j) of all gallery images.
    """
    smaller = np.zeros((of_queries.shape[0], holders.shape[1]))
    for query, total in enumerate(smaller):
        own = slice(*of_queries.indptr[query : query + 2])
        others = holders[of_queries.indices[own]]
        limits = np.repeat(of_queries.data[own], np.diff(others.indptr))
        total += np.bincount(others.indices, np.minimum(others.data, limits), len(total))
    return 1 - smaller / (2 - smaller)


def _sets(rows: np.ndarray) -> csr_array:
    """Return sets of images (images, images), given by the rows of their members, as zeros and ones."""
    from scipy.sparse import csr_array

    ends = np.arange(len(rows) + 1) * rows.shape[1]
    return csr_array((np.ones(rows.size, int), rows.ravel(), ends), (len(rows), len(rows)))


def _reciprocal(near: np.ndarray) -> csr_array:
    """Return R (images, images) from the k nearest of each image (images, k)."""
    sets = _sets(near)
    return sets.multiply(sets.T).tocsr()
