"""An answer key, a database and the rules in; the web application that scores submissions out."""

from __future__ import annotations

import asyncio
import csv
import hashlib
import hmac
import io
import json
import logging
import math
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from limits import RateLimitItemPerMinute
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter
from starlette.requests import ClientDisconnect

from retrieval.database import Database, Judged, Standing
from retrieval.judging import SHAPE, AnswerKey, RefusedError, Score, Submission, read_body, score
from retrieval.page import render

MOST_BYTES = 16 * 2**20  # of a body: a submission of 1455 queries has 0.6 MB
SECONDS_FOR_A_BODY = 30
TOKEN = "X-Group-Token"  # the header in which a group's token comes
DESCRIPTION = (
    f"POST /retrieval/ with {SHAPE}: the answer is the score, 600 · top-1 + 300 · top-5 + 100 · top-10."
)

log = logging.getLogger("retrieval.server")


@dataclass(frozen=True)
class Rules:
    """How a competition is run."""

    closes_at: datetime | None = None
    public: tuple[str, ...] | None = None  # the queries that count until it closes; None: all
    hide_scores: bool = False
    tokens: dict[str, str] | None = None  # a group → its token; None: anybody
    per_minute: int = 60  # submissions of a group
    per_address: int | None = None
    now: Callable[[], datetime] = lambda: datetime.now(UTC)

    @property
    def closed(self) -> bool:
        """Whether the competition is over."""
        return self.closes_at is not None and self.now() >= self.closes_at

    @property
    def partly(self) -> bool:
        """Whether only the public queries count now."""
        return self.public is not None and not self.closed


class TurnedAwayError(Exception):
    """A submission that is not scored: the status and the sentence of the answer."""

    def __init__(
        self, status: int, sentence: str, headers: dict[str, str] | None = None, team: str | None = None
    ) -> None:
        super().__init__(sentence)
        self.status, self.sentence, self.headers, self.team = status, sentence, headers, team


def make_app(key: AnswerKey, database: Database, rules: Rules) -> FastAPI:
    """The application. It keeps each submission on the disk before it answers."""
    app = FastAPI(title="Image retrieval: evaluation server", description=DESCRIPTION, version="1")
    judge = _Judge(key, database, rules)

    @app.post("/retrieval/", summary="Score a submission", openapi_extra=_described_body())
    async def retrieval(request: Request) -> Response:
        return await judge.answer(request)

    @app.get("/", response_class=HTMLResponse, summary="The leaderboard")
    def leaderboard() -> HTMLResponse:
        return HTMLResponse(render("leaderboard.html", **judge.board()))

    @app.get("/leaderboard.csv", summary="The leaderboard as a table")
    def table() -> PlainTextResponse:
        return PlainTextResponse(
            _as_csv(database.standings(rules.partly)), media_type="text/csv; charset=utf-8"
        )

    @app.get("/submissions/{group:path}", response_class=HTMLResponse, summary="A group's own history")
    def history(group: str) -> HTMLResponse:
        known = judge.history(group)
        return HTMLResponse(render("submissions.html", **known), 200 if known["any"] else 404)

    @app.get("/healthz", summary="Whether the server runs")
    def health() -> dict[str, Any]:
        return {"status": "ok", "submissions": database.count(), "closed": rules.closed}

    return app


def _described_body() -> dict[str, Any]:
    """What /docs says of the body, which is read by hand: unread where it is too large."""
    names = {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 10}
    images = {"type": "object", "additionalProperties": names}
    schema = {"type": "object", "required": ["groupname", "images"],
              "properties": {"groupname": {"type": "string"}, "images": images}}  # fmt: skip
    answers = {403: "the competition is over, or the token is wrong", 408: "the body came too slowly",
               413: "the body is too large", 422: "the submission cannot be scored: the sentence says why",
               429: "too many submissions: Retry-After says when"}  # fmt: skip
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "responses": {str(status): {"description": what} for status, what in answers.items()},
    }


class _Judge:
    """What the routes share."""

    def __init__(self, key: AnswerKey, database: Database, rules: Rules) -> None:
        self.key, self.database, self.rules = key, database, rules
        self.limiter = MovingWindowRateLimiter(MemoryStorage())

    # ---- POST /retrieval/

    async def answer(self, request: Request) -> Response:
        """Score a submission and keep it, or say why not and log that."""
        try:
            if self.rules.per_address:
                address = request.client.host if request.client else ""
                self._limit(self.rules.per_address, "address", address)
            if self.rules.closed:
                raise TurnedAwayError(403, f"the competition closed at {_moment(self.rules.closes_at)}")
            body = await _read(request)
            submission = await run_in_threadpool(self._check, body)
            self._admit(submission.group, request)
            reply, repeats = await self._score(body, submission)
        except TurnedAwayError as refused:
            await self._refuse(refused)
            return JSONResponse({"detail": refused.sentence}, refused.status, refused.headers)
        told = json.loads(reply) | ({"repeat": True} if repeats else {})
        return JSONResponse(told)

    def _check(self, body: bytes) -> Submission:
        try:
            return read_body(body, self.key)
        except RefusedError as error:
            raise TurnedAwayError(422, str(error), team=error.group) from None

    def _admit(self, team: str, request: Request) -> None:
        """Raise unless the group may submit now."""
        if self.rules.tokens is not None:
            given, wanted = request.headers.get(TOKEN, ""), self.rules.tokens.get(team, "")
            if not hmac.compare_digest(given.encode(), wanted.encode()) or not wanted:
                # the group is not told: its page is no place for what others try
                raise TurnedAwayError(403, f"the header {TOKEN} does not hold this group's token")
        self._limit(self.rules.per_minute, "group", team)

    def _limit(self, most: int, kind: str, who: str) -> None:
        """Raise where there were so many in the last minute."""
        item = RateLimitItemPerMinute(most)
        if self.limiter.hit(item, kind, who):
            return
        reset, _ = self.limiter.get_window_stats(item, kind, who)
        seconds = max(1, math.ceil(reset - time.time()))
        sentence = f"more than {most} submissions a minute by this {kind}: wait {seconds} s"
        raise TurnedAwayError(429, sentence, {"Retry-After": str(seconds)}, who if kind == "group" else None)

    async def _score(self, body: bytes, submission: Submission) -> tuple[str, int]:
        """The reply, which is on the disk, and how often this body had come before."""
        team, digest = submission.group, hashlib.sha256(body).hexdigest()
        try:
            before = await asyncio.wrap_future(self.database.repeat(team, digest))
            if before:
                return before
            judged = await run_in_threadpool(self._judged, body, digest, submission)
            return await asyncio.wrap_future(self.database.keep(judged))
        except sqlite3.Error as error:  # such as a full disk
            log.error("a submission could not be kept: %s", error)
            raise TurnedAwayError(
                503, "the submission could not be kept, and does not count: send it again"
            ) from None

    def _judged(self, body: bytes, digest: str, submission: Submission) -> Judged:
        now = self.rules.now()
        whole = score(submission, self.key)
        public = score(submission, self.key, self.rules.public) if self.rules.public else whole
        reply = self._reply(submission.group, now, public)
        return Judged(submission.group, now.isoformat(timespec="milliseconds"), digest, body,
                      whole.accuracy, public.accuracy, json.dumps(reply))  # fmt: skip

    def _reply(self, team: str, now: datetime, told: Score) -> dict[str, Any]:
        """As the competition's server answers."""
        reply = {
            "groupname": team,
            "accuracy": told.accuracy,
            "date": now.astimezone().strftime("%Y-%m-%d %H:%M:%S"),
        }
        if self.rules.hide_scores:
            return reply
        scores: dict[str, Any] = {f"right{cut}": identities for cut, identities in told.right.items()}
        scores |= {f"wrong{cut}": identities for cut, identities in told.wrong.items()}
        return reply | {"scores": scores | {"results": told.results}}

    async def _refuse(self, refused: TurnedAwayError) -> None:
        received = self.rules.now().isoformat(timespec="milliseconds")
        log.info("refused with %d: %s", refused.status, refused.sentence)
        try:
            await asyncio.wrap_future(
                self.database.refuse(refused.team, received, refused.status, refused.sentence)
            )
        except sqlite3.Error as error:
            log.error("that could not be kept: %s", error)

    # ---- what is seen

    def board(self) -> dict[str, Any]:
        """What leaderboard.html shows."""
        standings = self.database.standings(self.rules.partly)
        return {
            "standings": [(rank, standing, _line(standing.history), _moment(standing.when))
                          for rank, standing in enumerate(standings, 1)],
            "queries": len(self.rules.public) if self.rules.partly else len(self.key.queries),
            "gallery": len(self.key.gallery),
            "partly": self.rules.partly,
            "closes_at": _moment(self.rules.closes_at) if self.rules.closes_at else "",
            "closed": self.rules.closed,
        }  # fmt: skip

    def history(self, team: str) -> dict[str, Any]:
        """What submissions.html shows."""
        scored = self.database.submissions_of(team, self.rules.partly)
        refused = self.database.refused_of(team)
        return {
            "team": team,
            "any": bool(scored or refused),
            "scored": [(_moment(when), accuracy, repeats) for when, accuracy, repeats in scored],
            "refused": [(_moment(when), status, reason) for when, status, reason in refused],
            "line": _line([accuracy for _, accuracy, _ in scored], 600, 120),
            "partly": self.rules.partly,
        }


async def _read(request: Request) -> bytes:
    """The body; unread where it says itself that it is too large. Raises TurnedAwayError."""
    too_large = TurnedAwayError(
        413, f"the body is larger than {MOST_BYTES // 2**20} MB", {"Connection": "close"}
    )
    length = request.headers.get("Content-Length", "0")
    if length.isdecimal() and int(length) > MOST_BYTES:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(SECONDS_FOR_A_BODY):
            async for part in request.stream():
                body += part
                if len(body) > MOST_BYTES:
                    raise too_large
    except ClientDisconnect:
        raise TurnedAwayError(400, "the body broke off") from None
    except TimeoutError:
        raise TurnedAwayError(
            408, f"the body did not come within {SECONDS_FOR_A_BODY} s", {"Connection": "close"}
        ) from None
    return bytes(body)


def _moment(when: datetime | str) -> str:
    """A moment by this machine's clock, for people."""
    moment = datetime.fromisoformat(when) if isinstance(when, str) else when
    return moment.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _line(scores: list[float], width: int = 120, height: int = 28) -> str:
    """The points of a small line of scores, 0 to 1000, as an SVG polyline wants them: the last 60."""
    shown = scores[-60:]
    step = (width - 6) / max(1, len(shown) - 1)
    return " ".join(
        f"{3 + n * step:.1f},{height - 3 - (height - 6) * value / 1000:.1f}" for n, value in enumerate(shown)
    )


def _as_csv(standings: list[Standing]) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["rank", "group", "score", "time", "submissions"])
    for rank, standing in enumerate(standings, 1):
        writer.writerow([rank, _plain(standing.team), standing.best, standing.when, standing.count])
    return text.getvalue()


def _plain(text: str) -> str:
    """A text that no spreadsheet takes for a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text
