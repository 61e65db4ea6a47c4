"""An answer key, a database and the rules in; the web application that scores submissions out."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import math
import re
import sqlite3
import threading
import time
from base64 import b64encode
from collections import deque
from pathlib import Path
from typing import Any

import anyio
from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, PlainTextResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from retrieval.html import render
from retrieval.server.database import Database, Judged, Kept
from retrieval.server.leaderboard import as_csv, board, history, moment
from retrieval.server.scoring import (
    AnswerKey,
    RefusedError,
    Rules,
    Score,
    judge,
    read_body,
    score,
)
from retrieval.submission.protocol import NAMES_PER_QUERY, SHAPE, TOKEN

MOST_BYTES = 16 * 2**20  # of a body: a submission of 1455 queries has 0.6 MB
SECONDS_FOR_A_BODY = 30
MINUTE = 60  # seconds
MOST_REMEMBERED = 10_000  # groups and addresses
DESCRIPTION = (
    f"POST /retrieval/ with {SHAPE}: the answer is the score, 600 · top-1 + 300 · top-5 + 100 · top-10."
)
SENTENCES = {
    404: "there is nothing here: submissions are POSTed to /retrieval/, with the slash at its end",
    405: "this is not how it is asked for: submissions are POSTed to /retrieval/, all else is GET",
}
SAFE = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}

TEMPLATES = Path(__file__).with_name("templates")
log = logging.getLogger("retrieval.server")


class TurnedAwayError(Exception):
    """A submission that is not scored: the status and the sentence of the answer."""

    def __init__(
        self, status: int, sentence: str, headers: dict[str, str] | None = None, team: str | None = None
    ) -> None:
        super().__init__(sentence)
        self.status, self.sentence, self.headers, self.team = status, sentence, headers or {}, team


def make_app(key: AnswerKey, database: Database, rules: Rules) -> FastAPI:
    """The application. It keeps each submission on the disk before it answers."""
    app = FastAPI(title="Image retrieval: evaluation server", description=DESCRIPTION, version="1",
                  docs_url=None, redoc_url=None, redirect_slashes=False)  # fmt: skip
    judge_all = _Judge(key, database, rules)
    drawn = _Drawn(key, database, rules)

    @app.post("/retrieval/", summary="Score a submission", openapi_extra=_described_body())
    async def retrieval(request: Request) -> Response:
        return await judge_all.answer(request)

    @app.head("/", include_in_schema=False)
    @app.get("/", response_class=HTMLResponse, summary="The leaderboard")
    def leaderboard(request: Request) -> Response:
        return drawn.answer(request)

    @app.head("/leaderboard.csv", include_in_schema=False)
    @app.get("/leaderboard.csv", response_class=PlainTextResponse, summary="The leaderboard as a table")
    def table() -> Response:
        return Response(as_csv(database.standings(rules.partly)), headers=SAFE, media_type="text/csv")

    @app.head("/submissions/{group:path}", include_in_schema=False)
    @app.get("/submissions/{group:path}", response_class=HTMLResponse, summary="A group's own history")
    def submissions(request: Request, group: str) -> Response:
        """The group's scores, and what was refused and why."""
        told = history(database, rules, group or request.query_params.get("group", ""))
        return _page(render(TEMPLATES, "submissions.html", **told), 200 if told["any"] else 404)

    @app.head("/docs", include_in_schema=False)
    @app.get("/docs", response_class=HTMLResponse, summary="How to submit")
    def docs(request: Request) -> Response:
        """The protocol and the rules, in words."""
        url = f"{request.base_url}retrieval/"
        return _page(
            render(TEMPLATES, "docs.html", url=url, api=app.openapi(), rules=rules, token=TOKEN, shape=SHAPE)
        )

    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz", summary="Whether the server runs")
    def health() -> Response:
        return _json({"status": "ok", "submissions": database.count(), "closed": rules.closed})

    app.add_exception_handler(HTTPException, _tell)
    app.add_exception_handler(sqlite3.Error, _tell_of_database)
    return app


def _described_body() -> dict[str, Any]:
    """What /docs says of the body, which is read by hand: unread where it is too large."""
    names = {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": NAMES_PER_QUERY}
    images = {"type": "object", "additionalProperties": names}
    schema = {"type": "object", "required": ["groupname", "images"],
              "properties": {"groupname": {"type": "string"}, "images": images}}  # fmt: skip
    answers = {403: "the competition is over, or the token is wrong", 408: "the body came too slowly",
               413: "the body is too large", 422: "the submission cannot be scored: the sentence says why",
               429: "too many submissions: Retry-After says when",
               503: "the submission could not be kept: send it again"}  # fmt: skip
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "responses": {str(status): {"description": what} for status, what in answers.items()},
    }


# ---- answers --------------------------------------------------------------------------------------


def _json(content: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """As JSON. What UTF-8 cannot say, but a file name and so an identity may hold, becomes a JSON escape."""
    body = json.dumps(content, ensure_ascii=False).encode("utf-8", "backslashreplace")
    return Response(body, status, SAFE | (headers or {}), "application/json")


def _page(page: bytes, status: int = 200) -> Response:
    """A page that runs no script but its own, and loads nothing from elsewhere."""
    scripts = re.findall(rb"<script>(.*?)</script>", page, re.S)
    hashes = [b64encode(hashlib.sha256(script).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{word}'" for word in hashes) or "'none'"
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src {allowed}; img-src data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    etag = f'"{hashlib.sha256(page).hexdigest()[:32]}"'
    return HTMLResponse(page, status, SAFE | {"Content-Security-Policy": policy, "ETag": etag})


async def _tell(_: Request, error: HTTPException) -> Response:
    return _json({"detail": SENTENCES.get(error.status_code, error.detail)}, error.status_code, error.headers)


async def _tell_of_database(_: Request, error: sqlite3.Error) -> Response:
    log.error("the database cannot be read: %s", error)
    return _json({"detail": "the database cannot be read now: ask again"}, 503)


class _Drawn:
    """The leaderboard, drawn anew only when it has changed: a hall full of browsers asks for it."""

    def __init__(self, key: AnswerKey, database: Database, rules: Rules) -> None:
        self.of = (database, key, rules)
        self.drawing = threading.Lock()
        self.state: tuple | None = None
        self.page = b""

    def answer(self, request: Request) -> Response:
        """The page, or that it is still the one that the browser has."""
        database, _, rules = self.of
        with self.drawing:
            state = (database.version(), rules.partly, rules.closed)
            if self.state != state:
                self.page, self.state = render(TEMPLATES, "leaderboard.html", **board(*self.of)), state
            answer = _page(self.page)
        if request.headers.get("If-None-Match") == answer.headers["ETag"]:
            return Response(status_code=304, headers=SAFE | {"ETag": answer.headers["ETag"]})
        return answer


# ---- POST /retrieval/ -----------------------------------------------------------------------------


class _Judge:
    """From a request to its answer."""

    def __init__(self, key: AnswerKey, database: Database, rules: Rules) -> None:
        self.key, self.database, self.rules = key, database, rules
        # One thread judges, since more would only keep each other waiting for the one interpreter.
        self.judging = anyio.CapacityLimiter(1)
        self.groups: dict[str, deque[float]] = {}  # when each last submitted, as that thread knows
        self.addresses: dict[str, deque[float]] = {}

    async def answer(self, request: Request) -> Response:
        """Score a submission and keep it, or say why not and log that."""
        try:
            if self.rules.per_address:
                address = request.client.host if request.client else ""
                _keep_pace(self.addresses, "address", address, self.rules.per_address)
            self._require_open()
            body = await _read(request)
            self._require_open()  # a body may take its time
            received = self.rules.now().isoformat(timespec="milliseconds")
            told, row = await self._in_thread(self._judged, body, received, request.headers.get(TOKEN, ""))
            kept = await asyncio.wrap_future(self.database.keep(row))
            if kept[-1]:
                told = await self._in_thread(self._told_again, row.team, kept)
            return _json(told)
        except TurnedAwayError as refused:
            return await self._turn_away(refused)
        except asyncio.CancelledError:  # it may be on the disk already, and would then be told as a repeat
            return _json({"detail": "the server is ending: send it again when it is back"}, 503)
        except sqlite3.Error as error:  # such as a full disk
            log.error("a submission could not be kept: %s", error)
            sentence = "the submission could not be kept, and does not count: send it again"
            return await self._turn_away(TurnedAwayError(503, sentence))

    async def _in_thread(self, function: Any, *arguments: Any) -> Any:
        return await anyio.to_thread.run_sync(function, *arguments, limiter=self.judging)

    def _require_open(self) -> None:
        if self.rules.closed:
            raise TurnedAwayError(403, f"the competition closed at {moment(self.rules.closes_at)}")

    def _judged(self, body: bytes, received: str, token: str) -> tuple[dict[str, Any], Judged]:
        """What is told of a submission, and its row. Raises TurnedAwayError."""
        team = None
        try:
            submission = read_body(body)
            self._admit(submission.group, token)
            team = submission.group  # only now is it told from others who say that they are it
            first = judge(submission, self.key)
        except RefusedError as error:
            raise TurnedAwayError(422, str(error), team=team) from None
        whole = score(first, self.key)
        public = score(first, self.key, self.rules.public) if self.rules.public else whole
        row = Judged(team, received, hashlib.sha256(body).hexdigest(), body,
                     whole.accuracy, public.accuracy, bytes(first.values()))  # fmt: skip
        return self._told(team, received, public), row

    def _admit(self, team: str, token: str) -> None:
        """Raise unless the group may submit now."""
        if self.rules.tokens is not None:
            wanted = self.rules.tokens.get(team, "")
            if not hmac.compare_digest(token.encode(), wanted.encode()) or not wanted:
                raise TurnedAwayError(403, f"the header {TOKEN} does not hold this group's token")
        _keep_pace(self.groups, "group", team, self.rules.per_minute)

    def _told_again(self, team: str, kept: Kept) -> dict[str, Any]:
        """What was told of a submission that came before."""
        received, ranks, _ = kept
        first = dict(zip(self.key.queries, ranks, strict=True))
        return self._told(team, received, score(first, self.key, self.rules.public)) | {"repeat": True}

    def _told(self, team: str, received: str, found: Score) -> dict[str, Any]:
        """As the competition's server answers."""
        told = {"groupname": team, "accuracy": found.accuracy, "date": moment(received)}
        if self.rules.hide_scores:
            return told
        scores: dict[str, Any] = {f"right{cut}": identities for cut, identities in found.right.items()}
        scores |= {f"wrong{cut}": identities for cut, identities in found.wrong.items()}
        return told | {"scores": scores | {"results": found.results}}

    async def _turn_away(self, refused: TurnedAwayError) -> Response:
        """Say why, and log it; but not each of those that come too fast."""
        log.info("refused with %d: %s", refused.status, refused.sentence)
        received = self.rules.now().isoformat(timespec="milliseconds")
        if refused.status not in (429, 503):
            try:
                kept = self.database.refuse(refused.team, received, refused.status, refused.sentence)
                await asyncio.wrap_future(kept)
            except sqlite3.Error as error:
                log.error("that could not be kept: %s", error)
        return _json({"detail": refused.sentence}, refused.status, refused.headers)


def _keep_pace(times: dict[str, deque[float]], kind: str, who: str, most: int) -> None:
    """Note when somebody submits. Raises TurnedAwayError where there were so many in the last minute."""
    now = time.monotonic()
    if len(times) > MOST_REMEMBERED:
        for one in [one for one, last in times.items() if last[-1] <= now - MINUTE]:
            del times[one]
    last = times.setdefault(who, deque(maxlen=most))
    if len(last) == most and last[0] > now - MINUTE:
        seconds = math.ceil(last[0] + MINUTE - now)
        sentence = f"more than {most} submissions a minute by this {kind}: wait {seconds} s"
        raise TurnedAwayError(429, sentence, {"Retry-After": str(seconds)})
    last.append(now)


async def _read(request: Request) -> bytes:
    """The body; unread where it says itself that it is too large. Raises TurnedAwayError."""
    large = TurnedAwayError(
        413, f"the body is larger than {MOST_BYTES / 2**20:g} MB", {"Connection": "close"}
    )
    length = request.headers.get("Content-Length", "0")
    if length.isdecimal() and float(length) > MOST_BYTES:  # float: of any number of digits
        raise large
    body = bytearray()
    try:
        async with asyncio.timeout(SECONDS_FOR_A_BODY):
            async for part in request.stream():
                body += part
                if len(body) > MOST_BYTES:
                    raise large
    except ClientDisconnect:
        raise TurnedAwayError(400, "the body broke off") from None
    except TimeoutError:
        slow = f"the body did not come within {SECONDS_FOR_A_BODY} s"
        raise TurnedAwayError(408, slow, {"Connection": "close"}) from None
    return bytes(body)
