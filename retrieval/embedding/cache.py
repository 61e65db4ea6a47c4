"""Images and a cache key in; the vectors that earlier runs made of them out.

    python -m retrieval.embedding --cache_dir DIR [--older_than DAYS]   # list it, or delete the unused

A SQLite file holds each vector under two digests: of the image's bytes, and of everything that changes a
vector (the cache key). It holds the crops of faces in the same way, for all networks with the same crop.
Each row has a checksum: a damaged row is deleted, and its image embedded again. If the file cannot be used,
the vectors are made again, and nothing else is lost.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sqlite3
import stat
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from get_images import ImageFile, UnreadableImageError, read_bytes
from retrieval.backbones.transform import ModelInput
from retrieval.embedding.loader import digest_of, in_groups
from retrieval.errors import InputError
from retrieval.machine import cores

VERSION = 3  # of the tables: each version has its own file
FILE = f"embeddings-{VERSION}.sqlite"
FILES = "embeddings-*.sqlite*"  # of all versions, with SQLite's files beside them
SCHEMA = f"""
CREATE TABLE makers (maker BLOB PRIMARY KEY, what TEXT, used REAL) WITHOUT ROWID;
CREATE TABLE files (path BLOB PRIMARY KEY, look TEXT, digest BLOB, checksum BLOB);
CREATE TABLE vectors (maker BLOB, digest BLOB, face INTEGER, vector BLOB, checksum BLOB,
                      PRIMARY KEY (maker, digest));
CREATE TABLE crops (maker BLOB, digest BLOB, face INTEGER, pixels BLOB, checksum BLOB,
                    PRIMARY KEY (maker, digest));
PRAGMA user_version = {VERSION};
"""
USED = """
INSERT INTO makers VALUES (?, ?, ?) ON CONFLICT (maker) DO UPDATE SET used = excluded.used
"""
PENDING = 8  # batches that wait to be written
HASHED_AT_ONCE = 64  # files: handing a thread one at a time takes longer than to hash it
VALUES_AT_ONCE = 500  # in a statement: every SQLite allows 999
BROKEN = (sqlite3.Error, UnicodeDecodeError)  # the latter if SQLite's message quotes a damaged name
JUST_WRITTEN = 2.0  # seconds: until then a file may change again within one tick of the file system's clock

log = logging.getLogger("retrieval.cache")


class CacheKey(NamedTuple):
    """The key of the vectors of a runtime, or of the crops of a transform."""

    digest: bytes  # of everything that changes them
    description: str


class CachedVector(NamedTuple):
    """The cached vector of an image."""

    vector: np.ndarray  # float32 (dimension,), of unit length
    face: bool | None  # whether a face was detected; None: the transform detects none


@dataclass
class Cache:
    """The cache in a folder. If its file cannot be used, the cache warns and is empty.

    Raises InputError if the folder is a file, and nothing else.
    """

    folder: Path
    verify: bool = False  # True: read every image again, even if its size and times have not changed
    connection: sqlite3.Connection | None = field(default=None, init=False)
    warned: bool = field(default=False, init=False)  # of a row that is not as it was written
    # One thread reads and writes for runs, in order. The caller does not wait for a write, nor does a GPU.
    thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1), init=False)
    pending: deque[Future] = field(default_factory=deque, init=False)

    def __post_init__(self) -> None:
        if os.path.isfile(self.folder):  # Path.is_file would raise where this user may not look
            raise InputError(f"--cache_dir {self.folder} is not a folder but a file: give another one")
        self.thread.submit(self._attempt, self._open).result()

    # ---- vectors and crops

    def digests(self, files: list[ImageFile]) -> dict[str, bytes]:
        """Return the digest of the bytes of each readable image, by its name; {} without a usable file."""
        return self._excused(lambda: self._digests(files)) or {}

    def vectors(self, key: CacheKey, digests: Collection[bytes]) -> dict[bytes, CachedVector]:
        """Return the cached vectors of the images with these digests."""
        self.mark_used(key)
        rows = self._excused(lambda: self._select("vectors", key, list(digests))) or []
        return {
            digest: CachedVector(np.frombuffer(vector, np.float32), _face(face))
            for digest, face, vector in rows
        }

    def keep_vectors(self, key: CacheKey, vectors: dict[bytes, CachedVector]) -> None:
        """Write the vectors of the images with these digests; `flush` waits until they are written."""
        rows = [(digest, _number(cached.face), cached.vector.tobytes()) for digest, cached in vectors.items()]
        self._insert_later("vectors", key, rows)

    def having_crops(self, key: CacheKey, digests: list[bytes]) -> set[bytes]:
        """Return which of the images with these digests have a cached crop."""
        statement = "SELECT digest FROM crops WHERE maker = ? AND digest"
        rows = self._excused(lambda: self.rows_of(statement, digests, key.digest)) or []
        return {digest for (digest,) in rows}

    def crops(self, key: CacheKey, digests: list[bytes], size: int) -> dict[bytes, ModelInput]:
        """Return the cached crops, uint8 (3, size, size), of the images with these digests."""
        rows = self._excused(lambda: self._select("crops", key, digests)) or []
        return {
            digest: ModelInput(np.frombuffer(pixels, np.uint8).reshape(3, size, size), _face(face))
            for digest, face, pixels in rows
        }

    def keep_crops(self, key: CacheKey, crops: dict[bytes, ModelInput]) -> None:
        """Write the crops of the images with these digests; `flush` waits until they are written."""
        rows = [(digest, _number(crop.face), crop.pixels.tobytes()) for digest, crop in crops.items()]
        self._insert_later("crops", key, rows)

    def flush(self) -> None:
        """Wait until everything is written. The program waits for it, too, before it ends."""
        self.thread.submit(lambda: None).result()

    def mark_used(self, key: CacheKey) -> None:
        """Note that a run uses the entries of a key now."""
        self._excused(lambda: self.write(USED, [(*key, time.time())]))

    def _insert_later(self, table: str, key: CacheKey, rows: list[tuple]) -> None:
        self.pending.append(self.thread.submit(self._insert, table, key, rows))
        if len(self.pending) > PENDING:  # or a slow disk would fill the memory
            self.pending.popleft().result()

    def _insert(self, table: str, key: CacheKey, rows: list[tuple]) -> None:
        """Insert rows, in the thread."""
        values = [with_checksum((key.digest, *row)) for row in rows]

        def _write() -> None:
            self.write(USED, [(*key, time.time())])  # again: another program may have deleted its row
            self.write(f"INSERT OR IGNORE INTO {table} VALUES (?, ?, ?, ?, ?)", values)

        if values and self.connection:
            self._attempt(_write)

    def _select(self, table: str, key: CacheKey, digests: list[bytes]) -> list[tuple]:
        """Return (digest, face, content) of the rows with these digests."""
        found = self.rows_of(f"SELECT rowid, * FROM {table} WHERE maker = ? AND digest", digests, key.digest)
        return [row[1:] for row in self._sound(table, found)]

    def _sound(self, table: str, found: list[tuple]) -> list[tuple]:
        """Return the rows (rowid, values, checksum) that are as they were written, without the two others.

        Deletes the damaged rows, so that new ones can take their place.
        """
        sound, damaged = [], []
        for rowid, *row in found:
            if tuple(row) == with_checksum(row[:-1]):
                sound.append(tuple(row[:-1]))
            else:
                damaged.append((rowid,))
        if damaged:
            self.write(f"DELETE FROM {table} WHERE rowid = ?", damaged)
        if damaged and not self.warned:
            self.warned = True
            log.warning("rows of the cache %s are damaged: they are deleted, and their images embedded again",
                        self.folder / FILE)  # fmt: skip
        return sound

    def _digests(self, files: list[ImageFile]) -> dict[str, bytes]:
        """Return the digest of each image; read it only if its size or one of its times has changed."""
        looks = {file.name: seen for file in files if (seen := look(file.path))}
        same = {} if self.verify else self._unchanged(looks)
        others = [file for file in files if file.name in looks and file.name not in same]
        with ThreadPoolExecutor(cores()) as pool:
            digests = list(chain.from_iterable(pool.map(digests_of_files, in_groups(others, HASHED_AT_ONCE))))
        read = {file.name: digest for file, digest in zip(others, digests, strict=True) if digest}
        now = time.time()
        settled = [name for name in read if now - looks[name].changed > JUST_WRITTEN]
        rows = [with_checksum((looks[name].path, looks[name].look, read[name])) for name in settled]
        self.write("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?)", rows)
        return same | read

    def _unchanged(self, looks: dict[str, Look]) -> dict[str, bytes]:
        """Return the cached digests of files with the same size and times."""
        paths = [seen.path for seen in looks.values()]
        rows = self._sound("files", self.rows_of("SELECT rowid, * FROM files WHERE path", paths))
        kept = {(path, look): digest for path, look, digest in rows}
        return {name: kept[seen[:2]] for name, seen in looks.items() if seen[:2] in kept}

    # ---- the file

    def _open(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.connection = sqlite3.connect(self.folder / FILE, timeout=30, check_same_thread=False)
        self.connection.text_factory = lambda text: text.decode(errors="replace")  # damaged text, too
        self._keep_a_journal()
        # A crash may lose the last vectors, never the file.
        self.connection.execute("PRAGMA synchronous = NORMAL")
        with self.connection:
            self.connection.execute("BEGIN IMMEDIATE")  # if two runs start at once, one makes the tables
            (kept,) = self.connection.execute("PRAGMA user_version").fetchone()
            (tables,) = self.connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
            if not tables:
                for statement in SCHEMA.strip().split(";\n"):
                    self.connection.execute(statement)
            elif kept != VERSION:
                raise sqlite3.DatabaseError("it has other tables")

    def _keep_a_journal(self) -> None:
        """Write ahead (WAL). SQLite does not wait for another program that starts to do so at this moment."""
        for attempt in range(100):
            try:
                self.connection.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or attempt == 99:
                    raise
                time.sleep(0.05)

    def rows(self, statement: str, *values: object) -> list[tuple]:
        return self.connection.execute(statement, values).fetchall()

    def rows_of(self, statement: str, among: list, *values: object) -> list[tuple]:
        """Return the rows of `statement`, which ends in a column, where that column is in `among`."""
        found = []
        for start in range(0, len(among), VALUES_AT_ONCE):
            part = among[start : start + VALUES_AT_ONCE]
            found += self.rows(f"{statement} IN ({', '.join('?' * len(part))})", *values, *part)
        return found

    def write(self, statement: str, rows: list[tuple]) -> None:
        with self.connection:
            self.connection.executemany(statement, rows)

    def _excused(self, act: Callable[[], object]) -> object:
        """Return what `act` returns, as _attempt does; None if the file has been given up."""
        return self.thread.submit(lambda: self._attempt(act) if self.connection else None).result()

    def _attempt(self, act: Callable[[], object]) -> object:
        """Return what `act` returns. A broken file is replaced; any other failure gives the file up."""
        try:
            return act()
        except (sqlite3.OperationalError, OSError) as error:  # locked, full, read-only
            self._give_up(f"cannot be used ({error}): this run goes on without it; another --cache_dir "
                          "moves it, --no_cache leaves it out")  # fmt: skip
        except BROKEN as error:  # torn, or of another program
            self._give_up(f"is broken ({error}): it is set aside, and its vectors are made again")
            self._set_aside()
        return None

    def _give_up(self, why: str) -> None:
        log.warning("the cache %s %s", self.folder / FILE, why)
        if self.connection:
            self.connection.close()
        self.connection = None

    def _set_aside(self) -> None:
        """Rename the file, and begin a new one."""
        broken = self.folder / f"{FILE}.broken-{time.strftime('%Y%m%d-%H%M%S')}"
        try:
            os.replace(self.folder / FILE, broken)
            for more in ("-wal", "-shm"):
                (self.folder / f"{FILE}{more}").unlink(missing_ok=True)
            self._open()
        except (OSError, *BROKEN) as error:
            self._give_up(f"cannot be made anew ({error}): this run goes on without it")


def _number(face: bool | None) -> int | None:
    return None if face is None else int(face)


def _face(kept: int | None) -> bool | None:
    return None if kept is None else bool(kept)


def with_checksum(row: Sequence) -> tuple:
    """Return the values of a row and their checksum. It finds damage, but not a forger."""
    parts = (value if isinstance(value, bytes) else repr(value).encode() for value in row)
    return *row, hashlib.sha256(b"|".join(parts)).digest()


class Look(NamedTuple):
    """What a file's metadata tell, without reading it."""

    path: bytes
    look: str  # its size, the two times when its content and its metadata changed (ns), and its inode
    changed: float  # the later of the two times, in seconds


def look(path: Path) -> Look | None:
    """Return the look of a file; None if there is no such file.

    A program can set the first time, so that a replaced file may have the old one. It cannot set the second,
    which changes whenever a file is written, renamed or linked. On Windows, where the second is the time when
    a file was made, and on disks where renaming changes no time, the inode tells that a file was replaced.
    """
    try:
        found = os.stat(path)
        real = os.fsencode(os.path.realpath(path))
    except (OSError, ValueError):  # ValueError: a null byte in the path
        return None
    if not stat.S_ISREG(found.st_mode):  # reading a pipe would block
        return None
    times = found.st_mtime_ns, found.st_ctime_ns
    return Look(real, f"{found.st_size} {times[0]} {times[1]} {found.st_ino}", max(times) / 1e9)


def digests_of_files(files: list[ImageFile]) -> list[bytes | None]:
    """Return the SHA-256 of each file's bytes; None for one that cannot be read."""
    return [digest_of_file(file) for file in files]


def digest_of_file(file: ImageFile) -> bytes | None:
    try:
        return digest_of(read_bytes(file.path))
    except UnreadableImageError:
        return None


# ---- for the command line -------------------------------------------------------------------------


def contents(cache: Cache) -> list[tuple[str, int, int, float]]:
    """Return each cache key's description, number of images, their bytes, and the time of the last use."""
    return cache.rows(  # of damaged values, too
        "SELECT CAST(COALESCE(what, '') AS TEXT), COUNT(digest), TOTAL(bytes), "
        "MIN(MAX(CAST(COALESCE(used, 0) AS REAL), 0), 4e9) FROM makers JOIN ("
        "SELECT maker, digest, LENGTH(vector) AS bytes FROM vectors UNION ALL "
        "SELECT maker, digest, LENGTH(pixels) FROM crops) USING (maker) GROUP BY maker ORDER BY used DESC"
    )


def prune(cache: Cache, days: float) -> int:
    """Delete the entries of keys unused for `days` days; return how many images' entries were deleted."""
    before = sum(count for _, count, *_ in contents(cache))
    cache.write("DELETE FROM makers WHERE used < ?", [(time.time() - 86400 * days,)])
    for table in ("vectors", "crops"):
        cache.write(f"DELETE FROM {table} WHERE maker NOT IN (SELECT maker FROM makers)", [()])
    cache.write("DELETE FROM files WHERE digest NOT IN (SELECT digest FROM vectors UNION "
                "SELECT digest FROM crops)", [()])  # fmt: skip
    cache.connection.execute("VACUUM")  # frees disk space, once the -wal file is written back
    cache.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return before - sum(count for _, count, *_ in contents(cache))


def left_over(folder: Path, days: float) -> list[Path]:
    """Return the broken files and the files of other versions that have not changed for `days` days."""
    ours = {FILE, *(f"{FILE}-{part}" for part in ("wal", "shm", "journal"))}
    others = sorted(file for file in folder.glob(FILES) if file.name not in ours)
    return [file for file in others if time.time() - file.stat().st_mtime >= 86400 * days]
