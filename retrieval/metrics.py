"""A ranking of labelled images in; top-k accuracies and the competition's score, with 95 % intervals, out.

The label of an image is the first folder of its name, so a ranking carries its own answer key.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from math import sqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from get_images import ImageFile, label_of
from retrieval.errors import InputError
from retrieval.records import Embeddings, Ranking

CUTS = (1, 3, 5, 10)
POINTS = {1: 600, 5: 300, 10: 100}  # for a right image among the first 1, 5, 10: rank 1 earns all three

FEW_IDENTITIES = 20  # fewer labels are classes, and resampling so few would tell nothing

log = logging.getLogger("retrieval.metrics")


def are_labelled(queries: Iterable[str], gallery: Iterable[str]) -> bool:
    """Return whether every query has a label, some gallery images have one, and the labels differ.

    If all images had one label, as in query/images/ and gallery/images/, any ranking would score 1000.
    """
    of_queries, of_gallery = {label_of(name) for name in queries}, {label_of(name) for name in gallery}
    return None not in of_queries and of_gallery != {None} and len(of_queries | of_gallery) > 1


def require_labels(queries: list[ImageFile], gallery: list[ImageFile]) -> None:
    """Raise InputError unless the images are labelled."""
    if not are_labelled((image.name for image in queries), (image.name for image in gallery)):
        unlabelled = [str(image.path) for image in [*queries, *gallery] if label_of(image.name) is None]
        raise InputError(
            f"a score needs class folders, but {_why_unlabelled(unlabelled)}: lay the images out as "
            "QUERY_DIR/<class>/x.jpg and GALLERY_DIR/<class>/x.jpg, or set neither --custom_dataset nor "
            "--server_url local"
        )


def _why_unlabelled(images: list[str]) -> str:
    return f"{len(images)} images, such as {images[0]}, lie in none" if images else "all images lie in one"


# ---- the table of metrics -------------------------------------------------------------------------


def wilson_interval(hits: float, n: int, z: float = 1.959964) -> list[float]:
    """Return the 95 % interval of a share: E. B. Wilson, J. Am. Stat. Assoc. 22 (1927) 209.

    >>> [round(bound, 3) for bound in wilson_interval(8, 10)]
    [0.49, 0.943]
    """
    p = hits / n
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return [max(0.0, centre - half), min(1.0, centre + half)]


def _mean_interval(values: np.ndarray, samples: int = 10_000) -> list[float]:
    """Return the 2.5th and 97.5th percentile of the mean over queries drawn with replacement, seeded.

    Few different values occur, so a draw of queries is a multinomial draw of how often each value occurs.
    """
    different, counts = np.unique(values, return_counts=True)
    drawn = np.random.default_rng(0).multinomial(len(values), counts / len(values), size=samples)
    return np.percentile(drawn @ different / len(values), [2.5, 97.5]).tolist()


def _interval(values: np.ndarray, best: float) -> list[float]:
    """Return Wilson's interval of a share, where values are 0 or 1, and otherwise the bootstrap's.

    If all values are equal, the bootstrap's interval has no width. Wilson's for mean / best is then wide
    enough: values from 0 to 1 with the mean p have a variance of at most p (1 − p), that of a share.
    """
    if len(set(values)) > 1 and not set(values) <= {0, 1}:
        return _mean_interval(values)
    return [best * bound for bound in wilson_interval(float(values.sum()) / best, len(values))]


class Metric(NamedTuple):
    """A mean over the queries. `values` takes the rank of each query's first right image, and top_k."""

    values: Callable[[np.ndarray, int], np.ndarray]  # (queries,)
    best: float = 1.0  # the value of a query whose first match is right


def right(first: np.ndarray, cut: int) -> np.ndarray:
    """Return whether each query has a right image among its first `cut`."""
    return (first > 0) & (first <= cut)


def points_of(first: np.ndarray) -> np.ndarray:
    """Return what each query earns, 0 to 1000, by the rank of its first right image; 0: none.

    >>> points_of(np.array([1, 4, 10, 0])).tolist()
    [1000, 400, 100, 0]
    """
    return sum(value * right(first, cut) for cut, value in POINTS.items())


METRICS = {
    **{f"top_{cut}": Metric(lambda first, _, cut=cut: right(first, cut)) for cut in CUTS},
    "top_k": Metric(right),
    "score": Metric(lambda first, _: points_of(first), best=sum(POINTS.values())),
}


def _metrics(first: np.ndarray, top_k: int) -> dict:
    """Return the metrics of some queries, by the ranks of their first right images, with their intervals."""
    metrics: dict = {"queries": len(first)}
    for name, metric in METRICS.items():
        values = metric.values(first, top_k)
        metrics[name] = float(values.mean())
        metrics[f"{name}_interval"] = _interval(values, metric.best)
    return metrics


# ---- from a ranking to its metrics ----------------------------------------------------------------


def measure(ranking: Ranking, queries: Embeddings, gallery: Embeddings, top_k: int = 10) -> dict:
    """Return the counts of images and, where they are labelled, the metrics that `score` returns."""
    unreadable = {"unreadable_queries": queries.unreadable, "unreadable_gallery_images": gallery.unreadable}
    counts = {"queries": len(queries.names), "gallery_images": len(gallery.names), "k": top_k} | unreadable
    if queries.without_face is not None:
        counts["queries_without_face"] = len(queries.without_face)
        counts["gallery_images_without_face"] = len(gallery.without_face)
    return counts | (score(ranking, top_k) if are_labelled(ranking.queries, ranking.gallery) else {})


def score(ranking: Ranking, top_k: int = 10) -> dict:
    """Return the metrics of a ranking of labelled images, each with its 95 % interval, and log them.

    They are top_1, top_3, top_5, top_10 and top_k, the shares of queries (0 to 1) with a right image among
    the first 1, 3, 5, 10 and `top_k`; the competition's score (0 to 1000); and the same per_class. A query
    whose class the gallery lacks counts as a miss. Raises InputError where the images have no labels.
    """
    if not are_labelled(ranking.queries, ranking.gallery):
        unlabelled = [name for name in [*ranking.queries, *ranking.gallery] if label_of(name) is None]
        raise InputError(f"a score needs class folders, but {_why_unlabelled(unlabelled)}: lay "
                         "the images out as <class>/x.jpg in the query and the gallery folder")  # fmt: skip
    labels = np.array([label_of(query) for query in ranking.queries], dtype=object)
    without = sorted(set(labels) - {label_of(name) for name in ranking.gallery})
    misses = int(np.isin(labels, without).sum())
    if without:
        log.warning("%d queries count as misses, since the gallery lacks their classes: %s",
                    misses, ", ".join(without[:10]))  # fmt: skip
    first = np.array(first_hits(ranking))
    metrics = _metrics(first, top_k)
    shares = [f"top-{cut} {metrics[f'top_{cut}']:.3f}" for cut in CUTS]
    if top_k not in CUTS:
        shares.append(f"top-{top_k} {metrics['top_k']:.3f}")
    log.info("%s · score %.1f of 1000 (95 %%: %.0f to %.0f, %d queries)", " · ".join(shares),
             metrics["score"], *metrics["score_interval"], len(first))  # fmt: skip
    per_class = {label: _metrics(first[labels == label], top_k) for label in sorted(set(labels))}
    return {"queries_without_match": misses} | metrics | {"per_class": per_class}


def metrics_of(ranking: Ranking) -> dict:
    """Return the metrics of labelled images, and the `points` of each query, whose mean is the score."""
    first = np.array(first_hits(ranking))
    return _metrics(first, top_k=1) | {"points": points_of(first).tolist()}


def first_hits(ranking: Ranking) -> list[int]:
    """Return the rank of each query's first right image, from 1; 0 where no ranked image is right."""
    labels = [label_of(name) for name in ranking.gallery]
    return [first_hit(label_of(query), (labels[row] for row in best))
            for query, best in zip(ranking.queries, ranking.rows.tolist(), strict=True)]  # fmt: skip


def first_hit(label: str | None, ranked: Iterable[str | None]) -> int:
    """Return the rank of the first image with this label, from 1; 0 where there is none.

    >>> first_hit("a", ["b", "a", "a"]), first_hit("a", ["b"])
    (2, 0)
    """
    return next((rank for rank, other in enumerate(ranked, 1) if other == label), 0)


def compare(points: ArrayLike, with_points: ArrayLike) -> tuple[float, list[float]]:
    """Return the first score minus the second, of the same queries, and the 95 % interval of the difference.

    >>> compare([1000] * 8 + [300] * 2, [300] * 10)[0]
    560.0
    """
    difference = np.array(points) - np.array(with_points)
    return float(difference.mean()), _mean_interval(difference)


def compare_identities(
    points: np.ndarray, with_points: np.ndarray, labels: list[str], tests: int = 1, samples: int = 10_000
) -> tuple[float, list[float]]:
    """Do as compare, but draw identities, since the queries of one identity are right or wrong together.

    The interval is at 95 %, or higher if this is one of several `tests` (Bonferroni). With fewer than
    FEW_IDENTITIES labels, as with classes of scenes, queries are drawn.

    >>> compare_identities(np.array([1000, 1000, 0, 0]), np.zeros(4), ["a", "a", "b", "b"])[0]
    500.0
    """
    difference = np.array(points, dtype=float) - np.array(with_points, dtype=float)
    identities, owners = np.unique(labels, return_inverse=True)
    if len(identities) < FEW_IDENTITIES:
        owners = np.arange(len(labels))
    sums = np.stack([np.bincount(owners, difference), np.bincount(owners)], axis=1)  # (identities, 2)
    different, counts = np.unique(sums, axis=0, return_counts=True)
    drawn = np.random.default_rng(0).multinomial(counts.sum(), counts / counts.sum(), size=samples)
    totals, queries = (drawn @ different).T
    tail = 2.5 / tests
    return float(difference.mean()), np.percentile(totals / queries, [tail, 100 - tail]).tolist()


def competition_score(right_1: int, right_5: int, right_10: int, queries: int) -> float:
    """Return 600 · top-1 + 300 · top-5 + 100 · top-10, from how many queries are right within 1, 5 and 10.

    >>> competition_score(194, 229, 243, queries=300)
    698.0
    """
    return (600 * right_1 + 300 * right_5 + 100 * right_10) / queries
