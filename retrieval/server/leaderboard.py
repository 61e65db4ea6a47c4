"""A database and the rules in; the values that the page templates and the CSV table show out."""

from __future__ import annotations

import csv
import io
from datetime import datetime
from typing import Any
from urllib.parse import quote

from retrieval.server.answer_key import AnswerKey
from retrieval.server.database import Database, Standing
from retrieval.server.rules import Rules

LINE = (120, 28)  # pixels of a group's small line
LARGE = (600, 120)
LONGEST_LINE = 60  # scores


def board(database: Database, key: AnswerKey, rules: Rules) -> dict[str, Any]:
    """Return the values that leaderboard.html shows."""
    return {
        "standings": [(rank, standing, page_of(standing.team), line(standing.history), moment(standing.when))
                      for rank, standing in enumerate(database.standings(rules.partly), 1)],
        "queries": len(rules.public) if rules.partly else len(key.queries),
        "gallery": len(key.gallery),
        "partly": rules.partly,
        "closes_at": moment(rules.closes_at) if rules.closes_at else "",
        "closed": rules.closed,
    }  # fmt: skip


def history(database: Database, rules: Rules, team: str) -> dict[str, Any]:
    """Return the values that submissions.html shows."""
    scored, refused = database.submissions_of(team, rules.partly), database.refused_of(team)
    return {
        "team": team,
        "any": bool(scored or refused),
        "scored": [(moment(when), accuracy, repeats) for when, accuracy, repeats in scored],
        "refused": [(moment(when), status, reason) for when, status, reason in refused],
        "line": line([accuracy for _, accuracy, _ in reversed(scored)], *LARGE),
        "partly": rules.partly,
    }


def as_csv(standings: list[Standing]) -> str:
    """Return the leaderboard as a CSV table."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["rank", "group", "score", "time", "submissions"])
    for rank, standing in enumerate(standings, 1):
        writer.writerow([rank, _plain(standing.team), standing.best, standing.when, standing.count])
    return text.getvalue()


def page_of(team: str) -> str:
    """Return the address of a group's page. Browsers take . and .. for folders, however they are escaped.

    >>> page_of("a/b c"), page_of("..")
    ('/submissions/a%2Fb%20c', '/submissions/?group=..')
    """
    return f"/submissions/?group={team}" if team in (".", "..") else f"/submissions/{quote(team, safe='')}"


def moment(when: datetime | str) -> str:
    """Return a moment in this machine's time zone, for people to read."""
    taken = datetime.fromisoformat(when) if isinstance(when, str) else when
    return taken.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def line(scores: list[float], width: int = LINE[0], height: int = LINE[1]) -> str:
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
