"""Submissions in; a table on the disk that no crash empties, and what the leaderboard shows of it, out."""

from __future__ import annotations

import queue
import sqlite3
import threading
import zlib
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from retrieval.settings import InputError

SCHEMA = """
CREATE TABLE IF NOT EXISTS submissions (
    id INTEGER PRIMARY KEY,
    team TEXT NOT NULL,
    received TEXT NOT NULL,      -- UTC, ISO 8601
    digest TEXT NOT NULL,        -- SHA-256 of the body
    body BLOB NOT NULL,          -- as received, by zlib
    accuracy REAL NOT NULL,      -- over all queries
    public_accuracy REAL NOT NULL,
    reply TEXT NOT NULL,         -- JSON, as it was answered
    repeats INTEGER NOT NULL DEFAULT 0,
    UNIQUE (team, digest)
);
CREATE TABLE IF NOT EXISTS refused (
    id INTEGER PRIMARY KEY, team TEXT, received TEXT NOT NULL, status INTEGER NOT NULL, reason TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS competition (digest TEXT PRIMARY KEY);
"""
KEEP = """
INSERT INTO submissions (team, received, digest, body, accuracy, public_accuracy, reply)
VALUES (?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (team, digest) DO UPDATE SET repeats = repeats + 1 RETURNING reply, repeats
"""
REPEAT = "UPDATE submissions SET repeats = repeats + 1 WHERE team = ? AND digest = ? RETURNING reply, repeats"
FIRST = "INSERT INTO competition SELECT ? WHERE NOT EXISTS (SELECT 1 FROM competition)"
REFUSE = "INSERT INTO refused (team, received, status, reason) VALUES (?, ?, ?, ?)"


@dataclass(frozen=True)
class Judged:
    """A submission that was scored."""

    team: str
    received: str
    digest: str
    body: bytes
    accuracy: float
    public_accuracy: float
    reply: str


@dataclass(frozen=True)
class Standing:
    """A line of the leaderboard."""

    team: str
    best: float
    when: str  # of the best
    count: int  # of submissions
    history: list[float]  # of their scores, in order


class Database:
    """A SQLite file that one thread writes: all that waits at a moment goes to the disk in one commit."""

    def __init__(self, path: Path, competition: str) -> None:
        """Open it, or make it. `competition` tells one answer key from another.

        Raises InputError where it is no database of ours, or one of another competition.
        """
        self.path = path
        try:
            connection = self._connect()
            connection.executescript(SCHEMA)
            connection.execute(FIRST, [competition])
            (kept,) = connection.execute("SELECT digest FROM competition").fetchone()
            connection.commit()
        except sqlite3.Error as error:
            raise InputError(
                f"{path} cannot be used as a database ({error}): give another --database"
            ) from None
        if kept != competition:
            raise InputError(
                f"{path} holds the submissions to other images, or answers: give another --database"
            )
        connection.close()
        self._waiting: queue.SimpleQueue = queue.SimpleQueue()
        self._reading = threading.local()
        self._writer = threading.Thread(target=self._write, name="database", daemon=True)
        self._writer.start()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=30)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")  # a commit that returned is on the disk
        return connection

    # ---- write

    def keep(self, judged: Judged) -> Future[tuple[str, int]]:
        """Keep a submission: when it is on the disk, the reply to it, and how often it was there before."""
        values = (judged.team, judged.received, judged.digest, zlib.compress(judged.body, 1),
                  judged.accuracy, judged.public_accuracy, judged.reply)  # fmt: skip
        return self._ask(KEEP, values)

    def repeat(self, team: str, digest: str) -> Future[tuple[str, int] | None]:
        """The reply that the same body of the same group got, and how often it came again; None: new."""
        return self._ask(REPEAT, (team, digest))

    def refuse(self, team: str | None, received: str, status: int, reason: str) -> Future[None]:
        """Log an attempt that was not scored."""
        return self._ask(REFUSE, (team, received, status, reason[:1000]))

    def close(self) -> None:
        """Write what waits, and end."""
        self._waiting.put(None)
        self._writer.join()

    def _ask(self, statement: str, values: tuple) -> Future:
        answer: Future = Future()
        self._waiting.put((statement, values, answer))
        return answer

    def _write(self) -> None:
        connection = self._connect()
        while (first := self._waiting.get()) is not None:
            asked = [first]
            while not self._waiting.empty() and asked[-1] is not None:
                asked.append(self._waiting.get())
            ending = asked[-1] is None
            self._commit(connection, asked[:-1] if ending else asked)
            if ending:
                break
        connection.close()

    def _commit(self, connection: sqlite3.Connection, asked: list[tuple[str, tuple, Future]]) -> None:
        """Answer each when all are on the disk; or, where that fails, with why."""
        try:
            with connection:
                rows = [connection.execute(statement, values).fetchone() for statement, values, _ in asked]
        except sqlite3.Error as error:
            for *_, answer in asked:
                answer.set_exception(error)
            return
        for (*_, answer), row in zip(asked, rows, strict=True):
            answer.set_result(row)

    # ---- read

    def standings(self, public: bool) -> list[Standing]:
        """The leaderboard, best first; of equal groups the earlier."""
        column = "public_accuracy" if public else "accuracy"
        teams: dict[str, list[tuple[float, str]]] = {}
        for team, accuracy, received in self._read(
            f"SELECT team, {column}, received FROM submissions ORDER BY id"
        ):
            teams.setdefault(team, []).append((accuracy, received))
        standings = []
        for team, submissions in teams.items():
            best, when = min(submissions, key=lambda submission: (-submission[0], submission[1]))
            standings.append(
                Standing(team, best, when, len(submissions), [score for score, _ in submissions])
            )
        return sorted(standings, key=lambda standing: (-standing.best, standing.when))

    def submissions_of(self, team: str, public: bool) -> list[tuple[str, float, int]]:
        """When each was received, its score, and how often it was repeated, in order."""
        column = "public_accuracy" if public else "accuracy"
        return self._read(
            f"SELECT received, {column}, repeats FROM submissions WHERE team = ? ORDER BY id", team
        )

    def refused_of(self, team: str) -> list[tuple[str, int, str]]:
        """When each refused attempt was received, its status, and why."""
        return self._read("SELECT received, status, reason FROM refused WHERE team = ? ORDER BY id", team)

    def count(self) -> int:
        """Of submissions that were scored."""
        return self._read("SELECT COUNT(*) FROM submissions")[0][0]

    def _read(self, statement: str, *values: str) -> list[tuple]:
        if not hasattr(self._reading, "connection"):  # one a thread
            self._reading.connection = self._connect()
        return self._reading.connection.execute(statement, values).fetchall()
