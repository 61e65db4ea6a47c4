"""A ranking and the vectors it was made of in; whether they tell images apart, out.

A network that gives all images nearly one vector (weights that were loaded wrongly, a training that diverged)
still fills a submission, which the server accepts and scores with 0.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from retrieval.records import Embeddings, Ranking, chunks, rows_of_chunk

SAME = 0.5  # share of the queries with the same images
CLOSE = 1 - 1e-5  # mean cosine: what is left beyond are rounding errors
QUERIES, GALLERY = 4, 20  # fewer images may well have the same nearest ones


def spread_of(ranking: Ranking, queries: Embeddings) -> dict[str, Any]:
    """Return how far a ranking tells images apart, for metrics.json.

    `mean_cosine` is that of two queries, which every process has; `same_images` the share of the queries that
    get the most frequent list; `spread` the median over the queries of the first cosine less the last;
    `collapsed` whether the ranking is of no use.
    """
    readable = (ranking.cosines != 0).any(1)  # the other queries have the gallery in its order
    lists = Counter(map(tuple, ranking.rows[readable, :10].tolist()))
    same = lists.most_common(1)[0][1] / len(ranking.queries)
    cosine = mean_cosine(queries.vectors)
    many = len(ranking.queries) >= QUERIES and len(ranking.gallery) >= GALLERY
    spread = float(np.median(ranking.cosines[:, 0] - ranking.cosines[:, -1]))
    collapsed = many and (same >= SAME or cosine >= CLOSE)
    return {"mean_cosine": cosine, "same_images": same, "spread": spread, "collapsed": collapsed}


def in_words(spread: dict[str, Any]) -> str:
    """Return why a ranking is of no use, and what to look at."""
    return (
        f"the network hardly tells these images apart: {100 * spread['same_images']:.0f} % of the queries "
        f"get the same images, and the mean cosine of two queries is {spread['mean_cosine']:.5f}. Its "
        "weights were loaded wrongly, its training diverged, or the images show nothing (--save_crops shows "
        "them)"
    )


def mean_cosine(vectors: np.ndarray) -> float:
    """Return the mean cosine of two different rows; rows of zeros count as unlike all others.

    >>> mean_cosine(np.array([[1.0, 0], [1, 0], [0, 1]])).__round__(3)
    0.333
    """
    total, squares = np.zeros(vectors.shape[1]), 0.0
    for _, chunk in chunks(vectors, rows_of_chunk(vectors)):
        total += chunk.sum(0, dtype=np.float64)
        squares += float((chunk.astype(np.float64) ** 2).sum())
    count = len(vectors)
    return float((total @ total - squares) / max(1, count * (count - 1)))
