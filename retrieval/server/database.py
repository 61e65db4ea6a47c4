"""Submissions in; a table on the disk that no crash empties, and what the leaderboard shows of it, out."""

from __future__ import annotations

import queue
import sqlite3
import threading
import zlib
from concurrent.futures import Future
from contextlib import closing
from dataclasses import astuple, dataclass
from pathlib import Path

from retrieval.errors import InputError

APPLICATION = 0x52657472  # in the file's header, so that no other program's file is taken for ours
SCHEMA = f"""
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS submissions (
    id INTEGER PRIMARY KEY,
    team TEXT NOT NULL,
    received TEXT NOT NULL,      -- UTC, ISO 8601
    digest TEXT NOT NULL,        -- SHA-256 of the body
    body BLOB NOT NULL,          -- as received, by zlib
    accuracy REAL NOT NULL,      -- over all queries
    public_accuracy REAL NOT NULL,
    ranks BLOB NOT NULL,         -- a byte a query, in order: the rank of its first right image, 0: none
    repeats INTEGER NOT NULL DEFAULT 0,
    UNIQUE (team, digest)
);
CREATE TABLE IF NOT EXISTS refused (
    id INTEGER PRIMARY KEY, team TEXT, received TEXT NOT NULL, status INTEGER NOT NULL, reason TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS refused_of ON refused (team);
CREATE TABLE IF NOT EXISTS competition (digest TEXT PRIMARY KEY);
PRAGMA application_id = {APPLICATION};
COMMIT;
"""
KEEP = """
INSERT INTO submissions (team, received, digest, body, accuracy, public_accuracy, ranks)
VALUES (?, ?, ?, packed(?), ?, ?, ?)
ON CONFLICT (team, digest) DO UPDATE SET repeats = repeats + 1 RETURNING received, ranks, repeats
"""
FIRST = "INSERT INTO competition SELECT ? WHERE NOT EXISTS (SELECT 1 FROM competition)"
REFUSE = "INSERT INTO refused (team, received, status, reason) VALUES (?, ?, ?, ?)"
MOST_SHOWN = 200  # lines of a group's history, the latest
MOST_AT_ONCE = 16  # statements in a commit

Kept = tuple[str, bytes, int]  # when it was first received, its ranks, and how often it came again


@dataclass(frozen=True)
class Judged:
    """A submission that was scored: the columns of its row."""

    team: str
    received: str
    digest: str
    body: bytes
    accuracy: float
    public_accuracy: float
    ranks: bytes


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
            self._reader = self._open(competition)
            writer = self._connect()
        except sqlite3.Error as error:
            raise InputError(
                f"{path} cannot be used as a database ({error}): give another --database"
            ) from None
        self._reading = threading.Lock()
        self._waiting: queue.SimpleQueue = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write, args=[writer], name="database", daemon=True)
        self._writer.start()

    def _open(self, competition: str) -> sqlite3.Connection:
        """A connection to the file, which then has our tables and holds this competition."""
        with closing(sqlite3.connect(self.path)) as plain:  # another program's file is not touched
            (application,) = plain.execute("PRAGMA application_id").fetchone()
            (tables,) = plain.execute("SELECT COUNT(*) FROM sqlite_schema").fetchone()
        if application != APPLICATION and tables:
            raise InputError(f"{self.path} is another program's database: give another --database")
        connection = self._connect()
        connection.executescript(SCHEMA)
        with connection:
            connection.execute(FIRST, [competition])
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
        # by the thread that writes, while the one that judges goes on
        connection.create_function("packed", 1, _packed)
        return connection

    # ---- write

    def keep(self, judged: Judged) -> Future[Kept]:
        """Keep a submission; when it is on the disk, what stands there: the first of equal ones."""
        return self._ask(KEEP, astuple(judged))

    def refuse(self, team: str | None, received: str, status: int, reason: str) -> Future[None]:
        """Log an attempt that was not scored."""
        return self._ask(REFUSE, (team, received, status, reason[:1000]))

    def close(self) -> None:
        """Write what waits, and end."""
        self._waiting.put(None)
        self._writer.join()
        self._reader.close()

    def _ask(self, statement: str, values: tuple) -> Future:
        answer: Future = Future()
        self._waiting.put((statement, values, answer))
        return answer

    def _write(self, connection: sqlite3.Connection) -> None:
        ending = False
        while not ending:
            asked = [self._waiting.get()]
            while not self._waiting.empty() and len(asked) < MOST_AT_ONCE:
                asked.append(self._waiting.get())
            ending = None in asked
            # whoever no longer waits for an answer gets no row; from here on nobody can go
            wanted = [one for one in asked if one is not None and one[2].set_running_or_notify_cancel()]
            if wanted:
                self._commit(connection, wanted)
        connection.close()

    def _commit(self, connection: sqlite3.Connection, asked: list[tuple[str, tuple, Future]]) -> None:
        """Answer each when all are on the disk; where that fails, try each alone, or answer with why."""
        try:
            with connection:
                rows = [connection.execute(statement, values).fetchone() for statement, values, _ in asked]
        except Exception as error:  # whatever it is, somebody waits for it, and the others for this thread
            if len(asked) == 1:
                asked[0][2].set_exception(error)
            else:
                for one in asked:
                    self._commit(connection, [one])
            return
        for (*_, answer), row in zip(asked, rows, strict=True):
            answer.set_result(row)

    # ---- read

    def standings(self, public: bool) -> list[Standing]:
        """The leaderboard, best first; of equal groups the earlier."""
        teams: dict[str, list[tuple[float, str]]] = {}
        statement = f"SELECT team, {_column(public)}, received FROM submissions ORDER BY id"
        for team, accuracy, received in self._read(statement):
            teams.setdefault(team, []).append((accuracy, received))
        standings = []
        for team, submissions in teams.items():
            best, when = min(submissions, key=lambda submission: (-submission[0], submission[1]))
            history = [accuracy for accuracy, _ in submissions]
            standings.append(Standing(team, best, when, len(submissions), history))
        return sorted(standings, key=lambda standing: (-standing.best, standing.when))

    def submissions_of(self, team: str, public: bool) -> list[tuple[str, float, int]]:
        """When each was received, its score, and how often it came again: the last MOST_SHOWN, last first."""
        statement = f"SELECT received, {_column(public)}, repeats FROM submissions WHERE team = ?"
        return self._read(f"{statement} ORDER BY id DESC LIMIT {MOST_SHOWN}", team)

    def refused_of(self, team: str) -> list[tuple[str, int, str]]:
        """When each refused attempt was received, its status, and why: the last MOST_SHOWN, last first."""
        statement = "SELECT received, status, reason FROM refused WHERE team = ?"
        return self._read(f"{statement} ORDER BY id DESC LIMIT {MOST_SHOWN}", team)

    def count(self) -> int:
        """Of submissions that were scored."""
        return self._read("SELECT COUNT(*) FROM submissions")[0][0]

    def version(self) -> int:
        """A number that changes whenever somebody has written."""
        return self._read("PRAGMA data_version")[0][0]

    def _read(self, statement: str, *values: str) -> list[tuple]:
        with self._reading:
            return self._reader.execute(statement, values).fetchall()


def _column(public: bool) -> str:
    return "public_accuracy" if public else "accuracy"


def _packed(body: bytes) -> bytes:
    """As zlib.decompress reads it. Hex digits have no repeats to look for, and half the time goes there."""
    packer = zlib.compressobj(1, strategy=zlib.Z_HUFFMAN_ONLY)
    return packer.compress(body) + packer.flush()
