"""Vectors in; their positions on a t-SNE map out.

L. van der Maaten and G. Hinton, JMLR 9 (2008) 2579. All pairs of the points are computed, in blocks that stay
in the processor's cache. For the report's 1000 points this takes a fraction of the time of scikit-learn:
its approximation is for more, and its import alone takes as long (benchmarks/README.md).
"""

from __future__ import annotations

import numpy as np
from threadpoolctl import threadpool_limits

DIMENSION = 50  # that PCA leaves
PERPLEXITY = 30.0  # about how many neighbours a point has
EXAGGERATED, STEPS = 100, 350  # steps with attraction × EXAGGERATION, and all steps
EXAGGERATION = 12.0
BLOCK = 128  # rows


# On a busy machine threads that wait for each other take ten times as long as one.
@threadpool_limits.wrap(limits=1)
def tsne(vectors: np.ndarray) -> np.ndarray:
    """Reduce vectors (points, dimension) to (points, 2) by PCA to 50 dimensions, then t-SNE.

    It begins with the first two components instead of random positions, as Kobak and Berens (2019) advise.
    """
    reduced = pca(vectors, DIMENSION)
    p = affinities(squared_distances(reduced), min(PERPLEXITY, (len(vectors) - 1) / 3)).astype(np.float32)
    positions = np.zeros((len(vectors), 2), np.float32)
    positions[:, : reduced.shape[1]] = reduced[:, :2] / max(reduced[:, 0].std(), 1e-12) * 1e-4
    velocity, gains = np.zeros_like(positions), np.ones_like(positions)
    rate = max(len(vectors) / EXAGGERATION / 4, 50)
    for step in range(STEPS):
        early = step < EXAGGERATED
        slope = gradient(p, positions, EXAGGERATION if early else 1)
        gains = np.where(slope * velocity < 0, gains + 0.2, gains * 0.8).clip(0.01)
        velocity = (0.5 if early else 0.8) * velocity - rate * gains * slope
        positions = positions + velocity
    return positions


def gradient(p: np.ndarray, positions: np.ndarray, exaggeration: float = 1) -> np.ndarray:
    """Return ∂KL(p‖q) / ∂y = 4 Σ_j (p_ij − q_ij) k_ij (y_i − y_j), (points, 2), at the positions y.

    k_ij = 1 / (1 + |y_i − y_j|²), and q is k / Σ k without the pairs of a point with itself.
    """
    lengths, ones = (positions**2).sum(1, keepdims=True), np.ones((len(positions), 1), positions.dtype)
    left = np.hstack([-2 * positions, lengths + 1, ones])  # left_i · right_j = 1 + |y_i − y_j|²
    right = np.hstack([positions, ones, lengths])
    with_one = np.hstack([positions, ones])  # k @ with_one = Σ_j k_ij y_j and Σ_j k_ij
    pull, push, total = np.empty_like(with_one), np.empty_like(with_one), -float(len(positions))
    for start in range(0, len(positions), BLOCK):
        rows = slice(start, start + BLOCK)
        k = 1 / (left[rows] @ right.T)
        total += float(k.sum())
        pull[rows], push[rows] = (k * p[rows]) @ with_one, (k * k) @ with_one
    force = exaggeration * pull - push / total
    return 4 * (force[:, 2:] * positions - force[:, :2])


def pca(vectors: np.ndarray, dimension: int) -> np.ndarray:
    """Project vectors (points, d) on their first principal components: (points, at most `dimension`)."""
    centred = vectors - vectors.mean(0)
    if len(vectors) >= vectors.shape[1]:
        _, directions = np.linalg.eigh(centred.T @ centred)  # ascending
        return centred @ directions[:, ::-1][:, :dimension]
    values, directions = np.linalg.eigh(centred @ centred.T)  # smaller, with the same projections
    return (directions * np.sqrt(values.clip(0)))[:, ::-1][:, :dimension]


def squared_distances(points: np.ndarray) -> np.ndarray:
    """Return |a − b|² of all pairs of rows, (points, points)."""
    lengths = (points**2).sum(1)
    return (lengths[:, None] + lengths - 2 * points @ points.T).clip(0)


def affinities(squared: np.ndarray, perplexity: float) -> np.ndarray:
    """Return p of all pairs, which add up to 1, from their squared distances (points, points).

    Each point's Gaussian is as narrow as makes its neighbours' entropy log(perplexity), found by bisection.
    """
    others = np.where(np.eye(len(squared), dtype=bool), np.inf, squared)
    others = others - others.min(1, keepdims=True)  # changes no share, and exp stays above 0
    neighbours = min(len(squared) - 1, int(3 * perplexity) + 1)  # further points have p ≈ 0
    near = np.sort(others, axis=1)[:, :neighbours]
    low, high = np.zeros(len(squared)), np.full(len(squared), np.inf)
    precision = 1 / np.maximum(near.mean(1), 1e-12)  # 1 / 2σ²
    for _ in range(50):
        shares = np.exp(-near * precision[:, None])
        shares /= shares.sum(1, keepdims=True)
        entropy = -(shares * np.log(np.maximum(shares, 1e-300))).sum(1)
        wide = entropy > np.log(perplexity)
        low, high = np.where(wide, precision, low), np.where(wide, high, precision)
        precision = np.where(np.isinf(high), 2 * precision, (low + high) / 2)
    p = np.exp(-others * precision[:, None])
    p /= p.sum(1, keepdims=True)
    return (p + p.T) / (2 * len(squared))
