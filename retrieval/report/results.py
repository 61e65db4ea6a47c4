"""The record of a finished run, and the sample of its images, which its page is drawn from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from get_images import ImageFile, label_of
from retrieval.backbones.backbone import Trained
from retrieval.metrics import are_labelled, first_hits
from retrieval.records import Embeddings, Ranking, ShardedEmbeddings

MOST_POINTS = 1000  # of the map


@dataclass(frozen=True)
class Sample:
    """The images of the map: their rows, of queries first and then of gallery images, and their vectors."""

    rows: np.ndarray  # (images,), ascending
    vectors: np.ndarray  # (images, dimension)


@dataclass(frozen=True)
class Results:
    """The results of a run: its images, their embeddings, the ranking and its metrics."""

    queries: list[ImageFile]
    gallery: list[ImageFile]
    query_vectors: Embeddings
    gallery_vectors: Embeddings | ShardedEmbeddings
    ranking: Ranking
    metrics: dict[str, Any]
    trained: Trained | None = None  # None: the network is not fine-tuned
    sample: Sample | None = None  # None: no report is wanted

    @cached_property
    def labelled(self) -> bool:
        """Whether labels tell which matches are right."""
        return are_labelled(self.query_vectors.names, self.gallery_vectors.names)

    @property
    def fused(self) -> bool:
        """Whether several networks ranked the images: the vectors are those of the first."""
        return "weights" in self.metrics

    @cached_property
    def first(self) -> list[int]:
        """The rank of each query's first right image; 0 if no right image is ranked, or without labels."""
        return first_hits(self.ranking) if self.labelled else [0] * len(self.ranking.queries)


def sample_rows(queries: Embeddings, gallery: Embeddings | ShardedEmbeddings, seed: int = 0) -> np.ndarray:
    """Return up to MOST_POINTS rows of the queries and gallery images together, the classes in turn.

    Images that could not be embedded are left out.
    """
    names, embedded = queries.names + gallery.names, []
    for side in (queries, gallery):
        unreadable = set(side.unreadable)
        embedded += [name not in unreadable for name in side.names]
    of_class: dict[str | None, list[int]] = {}
    for row in np.random.default_rng(seed).permutation(np.flatnonzero(embedded)).tolist():
        of_class.setdefault(label_of(names[row]), []).append(row)
    turns = [(turn, row) for rows in of_class.values() for turn, row in enumerate(rows)]
    in_turn = sorted(turns, key=lambda turn_and_row: turn_and_row[0])
    return np.array(sorted(row for _, row in in_turn[:MOST_POINTS]), dtype=int)
