"""The records that pass from step to step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

CHUNK_BYTES = 2**26  # of vectors: 64 MiB
UNREADABLE = -2.0  # in place of the cosine of an unreadable gallery image: below every cosine


@dataclass(frozen=True)
class Embeddings:
    """The unit vectors of images: row i of `vectors` (images, dimension), float32, belongs to names[i].

    An unreadable image has a row of zeros. `without_face` are the names of the images in which no face was
    found, or None if the backbone looks for no faces; `damaged` those of which only a part could be read. The
    vectors may be a numpy.memmap, which may be larger than the memory: it is read in chunks.
    """

    names: list[str]
    vectors: np.ndarray
    without_face: list[str] | None = None
    damaged: list[str] = field(default_factory=list)

    @property
    def unreadable(self) -> list[str]:
        """The names of the images whose rows are zeros."""
        return [self.names[row] for row in zero_rows(self.vectors)]

    def some(self, rows: np.ndarray) -> Embeddings:
        """Return the embeddings of some images, given by their rows."""
        return Embeddings([self.names[row] for row in rows], self.vectors[rows])


@dataclass(frozen=True)
class ShardedEmbeddings:
    """Embeddings of which each process of a run holds a shard: `own` starts at row `start` of `names`.

    The others are names in the shards of all processes, as Embeddings has them.
    """

    names: list[str]
    own: Embeddings
    start: int
    unreadable: list[str]
    without_face: list[str] | None
    damaged: list[str] = field(default_factory=list)
    cached: int = 0  # vectors of all processes that came from the cache


@dataclass(frozen=True)
class Ranking:
    """The k nearest gallery images of each query, best first.

    `rows` (queries, k), int64, are rows of the gallery; `cosines` (queries, k), float64, fall along each row.
    Equal cosines keep the gallery's order. Unreadable gallery images come last, with the cosine UNREADABLE.
    An unreadable query has the gallery in its order, with cosines of 0.

    `scores` (queries, k), float64, fall along each row in place of the cosines, if the images are ordered by
    something else than their cosine (retrieval/ranking/means.py). With `cover` neither falls. `excluded` are
    the rows of gallery images that do not count for a query, by its row; they come last.
    """

    queries: list[str]
    gallery: list[str]
    rows: np.ndarray
    cosines: np.ndarray
    scores: np.ndarray | None = None
    excluded: dict[int, list[int]] = field(default_factory=dict)

    def names(self) -> dict[str, list[str]]:
        """Return the names of the ranked gallery images, best first, by the name of their query."""
        return {query: [self.gallery[row] for row in best]
                for query, best in zip(self.queries, self.rows.tolist(), strict=True)}  # fmt: skip


def chunks(vectors: np.ndarray, rows: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the first row of each chunk and the chunk of `rows` rows, which is copied if it is a memmap."""
    for start in range(0, len(vectors), rows):
        chunk = vectors[start : start + rows]
        yield start, np.array(chunk) if isinstance(chunk, np.memmap) else chunk


def rows_of_chunk(vectors: np.ndarray) -> int:
    """Return how many rows of these vectors fit into CHUNK_BYTES."""
    return max(1, CHUNK_BYTES // (4 * vectors.shape[1]))


def readable_rows(vectors: np.ndarray) -> np.ndarray:
    """Return the rows that are not zeros, ascending, int64."""
    return np.delete(np.arange(len(vectors)), zero_rows(vectors))


def zero_rows(vectors: np.ndarray) -> np.ndarray:
    """Return the rows of zeros, ascending, int64; one chunk is in memory at a time."""
    return np.concatenate(
        [np.empty(0, np.int64)]
        + [start + zero_rows_of(chunk) for start, chunk in chunks(vectors, rows_of_chunk(vectors))]
    )


def zero_rows_of(chunk: np.ndarray) -> np.ndarray:
    """Return the rows of zeros of vectors in memory."""
    suspects = np.flatnonzero(chunk[:, 0] == 0)  # few, so that the other columns need not be read
    return suspects[~chunk[suspects].any(axis=1)]
