"""The record of a finished run, which its page is drawn from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from get_images import ImageFile
from retrieval.backbones.backbone import Trained
from retrieval.metrics import are_labelled, first_hits
from retrieval.records import Embeddings, Ranking, ShardedEmbeddings


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

    @cached_property
    def first(self) -> list[int]:
        """The rank of each query's first right image; 0 if no right image is ranked, or without labels."""
        return first_hits(self.ranking) if self.labelled else [0] * len(self.ranking.queries)

    @cached_property
    def names(self) -> list[str]:
        """The names of the queries, then of the gallery images."""
        return self.query_vectors.names + self.gallery_vectors.names
