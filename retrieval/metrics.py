"""A ranking of labelled images in; its metrics, such as top-k and the score, with 95 % intervals, out.

The label of an image is the first folder of its name, so a ranking carries its own answer key.
"""

from __future__ import annotations

import logging
from collections import Counter
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

UNSCORED = "set neither --custom_dataset nor --server_url local"  # how a run does without labels
FEW_IDENTITIES = 20  # fewer labels are classes, and resampling so few would tell nothing

log = logging.getLogger("retrieval.metrics")


def are_labelled(queries: Iterable[str], gallery: Iterable[str]) -> bool:
    """Return whether every query has a label, some gallery images have one, and the labels differ.

    If all images had one label, as in query/images/ and gallery/images/, any ranking would score 1000.
    """
    of_queries, of_gallery = {label_of(name) for name in queries}, {label_of(name) for name in gallery}
    return None not in of_queries and of_gallery != {None} and len(of_queries | of_gallery) > 1


def require_labels(queries: list[ImageFile], gallery: list[ImageFile], otherwise: str = UNSCORED) -> None:
    """Raise InputError unless the images are labelled; `otherwise` says how to do without."""
    if not are_labelled((image.name for image in queries), (image.name for image in gallery)):
        unlabelled = [str(image.path) for image in [*queries, *gallery] if label_of(image.name) is None]
        raise InputError(
            f"a score needs class folders, but {_why_unlabelled(unlabelled)}: lay the images out as "
            f"QUERY_DIR/<class>/x.jpg and GALLERY_DIR/<class>/x.jpg, or {otherwise}"
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


def _standard_interval(values: np.ndarray) -> list[float]:
    """Return mean ± 1.96 standard errors: as the bootstrap's, at once also where many values differ."""
    error = 1.959964 * float(values.std(ddof=1)) / sqrt(len(values))
    mean = float(values.mean())
    return [max(0.0, mean - error), min(1.0, mean + error)]


class Hits(NamedTuple):
    """The ranked images that are right, and how many there are."""

    right: np.ndarray  # (queries, ranked) bool, best first: whether each ranked image is right
    total: np.ndarray  # (queries,) int: the right images in the gallery, R of the papers

    @property
    def first(self) -> np.ndarray:
        """Return the rank of each query's first right image, from 1; 0 where no ranked image is right.

        >>> Hits(np.array([[False, True, True], [False] * 3]), np.array([5, 5])).first.tolist()
        [2, 0]
        """
        return np.where(self.right.any(1), self.right.argmax(1) + 1, 0)

    @property
    def ranked(self) -> int:
        """Return how many images are ranked for each query."""
        return self.right.shape[1]


class Metric(NamedTuple):
    """A mean over the queries of what each earns by its hits and top_k."""

    values: Callable[[Hits, int], np.ndarray]  # (queries,)
    best: float = 1.0  # the value of a query whose ranking is perfect
    interval: Callable[[np.ndarray], list[float]] = _standard_interval  # where values are not just 0 and 1


def _interval(values: np.ndarray, metric: Metric) -> list[float]:
    """Return Wilson's interval of a share, where values are 0 or 1, and otherwise the metric's own.

    If all values are equal, the metric's own has no width. Wilson's for mean / best is then wide enough:
    values from 0 to 1 with the mean p have a variance of at most p (1 − p), that of a share.
    """
    if len(set(values)) > 1 and not set(values) <= {0, 1}:
        return metric.interval(values)
    share = float(values.sum()) / metric.best
    return [metric.best * bound for bound in wilson_interval(share, len(values))]


def right(first: np.ndarray, cut: int) -> np.ndarray:
    """Return whether each query has a right image among its first `cut`."""
    return (first > 0) & (first <= cut)


def points_of(first: np.ndarray) -> np.ndarray:
    """Return what each query earns, 0 to 1000, by the rank of its first right image; 0: none.

    >>> points_of(np.array([1, 4, 10, 0])).tolist()
    [1000, 400, 100, 0]
    """
    return sum(value * right(first, cut) for cut, value in POINTS.items())


def reciprocal_rank(hits: Hits, _: int) -> np.ndarray:
    """Return 1 / the rank of each query's first right image, 0 where none is ranked: Voorhees, TREC-8, 1999.

    >>> reciprocal_rank(Hits(np.array([[False, True, True], [False] * 3]), np.array([5, 5])), 10).tolist()
    [0.5, 0.0]
    """
    return hits.right.any(1) / np.maximum(1, hits.first)


def precision(hits: Hits, cut: int) -> np.ndarray:
    """Return the share of right images among the first `cut` of each query.

    >>> precision(Hits(np.array([[True, False, True, True]]), np.array([3])), 4).tolist()
    [0.75]
    """
    return hits.right[:, :cut].sum(1) / cut


def average_precision(hits: Hits, cut: int | np.ndarray) -> np.ndarray:
    """Return AP@cut = Σ P(i) · rel(i) / min(R, cut) over the ranks i ≤ cut; `cut` may be (queries,).

    P(i) is the precision among the first i, rel(i) is 1 where the image at rank i is right, and R counts the
    right images in the gallery. As T. Weyand et al., Google Landmarks Dataset v2, CVPR 2020.

    >>> hits = Hits(np.array([[True, False, True, True]]), np.array([3]))
    >>> average_precision(hits, 4).round(4).tolist()  # (1/1 + 2/3 + 3/4) / 3
    [0.8056]
    """
    ranks = np.arange(1, hits.ranked + 1)
    counted = hits.right & (ranks <= np.reshape(cut, (-1, 1)))  # (queries, ranked)
    precisions = hits.right.cumsum(1) / ranks
    return (precisions * counted).sum(1) / np.maximum(1, np.minimum(hits.total, cut))


def average_precision_at_r(hits: Hits, _: int) -> np.ndarray:
    """Return AP@R: K. Musgrave, S. Belongie, S.-N. Lim, A Metric Learning Reality Check, ECCV 2020.

    R counts the right images in the gallery, but no more than are ranked: beyond these, nothing is known.

    >>> hits = Hits(np.array([[True, False, True, True]]), np.array([3]))
    >>> average_precision_at_r(hits, 10).round(4).tolist()  # (1/1 + 2/3) / 3: rank 4 lies beyond R
    [0.5556]
    """
    return average_precision(hits, np.minimum(hits.total, hits.ranked))


METRICS = {
    **{f"top_{cut}": Metric(lambda hits, _, cut=cut: right(hits.first, cut)) for cut in CUTS},
    "top_k": Metric(lambda hits, k: right(hits.first, k)),
    "score": Metric(lambda hits, _: points_of(hits.first), sum(POINTS.values()), _mean_interval),
    "map_at_k": Metric(average_precision),
    "map_at_r": Metric(average_precision_at_r),
    "mrr": Metric(reciprocal_rank),
    "precision_at_k": Metric(precision),
}
# The metrics that tell more than the rank of the first right image, with their titles.
MORE = {"map_at_k": "mAP@k", "map_at_r": "MAP@R", "mrr": "MRR", "precision_at_k": "precision@k"}


def _values(hits: Hits, top_k: int) -> dict[str, np.ndarray]:
    """Return each metric's values of the queries, (queries,)."""
    return {name: metric.values(hits, top_k) for name, metric in METRICS.items()}


def _metrics(values: dict[str, np.ndarray], rows: np.ndarray | slice = slice(None)) -> dict:
    """Return the metrics of some queries, the rows of the values, with their intervals."""
    metrics: dict = {"queries": len(values["score"][rows])}
    for name, of_queries in values.items():
        metrics[name] = float(of_queries[rows].mean())
        metrics[f"{name}_interval"] = _interval(of_queries[rows], METRICS[name])
    return metrics


# ---- from a ranking to its metrics ----------------------------------------------------------------


def measure(ranking: Ranking, queries: Embeddings, gallery: Embeddings, top_k: int = 10) -> dict:
    """Return the counts of images and, where they are labelled, the metrics that `score` returns."""
    counts = {"queries": len(queries.names), "gallery_images": len(gallery.names), "k": top_k}
    counts |= {"unreadable_queries": queries.unreadable, "unreadable_gallery_images": gallery.unreadable}
    counts |= {"damaged_queries": queries.damaged, "damaged_gallery_images": gallery.damaged}
    if queries.without_face is not None:
        counts["queries_without_face"] = len(queries.without_face)
        counts["gallery_images_without_face"] = len(gallery.without_face)
    return counts | (score(ranking, top_k) if are_labelled(ranking.queries, ranking.gallery) else {})


def score(ranking: Ranking, top_k: int = 10) -> dict:
    """Return the metrics of a ranking of labelled images, each with its 95 % interval, and log them.

    They are top_1, top_3, top_5, top_10 and top_k, the shares of queries (0 to 1) with a right image among
    the first 1, 3, 5, 10 and `top_k`; the competition's score (0 to 1000); map_at_k and precision_at_k, with
    `top_k` as k; map_at_r and mrr, over all ranked images; and the same per_class. A query whose class the
    gallery lacks counts as a miss. Raises InputError where the images have no labels.
    """
    if not are_labelled(ranking.queries, ranking.gallery):
        unlabelled = [name for name in [*ranking.queries, *ranking.gallery] if label_of(name) is None]
        raise InputError(f"a score needs class folders, but {_why_unlabelled(unlabelled)}: lay "
                         "the images out as <class>/x.jpg in the query and the gallery folder")  # fmt: skip
    labels = np.array([label_of(query) for query in ranking.queries], dtype=object)
    hits = hits_of(ranking)
    misses = int((hits.total == 0).sum())
    if misses:
        without = sorted(set(labels[hits.total == 0]))
        log.warning("%d queries count as misses, since the gallery lacks their classes: %s",
                    misses, ", ".join(without[:10]))  # fmt: skip
    values = _values(hits, top_k)
    metrics = _metrics(values)
    shares = [f"top-{cut} {metrics[f'top_{cut}']:.3f}" for cut in CUTS]
    if top_k not in CUTS:
        shares.append(f"top-{top_k} {metrics['top_k']:.3f}")
    log.info("%s · score %.1f of 1000 (95 %%: %.0f to %.0f, %d queries)", " · ".join(shares),
             metrics["score"], *metrics["score_interval"], len(labels))  # fmt: skip
    per_class = {label: _metrics(values, labels == label) for label in sorted(set(labels))}
    cut = {"queries_with_r_cut": int((hits.total > hits.ranked).sum())}
    return {"queries_without_match": misses} | cut | metrics | {"per_class": per_class}


def metrics_of(ranking: Ranking, itself: int = 0) -> dict:
    """Return the metrics of labelled images, and the `points` of each query, whose mean is the score.

    The k of the metrics is the number of ranked images. `itself` is as for hits_of.
    """
    hits = hits_of(ranking, itself)
    return _metrics(_values(hits, top_k=hits.ranked)) | {"points": points_of(hits.first).tolist()}


def hits_of(ranking: Ranking, itself: int = 0) -> Hits:
    """Return which ranked images have their query's label, and how many gallery images have it.

    `itself` is 1 if the gallery also holds each query, which is not ranked and does not count. Nor do the
    images that the ranking excludes.
    """
    labels = np.array([label_of(name) for name in ranking.gallery], dtype=object)
    wanted = [label_of(query) for query in ranking.queries]
    counts = Counter(labels.tolist())
    total = np.array([counts[label] - itself for label in wanted])
    right = labels[ranking.rows] == np.array(wanted, dtype=object)[:, None]
    for query, rows in ranking.excluded.items():
        total[query] -= (labels[rows] == wanted[query]).sum()
        right[query] &= ~np.isin(ranking.rows[query], rows)
    return Hits(right, total)


def first_hits(ranking: Ranking) -> list[int]:
    """Return the rank of each query's first right image, from 1; 0 where no ranked image is right."""
    return hits_of(ranking).first.tolist()


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


def independent(labels: list[str]) -> list:
    """Return what a bootstrap draws for each query: its identity, or itself where labels are few classes.

    >>> independent(["a", "b", "a"])
    [0, 1, 2]
    """
    return labels if len(set(labels)) >= FEW_IDENTITIES else list(range(len(labels)))


def compare_identities(
    points: np.ndarray, with_points: np.ndarray, owners: list, tests: int = 1, samples: int = 10_000
) -> tuple[float, list[float]]:
    """Do as compare, but draw owners: the points of one owner, such as a person, are right or wrong together.

    `owners` has the owner of each entry of the points. The interval is at 95 %, or higher if this is one of
    several `tests` (Bonferroni).

    >>> compare_identities(np.array([1000, 1000, 0, 0]), np.zeros(4), ["a", "a", "b", "b"])
    (500.0, [0.0, 1000.0])
    """
    difference = np.array(points, dtype=float) - np.array(with_points, dtype=float)
    _, owners = np.unique(owners, return_inverse=True)
    sums = np.stack([np.bincount(owners, difference), np.bincount(owners)], axis=1)  # (owners, 2)
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
