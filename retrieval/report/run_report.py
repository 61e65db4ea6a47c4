"""A run that is over in; report.html, one file that opens offline, and its charts as PNG out.

python -m retrieval.report results results/earlier_day      # compare the runs in their ledgers
"""

from __future__ import annotations

import logging
import platform
import shlex
import subprocess
import sys
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from get_images import ImageFile, label_of
from retrieval.backbones.backbone import Trained
from retrieval.files import write_whole
from retrieval.html import render
from retrieval.machine import version_of
from retrieval.metrics import CUTS, are_labelled, first_hits
from retrieval.records import UNREADABLE, Embeddings, Ranking
from retrieval.report import charts
from retrieval.report.charts import Chart, Points
from retrieval.report.thumbnails import draw_matches, encoded_thumbnails
from retrieval.run import Outcome, Run

PAGE, SHEET = "report.html", "similar_images.png"
SHOWN = 10  # matches of a query
POINTS, FEWEST_POINTS = 1000, 5  # of the map
MOST_PICTURES = 24_000  # in the page; the images after these are named only
# Pixels of a picture's longer side where there are so many: together they stay below 10 MB.
SIDES = {3000: 96, 8000: 64, 14_000: 48, MOST_PICTURES: 32}
PACKAGES = ("torch", "torchvision", "timm", "facenet-pytorch", "numpy", "pillow", "scikit-learn")

TEMPLATES = Path(__file__).with_name("templates")
log = logging.getLogger("retrieval.report")


@dataclass(frozen=True)
class Found:
    """What a run found: its images, their embeddings, the ranking and its figures."""

    queries: list[ImageFile]
    gallery: list[ImageFile]
    query_vectors: Embeddings
    gallery_vectors: Embeddings
    ranking: Ranking
    metrics: dict[str, Any]
    trained: Trained | None = None  # None: the network is not fine-tuned

    @cached_property
    def labelled(self) -> bool:
        """Whether it is known which matches are right."""
        return are_labelled(self.query_vectors.names, self.gallery_vectors.names)

    @cached_property
    def first(self) -> list[int]:
        """The rank of each query's first right image; 0 where none is ranked, or none is known."""
        return first_hits(self.ranking) if self.labelled else [0] * len(self.ranking.queries)

    @cached_property
    def names(self) -> list[str]:
        """Of the queries, then of the gallery images."""
        return self.query_vectors.names + self.gallery_vectors.names


def write_report(run: Run, found: Found, outcome: Outcome) -> Path:
    """Write report.html into the run's folder, and beside it similar_images.png and the charts; the page."""
    matches = Matches(found)
    draw_matches(found.ranking, found.queries, found.gallery, run.settings.top_k, run.folder / SHEET)
    shown = _sample(found)
    maps, behind = _map(found, matches, shown)
    charts = {chart.name: chart for chart in [*maps, *_charts(found, matches)]}
    for chart in charts.values():
        write_whole(run.folder / f"{chart.name}.png", chart.png)
    data = _data(found, matches, [shown[rows].tolist() for rows in behind])
    page = render(
        TEMPLATES,
        "report.html",
        title=f"{found.metrics['backbone']}: {len(found.queries)} queries in {len(found.gallery)} images",
        outcome=outcome,
        tiles=_tiles(found.metrics),
        labelled=found.labelled,
        charts=charts,
        data=data,
        query_classes=sorted(
            {(data["labels"][row], data["classes"][data["labels"][row]]) for row in range(len(found.queries))}
        ),
        mapped=len(shown),
        images=len(found.queries) + len(found.gallery),
        command=_command(run),
        time=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        tables=_tables(run),
        left_out=_left_out(found),
    )
    write_whole(run.folder / PAGE, page)
    return run.folder / PAGE


def _command(run: Run) -> str:
    """What was typed, but for a token."""
    command = shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
    token = run.settings.group_token.get_secret_value()
    return command.replace(token, str(run.settings.group_token)) if token else command


def _tiles(metrics: dict[str, Any]) -> list[dict[str, str]]:
    """The figures at the top of the page, each with its interval."""
    tiles = []
    if "server_score" in metrics:
        tiles.append(
            {"name": "the server's score", "value": f"{metrics['server_score']:.1f}", "note": "of 1000"}
        )
    if "score" not in metrics:
        return tiles
    low, high = metrics["score_interval"]
    note = f"{low:.0f} to {high:.0f} of 1000 (95 %)"
    tiles.append({"name": "score by the folder labels", "value": f"{metrics['score']:.1f}", "note": note})
    for cut in CUTS:
        low, high = (100 * bound for bound in metrics[f"top_{cut}_interval"])
        value = f"{100 * metrics[f'top_{cut}']:.1f} %"
        tiles.append({"name": f"top-{cut}", "value": value, "note": f"{low:.1f} to {high:.1f} %"})
    return tiles


def _tables(run: Run) -> list[tuple[str, list[tuple[str, str]]]]:
    """Captions and rows of how the run was made."""
    seconds = run.rounded_seconds()
    seconds["all but this page"] = seconds.pop("total")
    return [
        ("seconds of each step", [(step, f"{spent:.1f}") for step, spent in seconds.items()]),
        ("settings", [(name, "–" if value is None else str(value)) for name, value in run.settings]),
        ("versions", list(versions().items())),
    ]


def _left_out(found: Found) -> dict[str, list[str]]:
    """The names of images that something was wrong with, under what it was."""
    sides = {"queries": found.query_vectors, "gallery images": found.gallery_vectors}
    told = {f"{side} that could not be embedded": vectors.unreadable for side, vectors in sides.items()}
    told |= {f"{side} without a face": vectors.without_face for side, vectors in sides.items()}
    return {what: names for what, names in told.items() if names}


def versions() -> dict[str, str]:
    """Of Python, of the packages that decide a result, and the commit of this code where git knows it."""
    found = {"python": platform.python_version(), "system": platform.platform(terse=True)}
    found |= {package: number for package in PACKAGES if (number := version_of(package))}
    return found | _commit(Path(__file__).parent.parent.parent)


def _commit(folder: Path) -> dict[str, str]:
    """The commit of the code in a folder; nothing where git does not know it."""
    if not (folder / ".git").exists():  # a copy inside somebody's own repository is no commit of ours
        return {}
    command = ["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):  # no git
        return {}
    return {"commit": told.stdout.strip()} if told.returncode == 0 else {}


# ---- what the page looks through ------------------------------------------------------------------


class Matches:
    """For each query its first SHOWN matches: which, how alike, and whether right."""

    def __init__(self, found: Found) -> None:
        # (queries, shown): rows of the gallery, and their cosines
        self.rows = found.ranking.rows[:, :SHOWN]
        cosines = found.ranking.cosines[:, :SHOWN]
        self.cosines = np.where(cosines == UNREADABLE, 0, cosines)
        # (queries,): the rank of the first right match, 0 where none is known; the lead of the first match
        self.first = np.array(found.first)
        others = np.ones_like(self.rows, bool)
        if found.labelled:
            labels = np.array([label_of(name) or "" for name in found.gallery_vectors.names], dtype=object)
            others = labels[self.rows] != labels[self.rows[:, :1]]
        others[:, 0], others[:, -1] = False, True
        self.margin = self.cosines[:, 0] - np.where(others, self.cosines, -np.inf).max(axis=1)
        self.embedded = found.query_vectors.vectors.any(axis=1)


def _data(found: Found, matches: Matches, points: list[list[int]]) -> dict[str, Any]:
    """What the page's script reads. An image is its row: the queries first, then the gallery images."""
    images = [*found.queries, *found.gallery]
    queries = len(found.queries)
    used = dict.fromkeys(range(queries))
    used |= dict.fromkeys((matches.rows + queries).ravel().tolist())
    used |= dict.fromkeys(row for rows in points for row in rows)
    drawn = list(used)[:MOST_PICTURES]
    side = next(side for count, side in SIDES.items() if len(drawn) <= count)
    pictures = dict(zip(drawn, encoded_thumbnails([images[row] for row in drawn], side), strict=True))
    classes = sorted({label_of(images[row].name) or "" for row in used})
    class_of = {label: number for number, label in enumerate(classes)}
    return {
        "labelled": found.labelled,
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


# ---- charts ---------------------------------------------------------------------------------------


def _charts(found: Found, matches: Matches) -> list[Chart]:
    right = (matches.first == 1)[matches.embedded] if found.labelled else None
    drawn = [charts.similarities(matches.cosines[matches.embedded, 0], right)]
    if found.labelled:
        of_queries = [label_of(name) or "none" for name in found.ranking.queries]
        of_matches = [label_of(found.gallery_vectors.names[row]) or "none" for row in matches.rows[:, 0]]
        drawn.append(charts.per_class(found.metrics["per_class"]))
        drawn.append(charts.confusion(of_queries, of_matches))
    if found.trained and found.trained.history:
        drawn.append(charts.curves(found.trained.history, found.trained.untuned))
    return drawn


def _sample(found: Found, seed: int = 0) -> np.ndarray:
    """Up to POINTS rows of queries and gallery images together, of the classes in turn; no empty vectors."""
    usable = np.concatenate(
        [vectors.vectors.any(axis=1) for vectors in (found.query_vectors, found.gallery_vectors)]
    )
    of_class: dict[str | None, list[int]] = {}
    for row in np.random.default_rng(seed).permutation(np.flatnonzero(usable)).tolist():
        of_class.setdefault(label_of(found.names[row]), []).append(row)
    order = sorted(
        ((turn, row) for rows in of_class.values() for turn, row in enumerate(rows)), key=lambda x: x[0]
    )
    return np.array(sorted(row for _, row in order[:POINTS]), dtype=int)


def _map(found: Found, matches: Matches, shown: np.ndarray) -> tuple[list[Chart], list[np.ndarray]]:
    """The t-SNE map of these rows, beside that of the untuned network where the embeddings hold it.

    And which of the rows each group of its marks stands for. Nothing for a handful of images.
    """
    if len(shown) < FEWEST_POINTS:
        return [], []
    of_queries = shown[shown < len(found.queries)]
    of_gallery = shown[len(of_queries) :] - len(found.queries)  # rows ascend
    vectors = np.concatenate(
        [found.query_vectors.vectors[of_queries], found.gallery_vectors.vectors[of_gallery]]
    )
    panels = [("after fine-tuning" if found.trained else "embeddings", vectors)]
    if found.trained and found.trained.joined:
        untuned = vectors[:, : vectors.shape[1] // 2]  # both have as many numbers
        lengths = np.linalg.norm(untuned, axis=1, keepdims=True)
        panels.insert(0, ("before fine-tuning", untuned / np.maximum(lengths, 1e-12)))
    points = [Points(title, tsne(vectors)) for title, vectors in panels]
    labels, colours = _coloured(found, matches, shown)
    chart, behind = charts.embedding_map(points, labels, shown < len(found.queries), colours)
    return [chart], behind


def _coloured(found: Found, matches: Matches, shown: np.ndarray) -> tuple[list[str | None], dict[str, str]]:
    """What these rows are coloured by, and its colours: classes or, of many, whether a query is right."""
    if not found.labelled:
        return [None] * len(shown), {}
    labels = [label_of(found.names[row]) for row in shown]
    classes = sorted({label for label in labels if label is not None})
    if len(classes) <= len(charts.COLOURS):
        return labels, dict(zip(classes, charts.COLOURS, strict=False))
    verdicts = [*np.where(matches.first == 1, "first match right", "first match wrong").tolist(),
                *[None] * len(found.gallery)]  # fmt: skip
    colours = {"first match right": charts.RIGHT, "first match wrong": charts.WRONG}
    return [verdicts[row] for row in shown], colours


def tsne(vectors: np.ndarray, seed: int = 0) -> np.ndarray:
    """Reduce vectors (points, dimension) to (points, 2) by PCA to 50 dimensions, then t-SNE.

    L. van der Maaten and G. Hinton, JMLR 9 (2008) 2579.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    reduced = PCA(min(50, *vectors.shape), random_state=seed).fit_transform(vectors)
    perplexity = min(30.0, (len(vectors) - 1) / 3)
    start = reduced[:, :2] / max(reduced[:, 0].std(), 1e-12) * 1e-4  # as Kobak and Berens 2019 do
    return TSNE(init=start, perplexity=perplexity, max_iter=500, random_state=seed).fit_transform(reduced)
