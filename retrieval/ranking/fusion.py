"""The embeddings of several runs and a weight for each in; one ranking by their fused similarities out.

    fused(q, g) = Σ w_r · n_r(q, g) / Σ w_r

n_r are the cosines of run r, normalised for each query over the whole gallery, and r are the runs that could
read both images. Raw cosines of unlike networks are never added: a network whose cosines lie between 0.9 and
1 would have no say beside one that uses the whole range.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

from get_images import label_of
from retrieval.records import UNREADABLE, Embeddings, Ranking, chunks, readable_rows, rows_of_chunk, zero_rows

BLOCK = 2**23  # similarities of all runs in memory at a time: 64 MiB, or 300 with what is made of them
DIGITS = 12  # of similarities: equal ones stay equal, in whatever order a library adds their terms

Normalisation = Literal["min-max", "z-score", "rank"]


class RunVectors(NamedTuple):
    """The embeddings of one run. All runs of a fusion have the same names in the same order."""

    queries: Embeddings
    gallery: Embeddings


# ---- normalisation: cosines (queries, images) to numbers that runs have in common -------------------


def min_max(cosines: np.ndarray) -> np.ndarray:
    """Map each query's cosines to 0 … 1: (c − min) / (max − min).

    >>> min_max(np.array([[0.2, 0.4, 0.3]])).round(3)
    array([[0. , 1. , 0.5]])
    """
    low, high = cosines.min(1, keepdims=True), cosines.max(1, keepdims=True)
    return (cosines - low) / np.where(high > low, high - low, 1)


def z_score(cosines: np.ndarray) -> np.ndarray:
    """Map each query's cosines to mean 0 and standard deviation 1: (c − mean) / deviation.

    >>> z_score(np.array([[0.5, 1.0, 0.0]])).round(3)
    array([[ 0.   ,  1.225, -1.225]])
    """
    deviation = cosines.std(1, keepdims=True)
    return (cosines - cosines.mean(1, keepdims=True)) / np.where(deviation > 0, deviation, 1)


def rank_share(cosines: np.ndarray) -> np.ndarray:
    """Map each cosine to the share of the query's images with a lower one.

    >>> rank_share(np.array([[0.2, 0.4, 0.2, 0.3]]))
    array([[0.  , 0.75, 0.  , 0.5 ]])
    """
    lower = [np.searchsorted(np.sort(row), row) for row in cosines]
    return np.array(lower) / cosines.shape[1]


NORMALISATIONS: dict[Normalisation, Callable[[np.ndarray], np.ndarray]] = {
    "min-max": min_max,
    "z-score": z_score,
    "rank": rank_share,
}


# ---- the weighted sum -------------------------------------------------------------------------------


def fuse(
    runs: list[RunVectors], weights: list[float], k: int = 10, normalisation: Normalisation = "min-max"
) -> Ranking:
    """Rank the k images with the highest fused similarity for each query; all images of a smaller gallery.

    `cosines` of the returned ranking are the fused similarities. Equal ones keep the gallery's order. A run
    has no say where it could not read the query or the image. An image that no run with a weight could read
    comes last, with UNREADABLE, and such a query gets the gallery in its order.
    """
    used = [(run, weight) for run, weight in zip(runs, weights, strict=True) if weight > 0]
    runs, weights = [run for run, _ in used], [weight for _, weight in used]
    queries, gallery = runs[0].queries.names, runs[0].gallery.names
    lost = np.zeros(len(gallery), bool)
    lost[unreadable_by_all([run.gallery for run in runs])] = True
    shape = len(queries), min(k, len(gallery))
    rows, fused = np.empty(shape, np.int64), np.empty(shape)
    for part, similarities in blocks(runs, normalisation):
        scores = weighted_mean(similarities, weights)
        scores[np.isnan(scores).all(1)] = np.where(lost, np.nan, 0)
        scores[np.isnan(scores)] = -np.inf
        rows[part] = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        fused[part] = np.take_along_axis(scores, rows[part], 1)
    fused[fused == -np.inf] = UNREADABLE
    return Ranking(queries, gallery, rows, fused)


def unreadable_by_all(embeddings: Sequence[Embeddings]) -> list[int]:
    """Return the rows of the images that no run could read."""
    return sorted(set.intersection(*(set(zero_rows(run.vectors).tolist()) for run in embeddings)))


def names_unreadable_by_all(embeddings: Sequence[Embeddings]) -> list[str]:
    """Return the names of the images that no run could read."""
    return [embeddings[0].names[row] for row in unreadable_by_all(embeddings)]


def in_words(names: list[str], weights: list[float]) -> str:
    """Return a mix of networks in words.

    >>> in_words(["dlib", "resnet50", "clip"], [0.7, 0, 0.3])
    '0.7 dlib + 0.3 clip'
    """
    return " + ".join(f"{weight:.3g} {name}" for name, weight in zip(names, weights, strict=True) if weight)


def weighted_mean(similarities: list[np.ndarray], weights: list[float]) -> np.ndarray:
    """Return Σ w_r · n_r / Σ w_r over the runs r whose n_r (queries, images) is not NaN; NaN if all are.

    >>> weighted_mean([np.array([[1.0, 0.5]]), np.array([[0.0, np.nan]])], [3, 1])
    array([[0.75, 0.5 ]])
    """
    total, weight_of = np.zeros(similarities[0].shape), np.zeros(similarities[0].shape)
    for normalised, weight in zip(similarities, weights, strict=True):
        known = ~np.isnan(normalised)
        np.add(total, weight * normalised, out=total, where=known)
        weight_of += weight * known
    mean = np.divide(total, weight_of, out=np.full(total.shape, np.nan), where=weight_of > 0)
    return mean.round(DIGITS)  # so that equal sums of other terms are ties


def blocks(runs: list[RunVectors], normalisation: Normalisation) -> Iterator[tuple[slice, list[np.ndarray]]]:
    """Yield some rows of queries at a time, and for each run their normalised cosines (queries, images).

    They are NaN where the run could not read the query or the image.
    """
    queries, images = len(runs[0].queries.names), len(runs[0].gallery.names)
    step = max(1, BLOCK // (images * len(runs)))
    for start in range(0, queries, step):
        part = slice(start, start + step)
        yield part, [_normalised(run, part, NORMALISATIONS[normalisation]) for run in runs]


def _normalised(run: RunVectors, part: slice, normalise: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Return the normalised cosines of some queries of a run, with NaN for unreadable images."""
    queries, gallery = run.queries.vectors[part].astype(np.float64), run.gallery.vectors
    cosines = np.empty((len(queries), len(gallery)))
    for start, some in chunks(gallery, rows_of_chunk(gallery)):
        cosines[:, start : start + len(some)] = queries @ some.astype(np.float64).T
    np.round(cosines, DIGITS, out=cosines)
    readable = readable_rows(gallery)  # these alone set minimum and mean
    normalised = np.full(cosines.shape, np.nan)
    normalised[:, readable] = normalise(cosines[:, readable])
    normalised[zero_rows(queries)] = np.nan
    return normalised


# ---- many mixes of labelled runs --------------------------------------------------------------------


def first_right(
    runs: list[RunVectors], mixes: list[list[float]], normalisation: Normalisation = "min-max"
) -> np.ndarray:
    """Return the rank of each query's first right image, from 1, for each mix of weights: (mixes, queries).

    0 means that no image is right, or that no run could read the query or a right image. The ranks are those
    of `fuse`, but without sorting the gallery, and the similarities are computed once for all mixes.
    """
    labels, others = (np.array([label_of(name) or "" for name in part.names]) for part in runs[0])
    first = np.zeros((len(mixes), len(labels)), np.int64)
    for part, similarities in blocks(runs, normalisation):
        right = labels[part, None] == others
        for row, mix in enumerate(mixes):
            first[row, part] = _rank_of_best(weighted_mean(similarities, mix), right)
    return first


def _rank_of_best(scores: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return the rank, from 1, of the highest of the right scores (queries, images) in each row; 0: none."""
    scores = np.where(np.isnan(scores), -np.inf, scores)
    best = np.where(right, scores, -np.inf).argmax(1)[:, None]  # the first of equal ones
    highest = np.take_along_axis(scores, best, 1)
    before = (scores == highest) & (np.arange(scores.shape[1]) < best)
    ranks = 1 + ((scores > highest) | before).sum(1)
    return np.where((right & (scores > -np.inf)).any(1), ranks, 0)
