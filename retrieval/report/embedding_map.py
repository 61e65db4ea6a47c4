"""The embeddings of a run in; a t-SNE map of them, where classes show as groups, out."""

from __future__ import annotations

import numpy as np

from get_images import label_of
from retrieval.report import charts
from retrieval.report.charts import Chart
from retrieval.report.results import Results
from retrieval.report.tsne import tsne

FEWEST_POINTS = 5


def draw_map(results: Results) -> tuple[list[Chart], list[list[int]]]:
    """Draw the map of the sampled images; and return which rows each group of its marks shows.

    Fine-tuned embeddings that hold the untuned ones get a second panel. A handful of images gets no map.
    """
    rows, vectors = results.sample.rows, results.sample.vectors
    if len(rows) < FEWEST_POINTS:
        return [], []
    panels = {"after fine-tuning" if results.trained else "embeddings": vectors}
    if results.trained and results.trained.joined:
        untuned = vectors[:, : vectors.shape[1] // 2]  # both halves have the same dimension
        lengths = np.linalg.norm(untuned, axis=1, keepdims=True)
        panels = {"before fine-tuning": untuned / np.maximum(lengths, 1e-12)} | panels
    points = {title: tsne(vectors) for title, vectors in panels.items()}
    labels, colours = _colours(results, rows)
    chart, behind = charts.embedding_map(points, labels, rows < len(results.queries), colours)
    return [chart], [rows[marks].tolist() for marks in behind]


def _colours(results: Results, rows: np.ndarray) -> tuple[list[str | None], dict[str, str]]:
    """Return a label for each row and a colour for each label.

    Labels are the classes or, if there are more classes than colours, whether a query's first match is right.
    """
    if not results.labelled:
        return [None] * len(rows), {}
    names = results.query_vectors.names + results.gallery_vectors.names
    labels = [label_of(names[row]) for row in rows]
    classes = sorted({label for label in labels if label is not None})
    if len(classes) <= len(charts.COLOURS):
        return labels, dict(zip(classes, charts.COLOURS, strict=False))
    verdicts = [f"first match {'right' if first == 1 else 'wrong'}" for first in results.first]
    verdicts += [None] * len(results.gallery)
    colours = {"first match right": charts.RIGHT, "first match wrong": charts.WRONG}
    return [verdicts[row] for row in rows], colours
