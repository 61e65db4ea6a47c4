"""A POST to /retrieval/ in; the submission's row in the database, and the answer with its score, out."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import sqlite3
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import anyio
from fastapi import Request, Response
from starlette.requests import ClientDisconnect

from retrieval.server.answer_key import AnswerKey
from retrieval.server.database import Database
from retrieval.server.group_names import folded
from retrieval.server.rules import Rules, moment
from retrieval.server.scoring import RefusedError, judge, parse, score
from retrieval.submission.protocol import TOKEN

SECONDS_FOR_A_BODY = 30
MOST_READ = 16 * 2**20  # bytes; a client reads the answer 413 only if its body is read to the end
MOST_REFUSED = 600  # bodies of an address in a minute, without tokens; a lecture hall may share an address
MINUTE = 60  # seconds
TOO_MANY = 429
CLOSE = {"Connection": "close"}
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
        self.refused = RateLimit("address", MOST_REFUSED)
        self.owners = {token: folded(group) for group, token in (rules.tokens or {}).items()}

    async def answer(self, request: Request) -> Response:
        """Score and store a submission, or answer and log why it is refused.

        What costs least comes first: the address, the time, the token, and only then the body.
        """
        address, owner = request.client.host if request.client else "", ""
        try:
            self.addresses.count(address)
            self._require_open()
            owner = self._owner(request.headers.get(TOKEN, ""))
            if owner:
                self.groups.count(owner)
            else:
                self.refused.check(address)
            body = await _read(request, self.key.most_bytes)
            self._require_open()  # a body may take its time
            received = self.rules.now().isoformat(timespec="milliseconds")
            reply = await anyio.to_thread.run_sync(self._score, body, received, owner, limiter=self.thread)
            return json_answer(reply)
        except RefusedError as refused:
            if not owner and refused.status != TOO_MANY:
                self.refused.add(address)
            log.info("refused with %d: %s", refused.status, refused)
            return refusal(str(refused), refused.status, refused.headers)
        except asyncio.CancelledError:  # it may be on the disk already, and is then answered as a repeat
            return refusal("the server is ending: send it again when it is back", 503)
        except sqlite3.Error as error:  # such as a full disk
            log.error("a submission could not be kept: %s", error)
            sentence = "the submission could not be kept, and does not count: send it again"
            return refusal(sentence, 503)

    def _require_open(self) -> None:
        if self.rules.closed:
            when = moment(self.rules.closes_at)
            raise RefusedError(f"the competition closed at {when}: the leaderboard has the final scores", 403)

    def _owner(self, token: str) -> str:
        """Return the folded name of the group whose token this is; '' where anybody may submit."""
        if self.rules.tokens is not None and token not in self.owners:
            raise RefusedError(f"the header {TOKEN} does not hold this group's token", 403)
        return self.owners.get(token, "")

    def _score(self, body: bytes, received: str, owner: str) -> dict[str, Any]:
        """Store a submission and return the reply, or store its refusal. Raises RefusedError."""
        submission = parse(body)
        if owner not in ("", folded(submission.group)):
            raise RefusedError(f"the header {TOKEN} does not hold this group's token", 403)
        if not owner:
            self.groups.count(folded(submission.group))
        team = self.database.spelling(submission.group)
        try:
            first = judge(submission, self.key)
        except RefusedError as error:  # its token was right: the group itself sent it
            self.database.refuse(team, received, error.status, str(error))
            raise
        accuracy, _ = score(first, self.key)
        public_accuracy, scores = score(first, self.key, self.rules.public)
        first_received, repeats = self.database.store(
            team, received, body, accuracy, public_accuracy, bytes(first.values())
        )
        public = self.rules.public
        overall = f" on the public share, {accuracy:.1f} over all queries" if public else ""
        log.info("scored %r: %.1f of 1000%s%s", team, public_accuracy, overall, ", again" * (repeats > 0))
        reply = {"groupname": team, "accuracy": public_accuracy, "date": moment(first_received)}
        if public:
            reply["public_queries"] = len(public)
        if not self.rules.hide_scores:  # as the competition's server replies
            reply["scores"] = scores
        return reply | ({"repeat": True} if repeats else {})


class RateLimit:
    """A limit of `most` submissions a minute for each group, or each address.

    One minute is counted for all: it begins with the first submission after the previous minute ended.
    """

    def __init__(self, kind: str, most: float) -> None:
        self.kind, self.most = kind, most
        self.counts: Counter[str] = Counter()
        self.ends = 0.0  # when this minute ends, by the monotonic clock

    def count(self, who: str) -> None:
        """Count a submission. Raises as check."""
        self.check(who)
        self.add(who)

    def add(self, who: str) -> None:
        """Count a submission in any case."""
        self.counts[who] += 1

    def check(self, who: str) -> None:
        """Raise RefusedError if there were too many in this minute."""
        now = time.monotonic()
        if now >= self.ends:
            self.counts, self.ends = Counter(), now + MINUTE
        if self.counts[who] >= self.most:
            seconds = math.ceil(self.ends - now)
            sentence = f"more than {self.most} submissions a minute by this {self.kind}: wait {seconds} s"
            raise RefusedError(sentence, TOO_MANY, {"Retry-After": str(seconds)})


async def _read(request: Request, most: int) -> bytes:
    """Read the body. Raises RefusedError if it has more than `most` bytes, is too slow or breaks off."""
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(SECONDS_FOR_A_BODY):
            async for part in request.stream():
                size += len(part)
                if size <= most:
                    body += part
                elif size > MOST_READ:
                    break
    except ClientDisconnect:
        raise RefusedError("the body broke off", 400) from None
    except TimeoutError:
        slow = f"the body did not come within {SECONDS_FOR_A_BODY} s"
        raise RefusedError(slow, 408, CLOSE) from None
    if size > most:
        raise RefusedError(f"the body is larger than {most} bytes, twice what a submission takes", 413, CLOSE)
    return bytes(body)


def json_answer(content: dict[str, Any], status: int = 200) -> Response:
    """Answer in JSON. What UTF-8 cannot encode, but a file name may hold, becomes a JSON escape."""
    body = json.dumps(content, ensure_ascii=False).encode("utf-8", "backslashreplace")
    return Response(body, status, SAFE, "application/json")


def refusal(sentence: str, status: int, headers: Mapping[str, str] | None = None) -> Response:
    """Answer a sentence as plain text: clients that look for a score in JSON then print it as it is."""
    body = sentence.encode("utf-8", "backslashreplace")
    return Response(body, status, SAFE | dict(headers or {}), "text/plain; charset=utf-8")
