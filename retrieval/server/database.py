"""Scored and refused submissions in; a SQLite file that survives a crash, and the leaderboard, out."""

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

APPLICATION = 0x52657472  # in the file's header: it tells our files from other programs'
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
    ranks BLOB NOT NULL,         -- a byte for each query: the rank of its first right image, 0: none
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
STORE = """
INSERT INTO submissions (team, received, digest, body, accuracy, public_accuracy, ranks)
VALUES (?, ?, ?, packed(?), ?, ?, ?)
ON CONFLICT (team, digest) DO UPDATE SET repeats = repeats + 1 RETURNING received, ranks, repeats
"""
COMPETITION = "INSERT INTO competition SELECT ? WHERE NOT EXISTS (SELECT 1 FROM competition)"
REFUSE = "INSERT INTO refused (team, received, status, reason) VALUES (?, ?, ?, ?)"
MOST_SHOWN = 200  # latest lines of a group's history
MOST_IN_A_COMMIT = 16  # statements

Stored = tuple[str, bytes, int]  # when it was first received, its ranks, and how often it was sent again


@dataclass(frozen=True)
class Scored:
    """A scored submission: the columns of its row."""

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
    when: str  # the best was received
    count: int  # of submissions
    history: list[float]  # the scores of all submissions, in order


class Database:
    """A SQLite file. A single thread writes it, and commits whatever is waiting at once."""

    def __init__(self, path: Path, competition: str) -> None:
        """Open the file, or create it. `competition` is the digest of the answer key.

        Raises InputError if it is no database of ours, or holds another competition.
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
        """Return a connection to the file, after creating the tables and checking the competition."""
        with closing(sqlite3.connect(self.path)) as plain:  # another program's file is not touched
            (application,) = plain.execute("PRAGMA application_id").fetchone()
            (tables,) = plain.execute("SELECT COUNT(*) FROM sqlite_schema").fetchone()
        if application != APPLICATION and tables:
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
        # SQL calls it, so that the writing thread compresses while the scoring thread goes on
        connection.create_function("packed", 1, _packed)
        return connection

    # ---- write

    def store(self, scored: Scored) -> Future[Stored]:
        """Store a submission. When it is on the disk, the future holds the first of equal submissions."""
        return self._ask(STORE, astuple(scored))

    def refuse(self, team: str | None, received: str, status: int, reason: str) -> Future[None]:
        """Store a refused submission."""
        return self._ask(REFUSE, (team, received, status, reason[:1000]))

    def close(self) -> None:
        """Write what is waiting, and close the file."""
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
            while not self._waiting.empty() and len(asked) < MOST_IN_A_COMMIT:
                asked.append(self._waiting.get())
            ending = None in asked
            # a request that was cancelled gets no row; from here on none can be cancelled
            wanted = [one for one in asked if one is not None and one[2].set_running_or_notify_cancel()]
            if wanted:
                self._commit(connection, wanted)
        connection.close()

    def _commit(self, connection: sqlite3.Connection, asked: list[tuple[str, tuple, Future]]) -> None:
        """Commit all and answer each. If that fails, commit each alone, or answer with the error."""
        try:
            with connection:
                rows = [connection.execute(statement, values).fetchone() for statement, values, _ in asked]
        except Exception as error:  # of any kind: a request waits for it, and the others need this thread
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
        """Return the leaderboard: the best score first, and among equal scores the earliest."""
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
        """Return (received, score, repeats) of the group's MOST_SHOWN latest submissions, the last first."""
        statement = f"SELECT received, {_column(public)}, repeats FROM submissions WHERE team = ?"
        return self._read(f"{statement} ORDER BY id DESC LIMIT {MOST_SHOWN}", team)

    def refused_of(self, team: str) -> list[tuple[str, int, str]]:
        """Return (received, status, reason) of its MOST_SHOWN latest refused submissions, the last first."""
        statement = "SELECT received, status, reason FROM refused WHERE team = ?"
        return self._read(f"{statement} ORDER BY id DESC LIMIT {MOST_SHOWN}", team)

    def count(self) -> int:
        """Count the scored submissions."""
        return self._read("SELECT COUNT(*) FROM submissions")[0][0]

    def version(self) -> int:
        """Return a number that changes with every write."""
        return self._read("PRAGMA data_version")[0][0]

    def _read(self, statement: str, *values: str) -> list[tuple]:
        with self._reading:
            return self._reader.execute(statement, values).fetchall()


def _column(public: bool) -> str:
    return "public_accuracy" if public else "accuracy"


def _packed(body: bytes) -> bytes:
    """Compress for zlib.decompress, twice as fast without a search for repeats: hex digits have none."""
    packer = zlib.compressobj(1, strategy=zlib.Z_HUFFMAN_ONLY)
    return packer.compress(body) + packer.flush()
