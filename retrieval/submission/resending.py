"""The outcome of a submission that was sent again in; it in the files that hold its run's outcome, out."""

from __future__ import annotations

import json
import logging
import re
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

from retrieval.files import as_json, write_whole
from retrieval.run import EARLIER, LEDGER, SUBMISSION, Outcome, append_line
from retrieval.settings import Form

OUTCOME = re.compile(rb'(?<=<p id="outcome">).*?(?=</p>)', re.S)  # the sentence in report.html

log = logging.getLogger("retrieval.submission")


def rename_group(path: Path, submission: dict[str, Any], group: str) -> dict[str, Any]:
    """Give a saved submission another group name, also in its file, and return it."""
    renamed = submission | {"groupname": group}
    if renamed != submission:
        write_whole(path, as_json(renamed))
        log.info("%s has the group name %r now, in place of %r", path, group, submission["groupname"])
    return renamed


def record_outcome(path: Path, submission: dict[str, Any], settings: Form, outcome: Outcome) -> None:
    """Append the outcome to the ledger, and write a score into metrics.json and report.html beside the file.

    The ledger's line names the line of the run that made the submission. The ledger of a submission in
    earlier/ is the one of its output folder. A file of another name belongs to no run.
    """
    folder = path.absolute().parent
    home = folder.parent.parent if folder.parent.name == EARLIER else folder
    metrics = _metrics_beside(path) if path.name == SUBMISSION else {}
    run = _line_of_run(home / LEDGER, metrics)
    append_line(home, settings, outcome, group_name=submission["groupname"], **({"run": run} if run else {}))
    if outcome.accuracy is None or path.name != SUBMISSION or not _still_holds(path, submission):
        return
    written = [home / LEDGER]
    if metrics:
        written.append(path.with_name("metrics.json"))
        write_whole(written[-1], as_json(metrics | outcome.metrics, indent=2))
    page = path.with_name("report.html")
    if page.exists() and OUTCOME.search(page.read_bytes()):
        when = f"sent again as {submission['groupname']!r} on {datetime.now():%Y-%m-%d %H:%M}"
        sentence = escape(f"{when}: {outcome.sentence}").encode("utf-8", "replace")
        write_whole(page, OUTCOME.sub(lambda _: sentence, page.read_bytes(), count=1))
        written.append(page)
    log.info("the score is also in %s", ", ".join(map(str, written)))


def _still_holds(path: Path, submission: dict[str, Any]) -> bool:
    """Return whether the file holds the submission that was sent: a new run may have replaced it."""
    try:
        return json.loads(path.read_bytes()) == submission
    except (OSError, ValueError):
        return False


def _metrics_beside(path: Path) -> dict[str, Any]:
    """Return the metrics of the run that made a submission; {} if it left none."""
    try:
        metrics = json.loads(path.with_name("metrics.json").read_bytes())
    except (OSError, ValueError):  # it is lost, or was changed
        return {}
    return metrics if isinstance(metrics, dict) else {}


def _line_of_run(ledger: Path, metrics: dict[str, Any]) -> int | None:
    """Return the number of the run's line, from 1, which has the time of its metrics.json."""
    found, time = None, metrics.get("time")
    for number, line in enumerate(ledger.read_bytes().splitlines() if ledger.exists() else [], 1):
        try:
            content = json.loads(line)
        except ValueError:  # a line that a crash cut off
            continue
        if time and isinstance(content, dict) and content.get("time") == time:
            found = number
    return found
