"""The results of a run in; what the page's script shows of them, as values for JSON, out."""

from __future__ import annotations

from typing import Any

import numpy as np

from get_images import label_of
from retrieval.records import UNREADABLE
from retrieval.report.results import Results
from retrieval.report.thumbnails import encoded_thumbnails

SHOWN = 10  # matches of a query
MOST_THUMBNAILS = 24_000  # in the page; further images are only named
# How many thumbnails → pixels of their longer side: together they stay below 10 MB.
SIDES = {3000: 96, 8000: 64, 14_000: 48, MOST_THUMBNAILS: 32}


class Matches:
    """The first SHOWN matches of each query: their rows, their cosines, and whether they are right."""

    def __init__(self, results: Results) -> None:
        # (queries, shown): rows of the gallery, and their cosines
        self.rows = results.ranking.rows[:, :SHOWN]
        cosines = results.ranking.cosines[:, :SHOWN]
        unreadable = cosines == UNREADABLE
        self.cosines = np.where(unreadable, 0, cosines)
        scores = self.cosines  # what the matches are ordered by
        if results.ranking.scores is not None:
            scores = results.ranking.scores[:, :SHOWN]
            scores = np.where(unreadable, scores[~unreadable].min(), scores)
        # (queries,): the rank of the first right match, 0 if unknown
        self.first = np.array(results.first)
        # (queries,): by how much the first match's score exceeds that of the best match of another class
        others = np.ones_like(self.rows, bool)
        if results.labelled:
            labels = np.array([label_of(name) or "" for name in results.gallery_vectors.names], dtype=object)
            others = labels[self.rows] != labels[self.rows[:, :1]]
        others[:, 0], others[:, -1] = False, True
        self.margin = scores[:, 0] - np.where(others, scores, -np.inf).max(axis=1)
        unreadable = set(results.metrics["unreadable_queries"])  # with --fuse: by all networks
        self.embedded = np.array([name not in unreadable for name in results.ranking.queries])


def page_data(results: Results, matches: Matches, points: list[list[int]]) -> dict[str, Any]:
    """Return what report.js reads. An image is given by its row: first the queries, then the gallery.

    `points` are the rows behind the marks of the map.
    """
    images = [*results.queries, *results.gallery]
    queries = len(results.queries)
    used = dict.fromkeys(range(queries))
    used |= dict.fromkeys((matches.rows + queries).ravel().tolist())
    used |= dict.fromkeys(row for rows in points for row in rows)
    drawn = list(used)[:MOST_THUMBNAILS]
    side = next(side for count, side in SIDES.items() if len(drawn) <= count)
    pictures = dict(zip(drawn, encoded_thumbnails([images[row] for row in drawn], side), strict=True))
    classes = sorted({label_of(images[row].name) or "" for row in used})
    class_of = {label: number for number, label in enumerate(classes)}
    return {
        "labelled": results.labelled,
        "classes": classes,
        "names": {row: images[row].name for row in used},
        "labels": {row: class_of[label_of(images[row].name) or ""] for row in used},
        "pictures": pictures,
        "matches": (matches.rows + queries).tolist(),
        "cosines": matches.cosines.round(3).tolist(),
        "first": matches.first.tolist(),
        "margin": matches.margin.round(4).tolist(),
        "embedded": matches.embedded.tolist(),
        "random": np.random.default_rng(0).permutation(queries).tolist(),
        "points": points,
    }
