"""A ranking in; the same first image, then images that would be right where the first ones are wrong, out.

The score asks whether any of the first 1, 5, 10 images is right. If rank 1 is right, ranks 2 to 10 earn
nothing more; if it is wrong, its look-alikes are wrong too. So they should show other identities.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np

from get_images import label_of
from retrieval.errors import InputError
from retrieval.records import UNREADABLE, Embeddings, Ranking, chunks, rows_of_chunk, zero_rows

SHORTLIST = 100  # images of a ranking from which cover chooses
PAIRS = 2**16  # of one label, and as many of two, to which a curve is fitted: more moved no score

log = logging.getLogger("retrieval.ranking")


@dataclass(frozen=True)
class Curve:
    """The logistic curve from the cosine c of two images to the probability that they show one identity.

    log(P / (1 − P)) = slope · (c − mean) / std + intercept. The slope is not negative.

    >>> float(Curve(mean=0.5, std=0.1, slope=2.0, intercept=0.0).probability(0.5))
    0.5
    """

    mean: float
    std: float
    slope: float
    intercept: float

    def log_odds(self, cosines: np.ndarray) -> np.ndarray:
        """Return log(P / (1 − P)) of each cosine."""
        return self.slope * (cosines - self.mean) / self.std + self.intercept

    def probability(self, cosines: np.ndarray) -> np.ndarray:
        """Return the probability P, 0 to 1, of each cosine."""
        return np.exp(-np.logaddexp(0, -self.log_odds(cosines)))


def cover(
    ranking: Ranking, gallery: Embeddings, curve: Curve, k: int = 10, shortlist: int = SHORTLIST
) -> Ranking:
    """Choose k of each query's first `shortlist` images, one after another, to cover many identities.

    Let p_j be the probability that the query and image j show one identity, and r_js that images j and s do.
    If j is right, a chosen image s is right too with the probability r_js. So j is right, and none of the
    chosen images is, with the probability p_j · Π_s (1 − r_js): that is what j adds to the expected coverage,
    the probability that any chosen image is right. The first image stays; next comes, each time, the image
    that adds most. Chen and Karger (Less is More, SIGIR 2006) rank text so; Carbonell and Goldstein (SIGIR
    1998) subtract the similarity to what is chosen.

    Ties keep the order of the ranking, unreadable images come last, and an unreadable query keeps the gallery
    in its order. The cosines of the result are in its order, so they no longer fall along a row. Memory:
    40 bytes · queries · shortlist, and CHUNK_BYTES for the vectors of some shortlists at a time.
    """
    rows, cosines = ranking.rows[:, :shortlist], ranking.cosines[:, :shortlist]
    k = min(k, rows.shape[1])
    gains = -np.logaddexp(0, -curve.log_odds(cosines))  # log p: a product of small numbers would become 0
    gains[cosines == UNREADABLE] = np.finfo(float).min  # below every sum, and above what is chosen already
    order = np.zeros((len(rows), k), np.int64)
    for start, some in chunks(rows, max(1, rows_of_chunk(gallery.vectors) // max(1, rows.shape[1]))):
        part = slice(start, start + len(some))
        order[part] = _choose(gains[part], gallery.vectors[some], curve, k)
    order[(cosines[:, :1] == 0).all(axis=1)] = np.arange(k)  # an unreadable query has cosines of 0
    return Ranking(ranking.queries, ranking.gallery, np.take_along_axis(rows, order, 1),
                   np.take_along_axis(cosines, order, 1))  # fmt: skip


def _choose(gains: np.ndarray, vectors: np.ndarray, curve: Curve, k: int) -> np.ndarray:
    """Return which k images of each query's shortlist are chosen, in this order (queries, k), int64.

    `gains` (queries, shortlist) are log p_j, and are overwritten. `vectors`: (queries, shortlist, dimension).
    """
    order, each = np.zeros((len(gains), k), np.int64), np.arange(len(gains))
    for place in range(1, k):
        last = order[:, place - 1]
        similar = np.einsum("qjd,qd->qj", vectors, vectors[each, last])  # equal vectors, equal bits: no BLAS
        gains -= np.logaddexp(0, curve.log_odds(similar))  # log(1 − r_js)
        gains[each, last] = -np.inf
        order[:, place] = gains.argmax(axis=1)  # the first of equal ones
    return order


# ---- the curve ------------------------------------------------------------------------------------


def fit_curve(labelled: Embeddings, seed: int = 0) -> Curve:
    """Fit the curve to pairs of labelled images, which may show other people than queries and gallery.

    It is a logistic regression on the standardised cosines (unscaled, its penalty would flatten the curve)
    of PAIRS pairs of one label and PAIRS of two, drawn with a seed. Each kind is weighted by its share of all
    pairs of the folder, so P is the probability for a pair drawn at random. With equal weights, P would be
    far too high where few pairs match, and images from the end of the shortlist would come forward.

    Raises InputError if no two readable images have one label, or if all have the same.
    """
    from sklearn.linear_model import LogisticRegression  # its import takes a second

    labels = np.array([label_of(name) or "" for name in labelled.names])
    rows = np.setdiff1d(np.flatnonzero(labels != ""), zero_rows(labelled.vectors))
    rows = rows[np.argsort(labels[rows], kind="stable")]
    _require_pairs(labels[rows])
    pairs, same, share = _draw_pairs(labels[rows], np.random.default_rng(seed))
    cosines = _cosines(labelled.vectors, *rows[pairs])
    mean, std = float(cosines.mean()), float(cosines.std())
    weights = 2 * np.where(same, share, 1 - share)
    regression = LogisticRegression().fit((cosines[:, None] - mean) / std, same, weights)
    slope, intercept = float(regression.coef_[0, 0]), float(regression.intercept_[0])
    log.info("fitted the probability of a match to %d images of %d classes, of whose pairs %.2f %% match",
             len(rows), len(set(labels[rows])), 100 * share)  # fmt: skip
    if slope <= 0:
        log.warning("images of one class are no more similar than others, so cover changes no ranking")
    return Curve(mean, std, max(0.0, slope), intercept)


def _cosines(vectors: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the cosines of pairs of unit vectors, given by their rows."""
    cosines, step = np.empty(len(first)), max(1, 2**17 // vectors.shape[1])
    for start in range(0, len(first), step):
        some = slice(start, start + step)
        cosines[some] = np.einsum("ij,ij->i", vectors[first[some]], vectors[second[some]])
    return cosines


def _require_pairs(labels: np.ndarray) -> None:
    """Raise InputError unless two images have one label, and two have different labels."""
    classes = len(set(labels))
    if classes < 2 or classes == len(labels):
        raise InputError(
            "the probability of a match is learnt from pairs of images of one class and of two classes, but "
            f"the {len(labels)} readable labelled images are of {classes} classes: lay them out as "
            "<class>/x.jpg, with two classes or more, and two images or more in some of them"
        )


def _draw_pairs(labels: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray, float]:
    """Draw PAIRS pairs of images with one label, then PAIRS pairs with two, with replacement.

    Return their rows (2, 2 · PAIRS), which of them have one label, and the share of these among all pairs.
    `labels` are sorted: the n images of a label have the rows start to start + n − 1.
    """
    images = len(labels)
    _, starts, sizes = np.unique(labels, return_index=True, return_counts=True)
    start, n = np.repeat(starts, sizes), np.repeat(sizes, sizes)  # of the label of each image
    alike, others = n - 1, images - n  # how many images can be the second of a pair
    i = random.choice(images, PAIRS, p=alike / alike.sum())
    j = start[i] + (i - start[i] + random.integers(1, n[i])) % n[i]
    a = random.choice(images, PAIRS, p=others / others.sum())
    b = (start[a] + n[a] + random.integers(others[a])) % images
    share = alike.sum() / (alike.sum() + others.sum())
    return np.array([np.r_[i, a], np.r_[j, b]]), np.repeat([True, False], PAIRS), float(share)
