"""Standings, moments and scores in; the CSV table, and what the page templates show of them, out."""

from __future__ import annotations

import csv
import io
from datetime import datetime

from retrieval.server.database import Standing

LONGEST_LINE = 60  # scores


def as_csv(standings: list[Standing]) -> str:
    """Return the leaderboard as a CSV table."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["rank", "group", "score", "time", "submissions"])
    for rank, standing in enumerate(standings, 1):
        writer.writerow([rank, _plain(standing.team), standing.best, standing.when, standing.count])
    return text.getvalue()


def moment(when: datetime | str) -> str:
    """Return a moment in this machine's time zone, for people to read."""
    taken = datetime.fromisoformat(when) if isinstance(when, str) else when
    return taken.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def line(scores: list[float], width: int, height: int) -> str:
    """Return the last LONGEST_LINE scores, 0 to 1000, as the points of an SVG polyline.

    >>> line([0, 1000], 106, 26)
    '3.0,23.0 103.0,3.0'
    """
    shown = scores[-LONGEST_LINE:]
    step = (width - 6) / max(1, len(shown) - 1)
    return " ".join(
        f"{3 + n * step:.1f},{height - 3 - (height - 6) * value / 1000:.1f}" for n, value in enumerate(shown)
    )


def _plain(text: str) -> str:
    """Return a text that no spreadsheet takes for a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text
