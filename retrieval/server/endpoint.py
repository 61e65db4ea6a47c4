"""A POST to /retrieval/ in; the submission's row in the database, and the answer with its score, out."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import math
import sqlite3
import time
from collections import Counter
from typing import Any

import anyio
from fastapi import Request, Response
from starlette.requests import ClientDisconnect

from retrieval.server.answer_key import AnswerKey
from retrieval.server.database import Database
from retrieval.server.rules import Rules, moment
from retrieval.server.scoring import RefusedError, judge, parse, score
from retrieval.submission.protocol import TOKEN

MOST_BYTES = 16 * 2**20  # of a body: a submission of 1455 queries has 0.6 MB
SECONDS_FOR_A_BODY = 30
MINUTE = 60  # seconds
SAFE = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}

log = logging.getLogger("retrieval.server")


class SubmissionEndpoint:
    """Answers each POST: scores and stores the submission, or refuses it with a sentence."""

    def __init__(self, key: AnswerKey, database: Database, rules: Rules) -> None:
        self.key, self.database, self.rules = key, database, rules
        # A single thread scores: several would only wait for the one interpreter.
        self.thread = anyio.CapacityLimiter(1)
        self.groups = RateLimit("group", rules.per_minute)
        self.addresses = RateLimit("address", rules.per_address or math.inf)

    async def answer(self, request: Request) -> Response:
        """Score and store a submission, or answer and log why it is refused."""
        try:
            self.addresses.count(request.client.host if request.client else "")
            self._require_open()
            body = await _read(request)
            self._require_open()  # a body may take its time
            received = self.rules.now().isoformat(timespec="milliseconds")
            token = request.headers.get(TOKEN, "")
            reply = await anyio.to_thread.run_sync(self._score, body, received, token, limiter=self.thread)
            return json_answer(reply)
        except RefusedError as refused:
            log.info("refused with %d: %s", refused.status, refused)
            return json_answer({"detail": str(refused)}, refused.status, refused.headers)
        except asyncio.CancelledError:  # it may be on the disk already, and is then answered as a repeat
            return json_answer({"detail": "the server is ending: send it again when it is back"}, 503)
        except sqlite3.Error as error:  # such as a full disk
            log.error("a submission could not be kept: %s", error)
            sentence = "the submission could not be kept, and does not count: send it again"
            return json_answer({"detail": sentence}, 503)

    def _require_open(self) -> None:
        if self.rules.closed:
            raise RefusedError(f"the competition closed at {moment(self.rules.closes_at)}", 403)

    def _score(self, body: bytes, received: str, token: str) -> dict[str, Any]:
        """Store a submission and return the reply, or store its refusal. Raises RefusedError."""
        submission = parse(body)
        team = submission.group
        self._admit(team, token)
        try:
            first = judge(submission, self.key)
        except RefusedError as error:  # _admit has passed: the group itself sent it
            self.database.refuse(team, received, error.status, str(error))
            raise
        accuracy, _ = score(first, self.key)
        public_accuracy, scores = score(first, self.key, self.rules.public)
        first_received, repeats = self.database.store(
            team, received, body, accuracy, public_accuracy, bytes(first.values())
        )
        reply = {"groupname": team, "accuracy": public_accuracy, "date": moment(first_received)}
        if not self.rules.hide_scores:  # as the competition's server replies
            reply["scores"] = scores
        return reply | ({"repeat": True} if repeats else {})

    def _admit(self, team: str, token: str) -> None:
        """Raise RefusedError unless the group has sent its token, and may submit now."""
        if self.rules.tokens is not None:
            wanted = self.rules.tokens.get(team, "")
            if not hmac.compare_digest(token.encode(), wanted.encode()) or not wanted:
                raise RefusedError(f"the header {TOKEN} does not hold this group's token", 403)
        self.groups.count(team)


class RateLimit:
    """A limit of `most` submissions a minute for each group, or each address.

    One minute is counted for all: it begins with the first submission after the previous minute ended.
    """

    def __init__(self, kind: str, most: float) -> None:
        self.kind, self.most = kind, most
        self.counts: Counter[str] = Counter()
        self.ends = 0.0  # when this minute ends, by the monotonic clock

    def count(self, who: str) -> None:
        """Count a submission. Raises RefusedError if there were too many in this minute."""
        now = time.monotonic()
        if now >= self.ends:
            self.counts, self.ends = Counter(), now + MINUTE
        if self.counts[who] >= self.most:
            seconds = math.ceil(self.ends - now)
            sentence = f"more than {self.most} submissions a minute by this {self.kind}: wait {seconds} s"
            raise RefusedError(sentence, 429, {"Retry-After": str(seconds)})
        self.counts[who] += 1


async def _read(request: Request) -> bytes:
    """Read the body. Raises RefusedError if it is too large, too slow or breaks off."""
    body = bytearray()
    try:
        async with asyncio.timeout(SECONDS_FOR_A_BODY):
            async for part in request.stream():
                body += part
                if len(body) > MOST_BYTES:
                    large = f"the body is larger than {MOST_BYTES / 2**20:g} MB"
                    raise RefusedError(large, 413, {"Connection": "close"})
    except ClientDisconnect:
        raise RefusedError("the body broke off", 400) from None
    except TimeoutError:
        slow = f"the body did not come within {SECONDS_FOR_A_BODY} s"
        raise RefusedError(slow, 408, {"Connection": "close"}) from None
    return bytes(body)


def json_answer(
    content: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    """Answer in JSON. What UTF-8 cannot encode, but a file name may hold, becomes a JSON escape."""
    body = json.dumps(content, ensure_ascii=False).encode("utf-8", "backslashreplace")
    return Response(body, status, SAFE | (headers or {}), "application/json")
