"""The ledgers of runs in; a table of those on the same images, with paired tests between them, out."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from retrieval.errors import InputError
from retrieval.files import write_whole
from retrieval.html import render
from retrieval.metrics import CUTS, compare, points_of
from retrieval.run import EARLIER, LEDGER

PAGE, TABLE = "comparison.html", "comparison.md"
# Settings that make two runs of a network on the same images different ones.
MATTER = ("image_size", "crop", "face_margin", "min_face_size", "weights")
MOST_NAMES = 200  # in a list of the page
ALPHA = 0.05
NOTE = (
    "In brackets: the 95 % interval. Told apart from the best query by query: top-1 by McNemar's exact test, "
    "corrected by Holm for the rows of a table (5 %); the score by a paired bootstrap, whose interval, not "
    "corrected, must not hold 0."
)

TEMPLATES = Path(__file__).with_name("templates")
log = logging.getLogger("retrieval.comparison")


@dataclass(frozen=True)
class RunLine:
    """A line of a ledger."""

    ledger: Path
    time: datetime
    settings: dict[str, Any]
    metrics: dict[str, Any]
    seconds: float | None
    first: tuple[int, ...] | None  # the rank of each query's first right image; 0: none. None: not known
    server_score: float | None
    count: int = 1  # of runs that gave the same

    @property
    def word(self) -> str:
        """The network's."""
        return self.metrics.get("backbone") or self.settings.get("model_type") or "a fine-tuned network"

    @property
    def name(self) -> str:
        """The network's word and what was set otherwise than the word has it, of weights the path's end."""
        told = {name: self.settings.get(name) for name in MATTER}
        if told["weights"]:
            told["weights"] = "/".join(Path(told["weights"]).parts[-2:])
        given = [f"{name} {value}" for name, value in told.items() if value not in (None, "", "auto")]
        return ", ".join([self.word, *given])

    @property
    def tuned(self) -> str:
        """Whether it is fine-tuned."""
        return "yes" if self.metrics.get("tuned", "model_type" not in self.settings) else "no"

    @property
    def images(self) -> tuple:
        """What two runs must share to be compared."""
        folders = self.settings.get("query_dir"), self.settings.get("gallery_dir")
        return self.metrics.get("names") or folders, self.size

    @property
    def size(self) -> tuple[int, int]:
        """How many queries and gallery images."""
        return self.metrics["queries"], self.metrics["gallery_images"]

    @property
    def same(self) -> tuple:
        """What two runs share that are the same run again."""
        told = {name: self.settings.get(name) for name in MATTER}
        server = self.server_score if self.first is None else None  # whether it was sent changes no ranking
        return self.word, json.dumps(told), self.first, self.metrics.get("score"), server

    @property
    def height(self) -> float:
        """What the rows are sorted by: the score by the labels, or the server's."""
        known = [score for score in (self.metrics.get("score"), self.server_score) if score is not None]
        return known[0] if known else -1.0


@dataclass(frozen=True)
class Row:
    """A run beside the best one on the same images."""

    run: RunLine
    difference: tuple[float, list[float]] | None = None  # of the score, with its 95 % interval
    p: float | None = None  # McNemar's of the first matches, corrected by Holm
    only_best: list[str] | None = None  # queries that the best run alone finds at once
    only_this: list[str] | None = None

    @property
    def apart(self) -> str:
        """Whether the tests tell it from the best, in words."""
        if self.difference is None or self.p is None:
            return "–"
        low, high = self.difference[1]
        told = [what for what, is_so in (("score", high < 0 or low > 0), ("top-1", self.p < ALPHA)) if is_so]
        return " and ".join(told) or "no"


def compare_ledgers(folders: list[Path]) -> Path:
    """Say which runs are better than which, and write comparison.html and comparison.md; the page.

    Reads every runs.jsonl in and below the folders, or that is given in the place of one. Raises InputError
    where there is none, or no run in it.
    """
    groups = [_beside_the_best(runs) for runs in _grouped(read_ledgers(folders))]
    for rows in groups:
        log.info("%s", _title(rows))
        log.info("%s", _aligned(_cells(rows)))
    log.info("%s", NOTE)
    out = folders[0].parent if folders[0].is_file() else folders[0]
    markdown = [f"**{_escaped(_title(rows))}**\n\n{_markdown(_cells(rows))}" for rows in groups]
    write_whole(out / TABLE, ("\n\n".join([*markdown, NOTE]) + "\n").encode("utf-8", "replace"))
    shown = [{"title": _title(rows), "cells": _cells(rows), "bars": _bars(rows),
              "rows": list(zip(_told_apart(rows), rows, strict=True)),
              "runs": sum(row.run.count for row in rows)} for rows in groups]  # fmt: skip
    write_whole(out / PAGE, render(TEMPLATES, "comparison.html", title="Runs compared", groups=shown,
                                   most=MOST_NAMES, note=NOTE))  # fmt: skip
    return out / PAGE


# ---- read -----------------------------------------------------------------------------------------


def read_ledgers(folders: list[Path]) -> list[RunLine]:
    """The runs in every ledger in and below the folders, each ledger once. Raises InputError for none."""
    ledgers = {ledger.resolve(): ledger for folder in folders for ledger in _ledgers_in(folder)}
    where = ", ".join(map(str, folders))
    if not ledgers:
        raise InputError(f"there is no {LEDGER} in or below {where}: give the --output_dir of runs")
    runs = [run for ledger in ledgers.values() for run in _read_ledger(ledger)]
    if not runs:
        raise InputError(f"no {LEDGER} in or below {where} holds a run that embedded and ranked images")
    return runs


def _ledgers_in(folder: Path) -> list[Path]:
    if folder.is_file():
        return [folder]
    return [
        ledger for ledger in sorted(folder.rglob(LEDGER)) if EARLIER not in ledger.relative_to(folder).parts
    ]


def _read_ledger(ledger: Path) -> list[RunLine]:
    runs = []
    for number, line in enumerate(ledger.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            run = _read_line(ledger, json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            log.warning("%s, line %d is no line of a ledger, and is passed over", ledger, number)
            continue
        if run:
            runs.append(run)
    return runs


def _read_line(ledger: Path, told: dict[str, Any]) -> RunLine | None:
    """A run; None for a submission that was sent again."""
    if not isinstance(told, dict):
        raise ValueError("a line is an object")
    if "metrics" not in told:
        return None
    metrics, first = told["metrics"], told.get("first")
    if first is not None:
        first = tuple(int(rank) for rank in first)
        if len(first) != metrics["queries"]:
            raise ValueError("a rank for each query")
    time = datetime.fromisoformat(told["time"]).astimezone()
    run = RunLine(ledger, time, told["settings"], metrics, told.get("seconds", {}).get("total"),
                  first, told["outcome"]["accuracy"])  # fmt: skip
    _ = (
        hash((run.images, run.same)),
        run.height + sum(run.size),
        _cells([Row(run)]),
    )  # raises for what is none
    return run


def _grouped(runs: list[RunLine]) -> list[list[RunLine]]:
    """The runs on the same images, the best first; of the same run again the newest stands for all."""
    groups: dict[tuple, dict[tuple, list[RunLine]]] = {}
    for run in sorted(runs, key=lambda run: run.time):
        groups.setdefault(run.images, {}).setdefault(run.same, []).append(run)
    return [
        sorted((_newest(same) for same in of_images.values()), key=lambda run: -run.height)
        for of_images in groups.values()
    ]


def _newest(runs: list[RunLine]) -> RunLine:
    return replace(runs[-1], count=len(runs))


# ---- compare --------------------------------------------------------------------------------------


def _beside_the_best(runs: list[RunLine]) -> list[Row]:
    best, *others = runs
    tested = [run for run in others if best.first and run.first]
    p_values = holm([mcnemar(best.first, run.first) for run in tested])
    p_of = dict(zip(map(id, tested), p_values, strict=True))
    names = _names(best)
    rows = [Row(best)]
    for run in others:
        if id(run) not in p_of:
            rows.append(Row(run))
            continue
        pairs = list(zip(names, best.first, run.first, strict=True))
        rows.append(Row(
            run, compare(points_of(list(run.first)), points_of(list(best.first))), p_of[id(run)],
            [name for name, of_best, of_run in pairs if of_best == 1 != of_run],
            [name for name, of_best, of_run in pairs if of_run == 1 != of_best],
        ))  # fmt: skip
    return rows


def _names(run: RunLine) -> list[str]:
    """The names of the queries; their numbers where the file of the names is gone."""
    path = run.ledger.with_name(f"names-{run.metrics.get('names')}.json")
    try:
        names = list(json.loads(path.read_bytes())["queries"])
    except (OSError, ValueError, KeyError, TypeError):
        names = []
    count = run.metrics["queries"]
    return names if len(names) == count else [f"query {number}" for number in range(1, count + 1)]


def mcnemar(first: tuple[int, ...], other: tuple[int, ...]) -> float:
    """The exact two-sided p-value of McNemar's test that both find as many queries at rank 1.

    Of the queries that one of the two finds, each is as likely the one's: Psychometrika 12 (1947) 153.

    >>> mcnemar((1, 1, 1, 1, 1, 1, 2, 1), (2, 0, 3, 2, 2, 4, 1, 1))  # 6 against 1: 2 · (1 + 7) / 2⁷
    0.125
    """
    from scipy.stats import binomtest

    one, two = np.array(first) == 1, np.array(other) == 1
    only_one, only_two = int((one & ~two).sum()), int((two & ~one).sum())
    if not only_one + only_two:
        return 1.0
    return float(binomtest(only_one, only_one + only_two).pvalue)


def holm(p_values: list[float]) -> list[float]:
    """p-values corrected for their number: S. Holm, Scand. J. Stat. 6 (1979) 65.

    >>> holm([0.04, 0.01, 0.03])
    [0.06, 0.03, 0.06]
    """
    corrected, highest = [0.0] * len(p_values), 0.0
    for step, row in enumerate(np.argsort(p_values, kind="stable")):
        highest = max(highest, min(1.0, p_values[row] * (len(p_values) - step)))
        corrected[row] = highest
    return corrected


# ---- tell -----------------------------------------------------------------------------------------


def _title(rows: list[Row]) -> str:
    newest = max((row.run for row in rows), key=lambda run: run.time)
    queries, gallery = newest.size
    return f"{newest.settings.get('query_dir', 'unknown images')}: {queries} queries × {gallery} images"


def _told_apart(rows: list[Row]) -> list[str]:
    """A name for each row: with its time where another has the same, as of a network trained again."""
    names = [row.run.name for row in rows]
    times = [f"{row.run.time:%Y-%m-%d %H:%M:%S}" for row in rows]
    return [name if names.count(name) == 1 else f"{name}, {time}"
            for name, time in zip(names, times, strict=True)]  # fmt: skip


def _cells(rows: list[Row]) -> list[list[str]]:
    """The table: its heads, then a list a run."""
    heads = [
        "network",
        "tuned",
        *(f"top-{cut}" for cut in CUTS),
        "score",
        "to the best",
        "told apart by",
        "s",
    ]
    if any(row.run.server_score is not None for row in rows):
        heads.insert(-3, "server")
    named = zip(_told_apart(rows), rows, strict=True)
    return [heads, *(_cells_of(name, row, "server" in heads) for name, row in named)]


def _cells_of(name: str, row: Row, with_server: bool) -> list[str]:
    run, metrics = row.run, row.run.metrics
    again = f" ({run.count} runs)" if run.count > 1 else ""
    shares = [_figure(metrics, f"top_{cut}", lambda share: f"{share:.3f}".removeprefix("0")) for cut in CUTS]
    difference = "–"
    if row.difference:
        by, (low, high) = row.difference
        difference = f"{by:+.0f} [{low:+.0f}, {high:+.0f}]"
    server = [] if not with_server else ["–" if run.server_score is None else f"{run.server_score:g}"]
    return [name + again, run.tuned, *shares,
            _figure(metrics, "score", lambda score: f"{score:.0f}"), *server, difference, row.apart,
            "–" if run.seconds is None else f"{run.seconds:.0f}"]  # fmt: skip


def _figure(metrics: dict[str, Any], name: str, told: Any) -> str:
    """A figure with its interval."""
    if name not in metrics:
        return "–"
    low, high = metrics[f"{name}_interval"]
    return f"{told(metrics[name])} [{told(low)}, {told(high)}]"


def _aligned(cells: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    return "\n".join(line.rstrip() for line in lines)


def _markdown(cells: list[list[str]]) -> str:
    escaped = [[_escaped(cell).replace("|", r"\|") for cell in line] for line in cells]
    heads, *lines = [f"| {' | '.join(line)} |" for line in escaped]
    return "\n".join([heads, "|---" * len(cells[0]) + "|", *lines])


def _escaped(text: str) -> str:
    """For Markdown: on one line and without tags."""
    return escape(" ".join(text.split()), quote=False)


def _bars(rows: list[Row]) -> list[dict[str, Any]]:
    """Where the score of each run and its interval lie, in percent of the way from 0 to 1000."""
    bars = []
    named = zip(_told_apart(rows), (row.run for row in rows), strict=True)
    for name, run in ((name, run) for name, run in named if "score" in run.metrics):
        score, (low, high) = run.metrics["score"], run.metrics["score_interval"]
        bars.append({"name": name, "score": f"{score:.1f}", "at": score / 10, "low": low / 10,
                     "width": (high - low) / 10})  # fmt: skip
    return bars
