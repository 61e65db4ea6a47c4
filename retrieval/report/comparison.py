"""The ledgers of runs in; a table of the runs on the same images, with paired tests between them, out."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from itertools import chain
from pathlib import Path
from urllib.parse import quote

import numpy as np
from scipy.stats import binomtest

from retrieval.files import write_whole
from retrieval.html import render
from retrieval.metrics import CUTS, MORE, compare, points_of
from retrieval.report.ledgers import RunLine, read_ledgers

PAGE, TABLE = "comparison.html", "comparison.md"
MOST_NAMES = 200  # in a list of the page
ALPHA = 0.05
NOTE = (
    "In brackets: the 95 % interval. Each run is compared with the best, query by query: top-1 by McNemar's "
    "exact test (5 %, corrected by Holm for the rows of a table), the score by a paired bootstrap, whose "
    "interval is not corrected and must exclude 0. MAP@R cuts R, a query's number of right images, to the "
    "number of ranked images: k, but at least 10. s: the seconds of the run without its page; vectors that "
    "came from the cache (of the gallery) cost none."
)

TEMPLATES = Path(__file__).with_name("templates")
log = logging.getLogger("retrieval.comparison")


@dataclass(frozen=True)
class Row:
    """A run beside the best one on the same images."""

    name: str
    run: RunLine
    difference: tuple[float, list[float]] | None = None  # of the score, with its 95 % interval
    p: float = 1.0  # of McNemar's test on the first matches, corrected by Holm
    only_best: list[str] | None = None  # queries whose first match is right in the best run only
    only_this: list[str] | None = None  # and in this run only

    @property
    def significant(self) -> str:
        """Name the metrics in which the run differs significantly from the best one."""
        if self.difference is None:
            return "–"
        low, high = self.difference[1]
        differs = {"score": high < 0 or low > 0, "top-1": self.p < ALPHA}
        return " and ".join(metric for metric, is_so in differs.items() if is_so) or "no"


def compare_ledgers(folders: list[Path]) -> Path:
    """Log which runs are better than which, write comparison.html and comparison.md, and return the page.

    Reads every runs.jsonl in and below the folders; a ledger can stand for its folder. Raises InputError if
    there is no ledger, or no run in any.
    """
    out = folders[0].parent if folders[0].is_file() else folders[0]
    groups = [{"title": _title(rows), "rows": rows, "tables": [_cells(rows), *_more_cells(rows)],
               "pages": [_address(row.run.page, out) for row in rows]}
              for rows in map(_beside_the_best, _grouped(read_ledgers(folders)))]  # fmt: skip
    tables = [[f"**{_escaped(group['title'])}**", *map(_markdown, group["tables"])] for group in groups]
    text = "\n\n".join([*chain(*tables), NOTE])
    log.info("%s", text)
    write_whole(out / TABLE, f"{text}\n".encode("utf-8", "replace"))
    write_whole(out / PAGE, render(TEMPLATES, "comparison.html", title="Runs compared", groups=groups,
                                   most=MOST_NAMES, note=NOTE))  # fmt: skip
    return out / PAGE


def _address(page: Path | None, folder: Path) -> str:
    """Return the address of a run's page in a page that lies in `folder`, "" if there is none."""
    return quote(os.fsencode(os.path.relpath(page, folder)).replace(b"\\", b"/")) if page else ""


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
    """Compare each run with the first one, query by query, if the images have labels."""
    best, *others = runs
    names = _row_names(runs)
    if best.first is None:
        return [Row(name, run) for name, run in zip(names, runs, strict=True)]
    queries = best.query_names()
    p_values = holm([mcnemar(best.first, run.first) for run in others])
    compared = zip(names[1:], others, p_values, strict=True)
    return [Row(names[0], best), *(_compared(name, run, p, best, queries) for name, run, p in compared)]


def _compared(name: str, run: RunLine, p: float, best: RunLine, queries: list[str]) -> Row:
    first_matches = list(zip(queries, best.first, run.first, strict=True))
    return Row(
        name,
        run,
        compare(points_of(np.array(run.first)), points_of(np.array(best.first))),
        p,
        only_best=[query for query, of_best, of_run in first_matches if of_best == 1 != of_run],
        only_this=[query for query, of_best, of_run in first_matches if of_run == 1 != of_best],
    )


def mcnemar(first: tuple[int, ...], other: tuple[int, ...]) -> float:
    """Return the exact two-sided p-value of McNemar's test of two runs' first matches.

    Null hypothesis: a query that only one run matches right is equally likely to be either run's.
    Q. McNemar, Psychometrika 12 (1947) 153.

    >>> mcnemar((1, 1, 1, 1, 1, 1, 2, 1), (2, 0, 3, 2, 2, 4, 1, 1))  # 6 against 1: 2 · (1 + 7) / 2⁷
    0.125
    """
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


def _row_names(runs: list[RunLine]) -> list[str]:
    """Name each run, with its time if another has the same name, such as a network trained again."""
    names = [run.name for run in runs]
    return [name if names.count(name) == 1 else f"{name}, {run.time:%Y-%m-%d %H:%M:%S}"
            for name, run in zip(names, runs, strict=True)]  # fmt: skip


def _cells(rows: list[Row]) -> list[list[str]]:
    """Return the cells of the table: the heads, then a list for each run."""
    shares = [f"top-{cut}" for cut in CUTS]
    heads = ["network", "tuned", *shares, "score", "to the best", "told apart by", "s"]
    if any(row.run.accuracy is not None for row in rows):
        heads.insert(-3, "server")
    return [heads, *(_cells_of(row, "server" in heads) for row in rows)]


def _more_cells(rows: list[Row]) -> list[list[list[str]]]:
    """Return the cells of a second table, of the metrics of MORE; no table where no run has them."""
    if not any("mrr" in row.run.estimates for row in rows):
        return []
    lines = [[row.name, str(row.run.k), *(_share(row.run, name) for name in MORE)] for row in rows]
    return [[["network", "k", *MORE.values()], *lines]]


def _cells_of(row: Row, with_server: bool) -> list[str]:
    run = row.run
    again = f" ({run.count} runs)" if run.count > 1 else ""
    shares = [_share(run, f"top_{cut}") for cut in CUTS]
    difference = "–"
    if row.difference:
        by, (low, high) = row.difference
        difference = f"{by:+.0f} [{low:+.0f}, {high:+.0f}]"
    server = run.accuracy
    of = "" if run.cached == run.gallery_images else f"{run.cached} of {run.gallery_images} "
    cached = f" ({of}cached)" if run.cached else ""
    return [row.name + again, "yes" if run.tuned else "no", *shares,
            _estimate(run, "score", lambda score: f"{score:.0f}"),
            *(["–" if server is None else f"{server:g}"] if with_server else []), difference, row.significant,
            f"{run.seconds:.0f}{cached}"]  # fmt: skip


def _share(run: RunLine, metric: str) -> str:
    """Show a share, such as .912 [.890, .930]."""
    return _estimate(run, metric, lambda share: f"{share:.3f}".removeprefix("0"))


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
