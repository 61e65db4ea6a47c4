"""Images and what embeds them in; their vectors, where a run before has made them, out.

    python -m retrieval.embedding --cache_dir DIR [--older_than DAYS]     # what it holds; removes the unused

A SQLite file holds a vector by two digests: of the image's bytes, and of all that makes a vector of them. It
holds the crop of a face likewise, for all networks that see the same crop. Whatever is wrong with the file
costs the time to make the vectors again, and nothing else.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sqlite3
import stat
import time
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from get_images import ImageFile
from retrieval.backbones.transform import Square
from retrieval.errors import InputError

VERSION = 2  # of the tables: each has a file of its own
FILE = f"embeddings-{VERSION}.sqlite"
FILES = "embeddings-*.sqlite*"  # of all versions, and what lies beside them
SCHEMA = f"""
CREATE TABLE files (path BLOB PRIMARY KEY, size INTEGER, changed INTEGER, digest BLOB) WITHOUT ROWID;
CREATE TABLE makers (maker BLOB PRIMARY KEY, what TEXT, used REAL) WITHOUT ROWID;
CREATE TABLE vectors (
    maker BLOB, digest BLOB, face INTEGER, vector BLOB, PRIMARY KEY (maker, digest)
) WITHOUT ROWID;
CREATE TABLE crops (maker BLOB, digest BLOB, face INTEGER, pixels BLOB, PRIMARY KEY (maker, digest));
PRAGMA user_version = {VERSION};
"""
USED = """
INSERT INTO makers VALUES (?, ?, ?) ON CONFLICT (maker) DO UPDATE SET used = excluded.used
"""
AT_ONCE = 500  # values in a statement: SQLite takes 999 everywhere
LATELY = 2.0  # seconds: a file that was just written may be written again within one tick of its clock

log = logging.getLogger("retrieval.cache")


class Maker(NamedTuple):
    """What makes vectors, or crops, of images."""

    key: bytes  # the digest of all that decides them
    what: str


class Known(NamedTuple):
    """What is kept of an image."""

    vector: np.ndarray  # float32 (dimension,), of unit length
    face: bool | None  # whether it shows a face that was found; None: none was looked for


@dataclass
class Cache:
    """The file in a folder, as far as it can be used. Nothing here raises but where the folder is a file."""

    folder: Path
    verify: bool = False  # read every image, also one whose size and time are what they were
    connection: sqlite3.Connection | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.folder.is_file():
            raise InputError(f"--cache_dir {self.folder} is not a folder but a file: give another one")
        self._attempt(self._open)

    # ---- what embedding asks

    def digests(self, files: list[ImageFile]) -> dict[str, bytes]:
        """The digest of each image that can be read, by its name; of none where there is no cache."""
        return self._excused(lambda: self._digests(files)) or {}

    def vectors(self, maker: Maker, digests: Collection[bytes]) -> dict[bytes, Known]:
        """What is kept of the images with these digests."""
        self._used(maker)
        rows = self._excused(lambda: self._kept("vectors", "vector", maker, list(digests))) or []
        return {
            digest: Known(np.frombuffer(vector, np.float32), _face(face)) for digest, face, vector in rows
        }

    def keep_vectors(self, maker: Maker, known: dict[bytes, Known]) -> None:
        """Keep what was made of the images with these digests."""
        self._keep("vectors", maker, [(digest, made.face, made.vector.tobytes())
                                      for digest, made in known.items()])  # fmt: skip

    def crops(self, maker: Maker, digests: Collection[bytes]) -> set[bytes]:
        """Of which of these images the crop is kept."""
        self._used(maker)
        return {digest for digest, *_ in
                self._excused(lambda: self._kept("crops", "0", maker, list(digests))) or []}  # fmt: skip

    def crop(self, maker: Maker, digest: bytes, size: int) -> Square | None:
        """The crop of an image, uint8 (3, size, size)."""
        rows = self._excused(lambda: self._kept("crops", "pixels", maker, [digest]))
        if not rows:
            return None
        ((_, face, pixels),) = rows
        return Square(np.frombuffer(pixels, np.uint8).reshape(3, size, size), _face(face))

    def keep_crops(self, maker: Maker, crops: dict[bytes, Square]) -> None:
        """Keep the crops of the images with these digests."""
        self._keep("crops", maker, [(digest, crop.face, crop.pixels.tobytes())
                                    for digest, crop in crops.items()])  # fmt: skip

    def _used(self, maker: Maker) -> None:
        self._excused(lambda: self.write(USED, [(*maker, time.time())]))

    def _keep(self, table: str, maker: Maker, rows: list[tuple]) -> None:
        if rows:
            self._used(maker)  # again: somebody may have removed it meanwhile
            values = [(maker.key, *row) for row in rows]
            self._excused(lambda: self.write(f"INSERT OR REPLACE INTO {table} VALUES (?, ?, ?, ?)", values))

    def _kept(self, table: str, column: str, maker: Maker, digests: list[bytes]) -> list[tuple]:
        return self.rows_of(
            f"SELECT digest, face, {column} FROM {table} WHERE maker = ? AND digest", digests, maker.key
        )

    def _digests(self, files: list[ImageFile]) -> dict[str, bytes]:
        """The digest of each image: as it was, if its size and time are; else of its bytes."""
        looks = {file.name: seen for file in files if (seen := look(file.path))}
        same = {} if self.verify else self._unchanged(looks)
        others = [file for file in files if file.name in looks and file.name not in same]
        with ThreadPoolExecutor() as pool:
            digests = list(pool.map(digest_of_file, others))
        read = {file.name: digest for file, digest in zip(others, digests, strict=True) if digest}
        now = time.time()
        settled = [name for name in read if now - looks[name][2] / 1e9 > LATELY]
        rows = [(*looks[name], read[name]) for name in settled]
        self.write("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?)", rows)
        return same | read

    def _unchanged(self, looks: dict[str, tuple[bytes, int, int]]) -> dict[str, bytes]:
        """The digests that are kept of files which look as they did."""
        statement = "SELECT path, size, changed, digest FROM files WHERE path"
        rows = self.rows_of(statement, [path for path, *_ in looks.values()])
        kept = {(path, size, changed): digest for path, size, changed, digest in rows}
        return {name: kept[look] for name, look in looks.items() if look in kept}

    # ---- the file

    def _open(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.connection = sqlite3.connect(self.folder / FILE, timeout=30)
        self.connection.execute("PRAGMA journal_mode = WAL")
        # a crash may cost the last vectors, never the file
        self.connection.execute("PRAGMA synchronous = NORMAL")
        with self.connection:
            self.connection.execute("BEGIN IMMEDIATE")  # of two runs, one makes the tables
            (kept,) = self.connection.execute("PRAGMA user_version").fetchone()
            (tables,) = self.connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
            if not tables:
                for statement in SCHEMA.strip().split(";\n"):
                    self.connection.execute(statement)
            elif kept != VERSION:
                raise sqlite3.DatabaseError("it has other tables")

    def rows(self, statement: str, *values: object) -> list[tuple]:
        return self.connection.execute(statement, values).fetchall()

    def rows_of(self, statement: str, among: list, *values: object) -> list[tuple]:
        """The rows of a statement that ends in a column which is to be among these, some at a time."""
        found = []
        for start in range(0, len(among), AT_ONCE):
            part = among[start : start + AT_ONCE]
            found += self.rows(f"{statement} IN ({', '.join('?' * len(part))})", *values, *part)
        return found

    def write(self, statement: str, rows: list[tuple]) -> None:
        with self.connection:
            self.connection.executemany(statement, rows)

    def _excused(self, act: Callable[[], object]) -> object:
        """What `act` gives, as _attempt has it; None where the file was left."""
        return self._attempt(act) if self.connection else None

    def _attempt(self, act: Callable[[], object]) -> object:
        """What `act` gives. A file that is broken is set aside and made anew; one that fails is left."""
        try:
            return act()
        except (sqlite3.OperationalError, OSError) as error:  # locked, full, read-only
            self._leave(f"cannot be used ({error}): this run goes on without it")
        except sqlite3.Error as error:  # torn, or somebody else's
            self._leave(f"is broken ({error}): it is set aside, and its vectors are made again")
            self._set_aside()
        return None

    def _leave(self, why: str) -> None:
        log.warning("the cache %s %s", self.folder / FILE, why)
        if self.connection:
            self.connection.close()
        self.connection = None

    def _set_aside(self) -> None:
        """Rename the file, and begin another."""
        broken = self.folder / f"{FILE}.broken-{time.strftime('%Y%m%d-%H%M%S')}"
        try:
            os.replace(self.folder / FILE, broken)
            for more in ("-wal", "-shm"):
                (self.folder / f"{FILE}{more}").unlink(missing_ok=True)
            self._open()
        except (OSError, sqlite3.Error) as error:
            self._leave(f"cannot be made anew ({error}): this run goes on without it")


def _face(kept: int | None) -> bool | None:
    return None if kept is None else bool(kept)


def look(path: Path) -> tuple[bytes, int, int] | None:
    """The quick look at a file: where it is, its size, when it was changed (ns); None where there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    if not stat.S_ISREG(found.st_mode):  # a pipe would be waited for
        return None
    return os.fsencode(os.path.realpath(path)), found.st_size, found.st_mtime_ns


def digest_of_file(file: ImageFile) -> bytes | None:
    """Of its bytes; None where it cannot be read."""
    try:
        with open(file.path, "rb") as opened:
            return hashlib.file_digest(opened, "sha256").digest()
    except OSError:
        return None


# ---- what is there --------------------------------------------------------------------------------


def contents(cache: Cache) -> list[tuple[str, int, int, float]]:
    """Each maker with something here: what it is, how many images, their bytes, and when it was last used."""
    return cache.rows(
        "SELECT what, COUNT(digest), SUM(bytes), used FROM makers JOIN ("
        "SELECT maker, digest, LENGTH(vector) AS bytes FROM vectors UNION ALL "
        "SELECT maker, digest, LENGTH(pixels) FROM crops) USING (maker) GROUP BY maker ORDER BY used DESC"
    )


def prune(cache: Cache, days: float) -> int:
    """Remove what was made of images by what was not used for so many days; of how many that was."""
    before = sum(count for _, count, *_ in contents(cache))
    cache.write("DELETE FROM makers WHERE used < ?", [(time.time() - 86400 * days,)])
    for table in ("vectors", "crops"):
        cache.write(f"DELETE FROM {table} WHERE maker NOT IN (SELECT maker FROM makers)", [()])
    cache.write("DELETE FROM files WHERE digest NOT IN (SELECT digest FROM vectors UNION "
                "SELECT digest FROM crops)", [()])  # fmt: skip
    cache.connection.execute("VACUUM")  # gives the room back to the disk, when it is no longer in -wal
    cache.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return before - sum(count for _, count, *_ in contents(cache))


def left_over(folder: Path, days: float) -> list[Path]:
    """The files that were set aside, or that other versions of the project use, unchanged for so long."""
    own = {FILE, *(f"{FILE}-{part}" for part in ("wal", "shm", "journal"))}
    others = sorted(file for file in folder.glob(FILES) if file.name not in own)
    return [file for file in others if time.time() - file.stat().st_mtime >= 86400 * days]
