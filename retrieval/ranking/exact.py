"""Embeddings of queries and gallery in; a ranking {query: [gallery names, best first]} out."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from retrieval.records import Embeddings, chunks, rows_of_chunk, zero_rows, zero_rows_of

# What rank() holds at a time, whatever the sizes are.
TILE = 2**23  # similarities, float32: 32 MiB
BEST_BYTES = 2**26  # of the best found so far; at most so many queries share a pass over the gallery
PAIRS = 2**19  # pairs of a query and an image that float64 decides between
PIECE = 2**18  # numbers of a float64 product: they stay in the processor's cache
IMAGES = 8192  # rows of a chunk, unless many names are kept
COMBS = 256  # of a row of similarities; more where many names are kept

LAST = -2.0  # below every cosine: of a gallery image that could not be read
NONE = -3.0  # below that: a place that no image holds yet

log = logging.getLogger("retrieval.ranking")


def rank(queries: Embeddings, gallery: Embeddings, keep: int = 10) -> dict[str, list[str]]:
    """The `keep` gallery names most similar to each query by cosine, best first; all of a smaller gallery.

    Exact: cosines are compared in float64, and equal ones keep the gallery's order. Gallery images that
    could not be read come last; a query that could not be read gets the gallery in its order.

    Memory beyond the vectors and the result: at most 256 MiB for any number of queries and gallery images,
    as long as `keep` is below 100 000. A gallery in a file (numpy.memmap) is read once for every
    BEST_BYTES / (16 · keep) queries, which are 400 000 where ten names are kept.
    """
    keep = min(keep, len(gallery.names))
    if not keep:
        return {name: [] for name in queries.names}
    missing = zero_rows(queries.vectors)
    if len(missing):
        log.warning("%d queries without an embedding get the gallery in its order", len(missing))
    in_order = _in_order(gallery.vectors, keep) if len(missing) else None
    missing = set(missing.tolist())
    ranking = {}
    for row, best in enumerate(_best_rows(queries.vectors, gallery.vectors, keep)):
        best = in_order if row in missing else best
        ranking[queries.names[row]] = [gallery.names[image] for image in best]
    return ranking


def merge(cosines: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the best k of each query's candidates (queries, n): by falling cosine, then by ascending row.

    >>> merge(np.array([[0.5, 0.9, 0.5]]), np.array([[7, 3, 2]]), k=2)
    (array([[0.9, 0.5]]), array([[3, 2]]))
    """
    order = np.lexsort((rows, -cosines), axis=1)[:, :k]
    return np.take_along_axis(cosines, order, 1), np.take_along_axis(rows, order, 1)


# ---- chunks ---------------------------------------------------------------------------------------


def _in_order(gallery: np.ndarray, keep: int) -> np.ndarray:
    """The first `keep` rows of the gallery, those of zeros last."""
    zeros = zero_rows(gallery)
    readable = np.setdiff1d(np.arange(min(len(gallery), keep + len(zeros))), zeros, assume_unique=True)
    return np.concatenate([readable, zeros])[:keep]


# ---- the best so far ------------------------------------------------------------------------------


class _Best(NamedTuple):
    """Of each query the best gallery images so far, (queries, keep): falling cosines, float64; their rows."""

    cosines: np.ndarray
    rows: np.ndarray


class _Chunk(NamedTuple):
    """Some rows of the gallery."""

    vectors: np.ndarray
    start: int  # the first row
    unreadable: np.ndarray  # rows of the chunk
    whole: bool  # it is all of the gallery


def _best_rows(queries: np.ndarray, gallery: np.ndarray, keep: int) -> Iterator[np.ndarray]:
    """Yield for each query the rows of its `keep` nearest gallery vectors, best first."""
    images = min(max(IMAGES, 4 * keep), rows_of_chunk(gallery), len(gallery))
    tile = max(1, TILE // images)
    block = max(1, BEST_BYTES // (16 * keep))
    for first in range(0, len(queries), block):
        part = np.asarray(queries[first : first + block])
        best = _Best(np.full((len(part), keep), NONE), np.zeros((len(part), keep), dtype=np.int64))
        for start, vectors in chunks(gallery, images):
            chunk = _Chunk(vectors, start, zero_rows_of(vectors), len(vectors) == len(gallery))
            for i in range(0, len(part), tile):
                _look_at(part[i : i + tile], chunk, _Best(*(array[i : i + tile] for array in best)))
        yield from best.rows


def _look_at(queries: np.ndarray, chunk: _Chunk, best: _Best) -> None:
    """Put what is better in a chunk of the gallery among the best of each query, in place.

    A float32 product finds the candidates, float64 decides between them. For unit vectors of dimension d the
    float32 sum, in whatever order, is within γ = d·u/(1 − d·u) of the cosine, u = 2⁻²⁴ (Higham, Accuracy and
    Stability of Numerical Algorithms, 2002, §3.1). So no image whose float32 value lies more than γ below
    the keep-th best cosine so far, or more than 2γ below the keep-th best float32 value, is among the best.
    """
    d = chunk.vectors.shape[1] + 4  # a little more, for lengths that are 1 within rounding
    gamma = d * 2.0**-24 / (1 - d * 2.0**-24)
    keep = best.rows.shape[1]
    similarity = queries @ chunk.vectors.T  # (queries, images of the chunk)
    similarity[:, chunk.unreadable] = LAST
    peaks, floor = _peaks_and_floor(similarity, best.cosines[:, -1], gamma, keep)
    if np.count_nonzero(peaks >= floor[:, None]) > 8 * keep * len(queries):  # near ties everywhere
        similarity[:, _surplus(chunk.vectors, keep)] = NONE
        peaks, floor = _peaks_and_floor(similarity, best.cosines[:, -1], gamma, keep)
    for owners, columns, values in _candidates(similarity, peaks, floor):
        cosines = values.astype(np.float64)
        unsure = _within(2 * gamma, owners, values) if chunk.whole else slice(None)
        cosines[unsure] = _cosines(queries, owners[unsure], chunk.vectors, columns[unsure])
        cosines[np.isin(columns, chunk.unreadable)] = LAST
        _merge(best, owners, cosines, chunk.start + columns)


def _peaks_and_floor(
    similarity: np.ndarray, worst: np.ndarray, gamma: float, keep: int
) -> tuple[np.ndarray, np.ndarray]:
    """The peaks (queries, combs), and the value below which no image is among a query's best.

    `worst` is the keep-th best cosine so far. Each peak is another image, so that the keep-th best value is
    at least the keep-th best peak.
    """
    peaks = _peaks(similarity, 16 * keep)
    floor = (worst - gamma).astype(np.float32)
    crowded = np.flatnonzero(np.count_nonzero(peaks >= floor[:, None], axis=1) >= keep)
    if len(crowded):
        place = peaks.shape[1] - keep
        least = np.partition(peaks[crowded], place, axis=1)[:, place]
        floor[crowded] = np.maximum(floor[crowded], least - np.float32(2 * gamma))
    return peaks, floor


def _surplus(vectors: np.ndarray, keep: int) -> np.ndarray:
    """The rows that have `keep` equals before them, and are among no query's best."""
    as_bytes = np.ascontiguousarray(vectors).view(np.dtype((np.void, 4 * vectors.shape[1]))).ravel()
    order = np.argsort(as_bytes, kind="stable")
    equal = as_bytes[order[keep:]] == as_bytes[order[:-keep]]  # as many places on in the sorted rows
    return order[keep:][equal]


def _within(distance: float, owners: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Which of some queries' values lie within a distance of another one of the same query."""
    order = np.lexsort((values, owners))
    near = (np.diff(owners[order]) == 0) & (np.diff(values[order]) <= distance)
    close = np.zeros(len(values), dtype=bool)
    close[order[1:][near]] = close[order[:-1][near]] = True
    return close


def _peaks(similarity: np.ndarray, wanted: int) -> np.ndarray:
    """The highest value of each comb (queries, combs): comb j is the columns j, j + combs, j + 2 combs, …"""
    queries, images = similarity.shape
    combs = min(images, max(COMBS, wanted))
    even = images // combs * combs
    peaks = similarity[:, :even].reshape(queries, -1, combs).max(axis=1)
    rest = similarity[:, even:]
    np.maximum(peaks[:, : rest.shape[1]], rest, out=peaks[:, : rest.shape[1]])
    return peaks


def _candidates(
    similarity: np.ndarray, peaks: np.ndarray, floor: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield (queries, columns, values) of all values that reach their query's floor, some queries at a time.

    Only the combs whose peak reaches it are looked at. Queries ascend.
    """
    images, combs = similarity.shape[1], peaks.shape[1]
    teeth = np.arange(0, images, combs)
    reached = peaks >= floor[:, None]
    ends = np.cumsum(np.count_nonzero(reached, axis=1)) * len(teeth)
    first = 0
    while first < len(ends) and ends[-1]:
        seen = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, seen + PAIRS, side="right")))
        owners, comb = np.nonzero(reached[first:last])
        owners, columns = (owners + first)[:, None], comb[:, None] + teeth
        values = similarity[owners, np.minimum(columns, images - 1)]
        which, tooth = np.nonzero((values >= floor[owners]) & (columns < images))
        if len(which):
            yield owners[which, 0], columns[which, tooth], values[which, tooth]
        first = last


def _cosines(queries: np.ndarray, owners: np.ndarray, gallery: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """float64 cosines of pairs of rows; equal vectors give equal numbers, bit for bit."""
    cosines = np.empty(len(rows))
    step = max(1, PIECE // gallery.shape[1])
    for i in range(0, len(rows), step):
        part = slice(i, i + step)
        cosines[part] = (gallery[rows[part]] * queries[owners[part]].astype(np.float64)).sum(axis=1)
    return cosines


def _merge(best: _Best, owners: np.ndarray, cosines: np.ndarray, rows: np.ndarray) -> None:
    """Put pairs of queries, ascending, and gallery rows among the best, in place."""
    keep = best.rows.shape[1]
    touched, counts = np.unique(owners, return_counts=True)
    owners = np.concatenate([np.repeat(touched, keep), owners])
    cosines = np.concatenate([best.cosines[touched].ravel(), cosines])
    rows = np.concatenate([best.rows[touched].ravel(), rows])
    order = np.lexsort((rows, -cosines, owners))
    starts = np.cumsum(counts + keep) - (counts + keep)
    order = order[starts[:, None] + np.arange(keep)]
    best.cosines[touched], best.rows[touched] = cosines[order], rows[order]
