"""An answer key, a database and the rules in; the web application that scores submissions out."""

from __future__ import annotations

import csv
import hashlib
import io
import logging
import re
import sqlite3
from base64 import b64encode
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, PlainTextResponse
from starlette.exceptions import HTTPException

from retrieval.html import render
from retrieval.server.answer_key import AnswerKey
from retrieval.server.database import Database, Standing
from retrieval.server.endpoint import SAFE, SubmissionEndpoint, json_answer, refusal
from retrieval.server.kept import Kept
from retrieval.server.rules import Rules, moment
from retrieval.submission.protocol import SHAPE, TOKEN

DESCRIPTION = (
    f"POST /retrieval/ with {SHAPE}: the answer is the score, 600 · top-1 + 300 · top-5 + 100 · top-10."
)
SENTENCES = {
    404: "there is nothing here: submissions are POSTed to /retrieval/, with the slash at its end",
    405: "this address does not take this method: submissions are POSTed to /retrieval/, all else is GET",
}
REFUSALS = {
    403: {"description": "the competition is over, or the token is wrong"},
    408: {"description": "the body came too slowly"},
    413: {"description": "the body is too large"},
    422: {"description": "the submission cannot be scored: the sentence says why"},
    429: {"description": "too many submissions: Retry-After says when"},
    503: {"description": "the submission could not be kept: send it again"},
}

LONGEST_LINE = 60  # scores
TEMPLATES = Path(__file__).with_name("templates")
log = logging.getLogger("retrieval.server")


def make_app(key: AnswerKey, database: Database, rules: Rules) -> FastAPI:
    """Return the application. It stores each submission on the disk before it answers."""
    app = FastAPI(title="Image retrieval: evaluation server", description=DESCRIPTION, version="1",
                  docs_url=None, redoc_url=None, redirect_slashes=False)  # fmt: skip
    endpoint = SubmissionEndpoint(key, database, rules)

    def show(template: str, **values: Any) -> bytes:
        """Render a template, which may use `rules`, `moment` and `line`."""
        return render(TEMPLATES, template, rules=rules, line=_line, moment=moment, **values)

    def _draw_leaderboard() -> Response:
        standings, queries = database.standings(rules.partly), rules.public if rules.partly else key.queries
        counts = {"queries": len(queries), "gallery": len(key.gallery)}
        return _page(show("leaderboard.html", standings=standings, **counts))

    board, board_as_csv = Kept(_draw_leaderboard), Kept(lambda: _as_csv(database.standings(rules.partly)))

    @app.post("/retrieval/", summary="Score a submission", responses=REFUSALS)
    async def retrieval(request: Request) -> Response:
        return await endpoint.answer(request)

    @app.head("/", include_in_schema=False)
    @app.get("/", response_class=HTMLResponse, summary="The leaderboard")
    def leaderboard(request: Request) -> Response:
        """Answer with the page, or with 304 if the browser has it already."""
        answer = board.at(_state(database, rules))
        etag = answer.headers["ETag"]
        if request.headers.get("If-None-Match") == etag:
            return Response(status_code=304, headers=SAFE | {"ETag": etag})
        return answer

    @app.head("/leaderboard.csv", include_in_schema=False)
    @app.get("/leaderboard.csv", response_class=PlainTextResponse, summary="The leaderboard as a table")
    def table() -> Response:
        return board_as_csv.at(_state(database, rules))

    @app.head("/submissions/{group:path}", include_in_schema=False)
    @app.get("/submissions/{group:path}", response_class=HTMLResponse, summary="A group's own history")
    def submissions(request: Request, group: str) -> Response:
        """Show the group's scores, and its refused submissions with the reasons."""
        team = database.known(group or request.query_params.get("group", ""))
        scored, refused = database.submissions_of(team, rules.partly), database.refused_of(team)
        page = show("submissions.html", team=team, scored=scored, refused=refused)
        return _page(page, 200 if scored or refused else 404)

    @app.head("/docs", include_in_schema=False)
    @app.get("/docs", response_class=HTMLResponse, summary="How to submit")
    def docs(request: Request) -> Response:
        """Describe the protocol and the rules in words."""
        url = f"{request.base_url}retrieval/"
        return _page(show("docs.html", url=url, api=app.openapi(), token=TOKEN, shape=SHAPE))

    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz", summary="Whether the server runs")
    def health() -> Response:
        return json_answer({"status": "ok", "submissions": database.count(), "closed": rules.closed})

    app.add_exception_handler(HTTPException, _answer_http_error)
    app.add_exception_handler(sqlite3.Error, _answer_database_error)
    return app


# ---- answers --------------------------------------------------------------------------------------


def _page(page: bytes, status: int = 200) -> Response:
    """Answer with a page that runs no script but its own, and loads nothing from elsewhere."""
    scripts = re.findall(rb"<script>(.*?)</script>", page, re.S)
    hashes = [b64encode(hashlib.sha256(script).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes) or "'none'"
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src {allowed}; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    etag = f'"{hashlib.sha256(page).hexdigest()[:32]}"'
    return HTMLResponse(page, status, SAFE | {"Content-Security-Policy": policy, "ETag": etag})


async def _answer_http_error(_: Request, error: HTTPException) -> Response:
    sentence = SENTENCES.get(error.status_code, error.detail)
    return refusal(sentence, error.status_code, error.headers)


async def _answer_database_error(_: Request, error: sqlite3.Error) -> Response:
    log.error("the database cannot be read: %s", error)
    return refusal("the database cannot be read now: ask again", 503)


# ---- what the pages show --------------------------------------------------------------------------


def _state(database: Database, rules: Rules) -> tuple[int, bool, bool]:
    """Return what changes whenever the leaderboard does."""
    return database.version(), rules.partly, rules.closed


def _as_csv(standings: list[Standing]) -> Response:
    """Answer with the leaderboard as a CSV table."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["rank", "group", "score", "time", "submissions"])
    for rank, standing in enumerate(standings, 1):
        writer.writerow([rank, _no_formula(standing.team), standing.best, standing.when, standing.count])
    return Response(text.getvalue(), headers=SAFE, media_type="text/csv")


def _no_formula(text: str) -> str:
    """Return a text that no spreadsheet takes for a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text


def _line(scores: list[float], width: int, height: int) -> str:
    """Return the last LONGEST_LINE scores, 0 to 1000, as the points of an SVG polyline.

    >>> _line([0, 1000], 106, 26)
    '3.0,23.0 103.0,3.0'
    """
    shown = scores[-LONGEST_LINE:]
    step = (width - 6) / max(1, len(shown) - 1)
    return " ".join(
        f"{3 + n * step:.1f},{height - 3 - (height - 6) * value / 1000:.1f}" for n, value in enumerate(shown)
    )
