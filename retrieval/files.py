"""Write a file whole or not at all, and hold a folder for one run at a time."""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from retrieval.errors import InputError

log = logging.getLogger("retrieval.files")

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, the user's share of it, or what a file may hold
LOCK = ".lock"  # the file in an output folder that a run locks


@contextmanager
def lock(folder: Path, flag: str) -> Iterator[None]:
    """Lock the folder that a flag names, inside a `with` block.

    Raises InputError if another run has locked it. Only warns on a disk without locks.
    """
    from filelock import FileLock, Timeout

    held = FileLock(folder / LOCK, fallback_to_soft=False)  # a soft lock would outlive a killed run
    try:
        held.acquire(blocking=False)
    except Timeout:
        raise InputError(
            f"another run writes into {folder} now: wait for its end, or give another --{flag}"
        ) from None
    except (OSError, NotImplementedError) as error:
        log.warning("%s cannot be locked (%s): let no other run write into it", folder, error)
    try:
        yield
    finally:
        held.release()


def as_json(value: Any, indent: int | None = None) -> bytes:
    """Return a value as JSON in ASCII bytes, so that no server can read the names in another encoding."""
    return (json.dumps(value, indent=indent, allow_nan=False) + ("\n" if indent else "")).encode("ascii")


def write_whole(path: Path, data: bytes) -> None:
    """Write a file whole: at any moment it is the old or the new one, and on the disk when this returns."""
    with open_whole(path) as file:
        file.write(data)


@contextmanager
def open_whole(path: Path) -> Iterator[IO[bytes]]:
    """Yield a file to write, which replaces `path` at the end of the `with` block, unless that raises."""
    unfinished = path.with_name(f".{path.name}.unfinished-{os.getpid()}")
    try:
        with naming(path), open(unfinished, "wb") as file:
            yield file
            write_through(file, b"")
        os.replace(unfinished, path)
        _sync_folder(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name the file that a `with` block writes in the error of a full disk, which names none, or another."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            error.filename = str(path)
        raise


def write_through(file: IO[bytes], data: bytes) -> None:
    """Write the bytes to a file, and return when they are on the disk."""
    file.write(data)
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # Windows has no such call, and keeps a renamed file without it
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
