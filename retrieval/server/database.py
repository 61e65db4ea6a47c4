"""Scored and refused submissions in; a SQLite file that survives a crash, and the leaderboard, out."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import threading
import time
import zlib
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from retrieval.errors import InputError
from retrieval.server.group_names import folded

SCHEMA = """
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS submissions (
    id INTEGER PRIMARY KEY,
    team TEXT NOT NULL,
    received TEXT NOT NULL,      -- UTC, ISO 8601
    digest TEXT NOT NULL,        -- SHA-256 of the body
    body BLOB NOT NULL,          -- as received, by zlib
    accuracy REAL NOT NULL,      -- over all queries
    public_accuracy REAL NOT NULL,
    ranks BLOB NOT NULL,         -- a byte for each query: the rank of its first right image, 0: none
    repeats INTEGER NOT NULL DEFAULT 0,
    UNIQUE (team, digest)
);
CREATE TABLE IF NOT EXISTS refused (
    id INTEGER PRIMARY KEY, team TEXT, received TEXT NOT NULL, status INTEGER NOT NULL, reason TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS refused_of ON refused (team);
CREATE TABLE IF NOT EXISTS competition (digest TEXT PRIMARY KEY);
COMMIT;
"""
STORE = """
INSERT INTO submissions (team, received, digest, body, accuracy, public_accuracy, ranks)
VALUES (?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (team, digest) DO UPDATE SET repeats = repeats + 1 RETURNING received, repeats
"""
COMPETITION = "INSERT INTO competition SELECT ? WHERE NOT EXISTS (SELECT 1 FROM competition)"
REFUSE = "INSERT INTO refused (team, received, status, reason) VALUES (?, ?, ?, ?)"
MOST_SHOWN = 200  # latest lines of a group's history


@dataclass(frozen=True)
class Standing:
    """A line of the leaderboard."""

    team: str
    best: float
    when: str  # the best was received
    count: int  # of submissions
    history: list[float]  # the scores of all submissions, in order


class Database:
    """A SQLite file. When `store` or `refuse` returns, its row is on the disk."""

    def __init__(self, path: Path, competition: str) -> None:
        """Open the file, or create it. `competition` is the digest of the answer key.

        Raises InputError if it is no database of ours, or holds another competition.
        """
        self.path = path
        self._lock = threading.Lock()
        try:
            self._connection = self._open(competition)
            self._file = os.stat(path)
            self._spellings: dict[str, str] = {}
            for (team,) in self._run("SELECT team FROM submissions UNION ALL SELECT team FROM refused"):
                self.spelling(team)
        except sqlite3.Error as error:
            raise InputError(
                f"{path} cannot be used as a database ({error}): give another --database"
            ) from None

    def _open(self, competition: str) -> sqlite3.Connection:
        """Return a connection to the file, after creating the tables and checking the competition."""
        with closing(sqlite3.connect(self.path)) as plain:  # another program's file is not touched
            tables = plain.execute("SELECT name FROM sqlite_schema").fetchall()
        if tables and ("competition",) not in tables:
            raise InputError(f"{self.path} is another program's database: give another --database")
        connection = self._connect()
        connection.executescript(SCHEMA)
        with connection:
            connection.execute(COMPETITION, [competition])
        (kept,) = connection.execute("SELECT digest FROM competition").fetchone()
        if kept != competition:
            connection.close()
            raise InputError(
                f"{self.path} holds the submissions to other images, other answers or another public share: "
                "give another --database"
            )
        return connection

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=30, check_same_thread=False)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")  # a commit that returned is on the disk
        return connection

    # ---- write

    def store(self, team: str, received: str, body: bytes, accuracy: float, public_accuracy: float,
              ranks: bytes) -> tuple[str, int]:  # fmt: skip
        """Store a submission; return when its body first came from this group, and how often again since."""
        digest, packed = hashlib.sha256(body).hexdigest(), zlib.compress(body, 1)
        return self._write(STORE, team, received, digest, packed, accuracy, public_accuracy, ranks)[0]

    def refuse(self, team: str, received: str, status: int, reason: str) -> None:
        """Store a refused submission."""
        self._write(REFUSE, team, received, status, reason[:1000])

    def spelling(self, team: str) -> str:
        """Return how the group wrote its name first: names that look the same are one group."""
        return self._spellings.setdefault(folded(team), team)

    def known(self, team: str) -> str:
        """Return the spelling of a group that has submitted; of another one the name itself."""
        return self._spellings.get(folded(team), team)

    def in_place(self) -> bool:
        """Return whether the file is the one that was opened: neither deleted nor replaced by another."""
        try:
            return os.path.samestat(os.stat(self.path), self._file)
        except OSError:
            return False

    def rescue(self) -> Path:
        """Write a copy of what the opened file holds, even if that was deleted; return the copy's path."""
        copy = self.path.with_name(f"{self.path.stem}-{time.strftime('%Y%m%d-%H%M%S')}.sqlite")
        with self._lock:
            self._connection.execute("VACUUM INTO ?", [str(copy)])
        return copy

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._connection.close()

    # ---- read

    def standings(self, public: bool) -> list[Standing]:
        """Return the leaderboard: the best score first, and among equal scores the earliest."""
        teams: dict[str, list[tuple[float, str]]] = {}
        statement = f"SELECT team, {_column(public)}, received FROM submissions ORDER BY id"
        for team, accuracy, received in self._run(statement):
            teams.setdefault(team, []).append((accuracy, received))
        standings = []
        for team, submissions in teams.items():
            best, when = min(submissions, key=lambda submission: (-submission[0], submission[1]))
            history = [accuracy for accuracy, _ in submissions]
            standings.append(Standing(team, best, when, len(submissions), history))
        return sorted(standings, key=lambda standing: (-standing.best, standing.when))

    def submissions_of(self, team: str, public: bool) -> list[tuple[str, float, int]]:
        """Return (received, score, repeats) of the group's MOST_SHOWN latest submissions, the last first."""
        statement = f"SELECT received, {_column(public)}, repeats FROM submissions WHERE team = ?"
        return self._run(f"{statement} ORDER BY id DESC LIMIT {MOST_SHOWN}", team)

    def refused_of(self, team: str) -> list[tuple[str, int, str]]:
        """Return (received, status, reason) of its MOST_SHOWN latest refused submissions, the last first."""
        statement = "SELECT received, status, reason FROM refused WHERE team = ?"
        return self._run(f"{statement} ORDER BY id DESC LIMIT {MOST_SHOWN}", team)

    def count(self) -> int:
        """Count the scored submissions."""
        return self._run("SELECT COUNT(*) FROM submissions")[0][0]

    def version(self) -> int:
        """Return a number that changes with every write."""
        return self._connection.total_changes

    def _write(self, statement: str, *values: object) -> list[tuple]:
        """Run a statement that writes. Raises sqlite3.Error if its row is not on the disk, in the file."""
        rows = self._run(statement, *values)
        if not self.in_place():
            raise sqlite3.OperationalError(f"{self.path} was deleted or replaced")
        return rows

    def _run(self, statement: str, *values: object) -> list[tuple]:
        """Run a statement in a transaction of its own, and return its rows."""
        with self._lock, self._connection:
            return self._connection.execute(statement, values).fetchall()


def _column(public: bool) -> str:
    return "public_accuracy" if public else "accuracy"
