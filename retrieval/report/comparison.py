"""The ledgers of runs in; a table of the runs on the same images, with paired tests between them, out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path

import numpy as np

from retrieval.files import write_whole
from retrieval.html import render
from retrieval.metrics import CUTS, compare, points_of
from retrieval.report.ledgers import RunLine, read_ledgers

PAGE, TABLE = "comparison.html", "comparison.md"
MOST_NAMES = 200  # in a list of the page
ALPHA = 0.05
NOTE = (
    "In brackets: the 95 % interval. Each run is compared with the best, query by query: top-1 by McNemar's "
    "exact test (5 %, corrected by Holm for the rows of a table), the score by a paired bootstrap, whose "
    "interval is not corrected and must exclude 0."
)

TEMPLATES = Path(__file__).with_name("templates")
log = logging.getLogger("retrieval.comparison")


@dataclass(frozen=True)
class Row:
    """A run beside the best one on the same images."""

    run: RunLine
    difference: tuple[float, list[float]] | None = None  # of the score, with its 95 % interval
    p: float | None = None  # of McNemar's test on the first matches, corrected by Holm
    only_best: list[str] | None = None  # queries whose first match is right in the best run only
    only_this: list[str] | None = None  # and in this run only

    @property
    def significant(self) -> str:
        """Name the metrics in which the run differs significantly from the best one."""
        if self.difference is None or self.p is None:
            return "–"
        low, high = self.difference[1]
        differs = {"score": high < 0 or low > 0, "top-1": self.p < ALPHA}
        return " and ".join(metric for metric, is_so in differs.items() if is_so) or "no"


def compare_ledgers(folders: list[Path]) -> Path:
    """Log which runs are better than which, write comparison.html and comparison.md, and return the page.

    Reads every runs.jsonl in and below the folders; a ledger can stand for its folder. Raises InputError if
    there is no ledger, or no run in any.
    """
    groups = [_beside_the_best(runs) for runs in _grouped(read_ledgers(folders))]
    tables = [f"**{_escaped(_title(rows))}**\n\n{_markdown(_cells(rows))}" for rows in groups]
    text = "\n\n".join([*tables, NOTE])
    log.info("%s", text)
    out = folders[0].parent if folders[0].is_file() else folders[0]
    write_whole(out / TABLE, f"{text}\n".encode("utf-8", "replace"))
    shown = [{"title": _title(rows), "cells": _cells(rows),
              "rows": list(zip(_row_names(rows), rows, strict=True)),
              "scores": [(name, row.run.estimates["score"])
                         for name, row in zip(_row_names(rows), rows, strict=True)
                         if "score" in row.run.estimates],
              "runs": sum(row.run.count for row in rows)} for rows in groups]  # fmt: skip
    write_whole(out / PAGE, render(TEMPLATES, "comparison.html", title="Runs compared", groups=shown,
                                   most=MOST_NAMES, note=NOTE))  # fmt: skip
    return out / PAGE


def _grouped(runs: list[RunLine]) -> list[list[RunLine]]:
    """Group the runs by their images, the best first; the newest of equal runs stands for all of them."""
    groups: dict[str, dict[tuple, list[RunLine]]] = {}
    for run in sorted(runs, key=lambda run: run.time):
        groups.setdefault(run.names, {}).setdefault(run.identity, []).append(run)
    newest = [[runs[-1].model_copy(update={"count": len(runs)}) for runs in group.values()]
              for group in groups.values()]  # fmt: skip
    return [sorted(runs, key=lambda run: -run.sort_score) for runs in newest]


# ---- compare --------------------------------------------------------------------------------------


def _beside_the_best(runs: list[RunLine]) -> list[Row]:
    """Compare each run with the first one, and correct the p-values for their number."""
    best, *others = runs
    names = best.query_names()
    rows = [Row(best), *(_compared(run, best, names) for run in others)]
    corrected = iter(holm([row.p for row in rows if row.p is not None]))
    return [row if row.p is None else replace(row, p=next(corrected)) for row in rows]


def _compared(run: RunLine, best: RunLine, names: list[str]) -> Row:
    """Compare a run with the best one, query by query, if the labels are known for both."""
    if not (best.first and run.first):
        return Row(run)
    pairs = list(zip(names, best.first, run.first, strict=True))
    return Row(
        run,
        compare(points_of(list(run.first)), points_of(list(best.first))),
        mcnemar(best.first, run.first),
        only_best=[name for name, of_best, of_run in pairs if of_best == 1 != of_run],
        only_this=[name for name, of_best, of_run in pairs if of_run == 1 != of_best],
    )


def mcnemar(first: tuple[int, ...], other: tuple[int, ...]) -> float:
    """Return the exact two-sided p-value of McNemar's test of two runs' first matches.

    Null hypothesis: a query that only one run matches right is equally likely to be either run's.
    Q. McNemar, Psychometrika 12 (1947) 153.

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
    """Return the p-values corrected for their number: S. Holm, Scand. J. Stat. 6 (1979) 65.

    >>> holm([0.04, 0.01, 0.03])
    [0.06, 0.03, 0.06]
    """
    corrected, highest = [0.0] * len(p_values), 0.0
    for step, row in enumerate(np.argsort(p_values, kind="stable")):
        highest = max(highest, min(1.0, p_values[row] * (len(p_values) - step)))
        corrected[row] = highest
    return corrected


# ---- show -----------------------------------------------------------------------------------------


def _title(rows: list[Row]) -> str:
    newest = max((row.run for row in rows), key=lambda run: run.time)
    return f"{newest.query_dir}: {newest.queries} queries × {newest.gallery_images} images"


def _row_names(rows: list[Row]) -> list[str]:
    """Name each row, with its time if another has the same name, such as a network trained again."""
    names = [row.run.name for row in rows]
    times = [f"{row.run.time:%Y-%m-%d %H:%M:%S}" for row in rows]
    return [name if names.count(name) == 1 else f"{name}, {time}"
            for name, time in zip(names, times, strict=True)]  # fmt: skip


def _cells(rows: list[Row]) -> list[list[str]]:
    """Return the cells of the table: the heads, then a list for each run."""
    shares = [f"top-{cut}" for cut in CUTS]
    heads = ["network", "tuned", *shares, "score", "to the best", "told apart by", "s"]
    if any(row.run.accuracy is not None for row in rows):
        heads.insert(-3, "server")
    named = zip(_row_names(rows), rows, strict=True)
    return [heads, *(_cells_of(name, row, "server" in heads) for name, row in named)]


def _cells_of(name: str, row: Row, with_server: bool) -> list[str]:
    run = row.run
    again = f" ({run.count} runs)" if run.count > 1 else ""
    shares = [_estimate(run, f"top_{cut}", lambda share: f"{share:.3f}".removeprefix("0")) for cut in CUTS]
    difference = "–"
    if row.difference:
        by, (low, high) = row.difference
        difference = f"{by:+.0f} [{low:+.0f}, {high:+.0f}]"
    server, seconds = run.accuracy, run.seconds
    return [name + again, "yes" if run.tuned else "no", *shares,
            _estimate(run, "score", lambda score: f"{score:.0f}"),
            *(["–" if server is None else f"{server:g}"] if with_server else []), difference, row.significant,
            "–" if seconds is None else f"{seconds:.0f}"]  # fmt: skip


def _estimate(run: RunLine, metric: str, as_text: Callable[[float], str]) -> str:
    """Show a metric with its interval."""
    if metric not in run.estimates:
        return "–"
    value, (low, high) = run.estimates[metric]
    return f"{as_text(value)} [{as_text(low)}, {as_text(high)}]"


def _markdown(cells: list[list[str]]) -> str:
    """Return the table in Markdown, with its columns aligned for the console."""
    escaped = [[_escaped(cell).replace("|", r"\|") for cell in line] for line in cells]
    widths = [max(map(len, column)) for column in zip(*escaped, strict=True)]
    escaped.insert(1, ["-" * width for width in widths])
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in escaped]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def _escaped(text: str) -> str:
    """Put a text on one line, without tags, for Markdown."""
    return escape(" ".join(text.split()), quote=False)
