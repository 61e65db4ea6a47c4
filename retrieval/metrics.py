"""A ranking and the labels in its names in; top-k accuracies and the competition's score out.

The label of an image is the first folder of its name, so a ranking carries its own answer key.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from math import sqrt

import numpy as np

from get_images import ImageFile, label_of
from retrieval.errors import InputError
from retrieval.records import Embeddings

CUTS = (1, 3, 5, 10)
POINTS = {1: 600, 5: 300, 10: 100}  # for a right image among so many: a hit at rank 1 earns all three

log = logging.getLogger("retrieval.metrics")


def are_labelled(queries: Iterable[str], gallery: Iterable[str]) -> bool:
    """Whether images of these names can be scored: each query has a label, and the gallery has some.

    One label for all, as in query/images/ and gallery/images/, is none: any ranking would score 1000.
    """
    of_queries, of_gallery = {label_of(name) for name in queries}, {label_of(name) for name in gallery}
    return None not in of_queries and of_gallery != {None} and len(of_queries | of_gallery) > 1


def require_labels(
    queries: list[ImageFile],
    gallery: list[ImageFile],
    asked: str = "--custom_dataset",
    instead: str = "--no-custom_dataset",
) -> None:
    """Raise InputError unless are_labelled: what asked for labels, and what to give instead."""
    if not are_labelled((image.name for image in queries), (image.name for image in gallery)):
        bare = [image.path for image in [*queries, *gallery] if label_of(image.name) is None]
        what = f"{len(bare)} images, such as {bare[0]}, lie in none" if bare else "all images lie in one"
        raise InputError(
            f"{asked} scores by class folders, but {what}: lay the images out as "
            f"QUERY_DIR/<class>/x.jpg and GALLERY_DIR/<class>/x.jpg, or give {instead}"
        )


def measure(ranking: dict[str, list[str]], queries: Embeddings, gallery: Embeddings, top_k: int = 10) -> dict:
    """Counts, and where there are labels the figures of the ranking, each with its 95 % interval.

    Figures: top_1, top_3, top_5, top_10 and top_k, shares of queries (0 to 1) with a right image among their
    first so many; the competition's score (0 to 1000); and the same per_class. Intervals are Wilson's for
    shares and bootstrap percentiles for scores. A query whose class the gallery lacks counts as a miss.
    """
    unreadable = {"unreadable_queries": queries.unreadable, "unreadable_gallery_images": gallery.unreadable}
    metrics = {"queries": len(queries.names), "gallery_images": len(gallery.names), "k": top_k} | unreadable
    if queries.without_face is not None:
        metrics["queries_without_face"] = len(queries.without_face)
        metrics["gallery_images_without_face"] = len(gallery.without_face)
    if not are_labelled(queries.names, gallery.names):
        return metrics
    labels = np.array([label_of(query) for query in ranking], dtype=object)
    without = sorted(set(labels) - {label_of(name) for name in gallery.names})
    metrics["queries_without_match"] = int(np.isin(labels, without).sum())
    if without:
        log.warning("%d queries count as misses, since the gallery lacks their classes: %s",
                    metrics["queries_without_match"], ", ".join(without[:10]))  # fmt: skip
    first = _first_hits(ranking)
    metrics |= _figures(first, top_k)
    metrics["per_class"] = {label: _figures(first[labels == label], top_k) for label in sorted(set(labels))}
    shares = [f"top-{cut} {metrics[f'top_{cut}']:.3f}" for cut in CUTS]
    if top_k not in CUTS:
        shares.append(f"top-{top_k} {metrics['top_k']:.3f}")
    log.info("%s · score %.1f of 1000 (95 %%: %.0f to %.0f, %d queries)", " · ".join(shares),
             metrics["score"], *metrics["score_interval"], len(first))  # fmt: skip
    return metrics


def figures_of(ranking: dict[str, list[str]]) -> dict:
    """The figures of a ranking of labelled images, each with its 95 % interval, as measure has them.

    And `points`, what each query earns: their mean is the score.
    """
    first = _first_hits(ranking)
    return _figures(first, top_k=1) | {"points": _points(first).tolist()}


def first_hits(ranking: dict[str, list[str]]) -> list[int]:
    """The rank of each query's first right image, from 1; 0 where it is not among those that are ranked.

    >>> first_hits({"a/1": ["b/1", "a/2"], "b/2": ["a/2", "a/3"]})
    [2, 0]
    """
    first = _first_hits(ranking)
    return np.where(np.isfinite(first), first, 0).astype(int).tolist()


def points_of(first: list[int]) -> list[int]:
    """What each query earns, 0 to 1000, from first_hits.

    >>> points_of([1, 4, 10, 0])
    [1000, 400, 100, 0]
    """
    return _points(np.where(np.array(first) > 0, first, np.inf)).tolist()


def compare(points: list[int], with_points: list[int]) -> tuple[float, list[float]]:
    """How much higher the first score is, of the same queries, and the 95 % interval of that.

    >>> compare([1000] * 8 + [300] * 2, [300] * 10)[0]
    560.0
    """
    difference = np.array(points) - np.array(with_points)
    return float(difference.mean()), _mean_interval(difference)


def _first_hits(ranking: dict[str, list[str]]) -> np.ndarray:
    return np.array([_first_hit(query, names) for query, names in ranking.items()])


def _first_hit(query: str, names: list[str]) -> float:
    """The rank of the first right image, from 1; infinity where there is none."""
    label = label_of(query)
    return next((rank for rank, name in enumerate(names, 1) if label_of(name) == label), np.inf)


def _figures(first: np.ndarray, top_k: int) -> dict:
    """first (queries,): the rank of each query's first hit → the figures of these queries."""
    figures: dict = {"queries": len(first)}
    for name, cut in [*((f"top_{cut}", cut) for cut in CUTS), ("top_k", top_k)]:
        hits = int((first <= cut).sum())
        figures[name] = hits / len(first)
        figures[f"{name}_interval"] = wilson_interval(hits, len(first))
    figures["score"] = competition_score(*(int((first <= cut).sum()) for cut in POINTS), queries=len(first))
    points = _points(first)
    figures["score_interval"] = _mean_interval(points) if len(set(points)) > 1 else _sum_of_intervals(first)
    return figures


def competition_score(right_1: int, right_5: int, right_10: int, queries: int) -> float:
    """600 · top-1 + 300 · top-5 + 100 · top-10, from the numbers of queries that are right within 1, 5, 10.

    >>> competition_score(194, 229, 243, queries=300)
    698.0
    """
    return (600 * right_1 + 300 * right_5 + 100 * right_10) / queries


def wilson_interval(hits: int, n: int, z: float = 1.959964) -> list[float]:
    """The 95 % interval of a share: E. B. Wilson, J. Am. Stat. Assoc. 22 (1927) 209.

    >>> [round(bound, 3) for bound in wilson_interval(8, 10)]
    [0.49, 0.943]
    """
    p = hits / n
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return [max(0.0, centre - half), min(1.0, centre + half)]


def _points(first: np.ndarray) -> np.ndarray:
    """What each query earns, 0 to 1000, by the rank of its first right image."""
    return sum(value * (first <= cut) for cut, value in POINTS.items())


def _sum_of_intervals(first: np.ndarray) -> list[float]:
    """An interval of the score from those of its shares: where all queries earn the same, none is drawn."""
    intervals = [wilson_interval(int((first <= cut).sum()), len(first)) for cut in POINTS]
    return [sum(points * interval[side] for points, interval in zip(POINTS.values(), intervals, strict=True))
            for side in (0, 1)]  # fmt: skip


def _mean_interval(points: np.ndarray, samples: int = 10_000) -> list[float]:
    """The 2.5th and 97.5th percentile of the mean over queries drawn with replacement, seeded.

    A query is worth one of a few numbers of points, so a drawn set of queries is a multinomial count of them.
    """
    values, counts = np.unique(points, return_counts=True)
    drawn = np.random.default_rng(0).multinomial(len(points), counts / len(points), size=samples)
    return np.percentile(drawn @ values / len(points), [2.5, 97.5]).tolist()
