"""Write a file whole or not at all, and hold a folder for one run at a time."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from retrieval.errors import InputError

log = logging.getLogger("retrieval.files")

LOCK = ".lock"  # which a run holds on the folder it writes into


@contextmanager
def lock(folder: Path, flag: str) -> Iterator[None]:
    """`with` it, no other program holds the folder that a flag names.

    Raises InputError where one does. Where the folder's disk knows no locks, that is said, and it goes on.
    """
    from filelock import FileLock, Timeout

    held = FileLock(folder / LOCK, fallback_to_soft=False)  # that would outlive a run that is killed
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
    """JSON as ASCII bytes, so that no server can read the names in another encoding."""
    return (json.dumps(value, indent=indent, allow_nan=False) + ("\n" if indent else "")).encode("ascii")


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that at any moment it is the old one or the new one, and on the disk when done."""
    unfinished = path.with_name(f".{path.name}.unfinished-{os.getpid()}")
    try:
        with open(unfinished, "wb") as file:
            write_through(file, data)
        os.replace(unfinished, path)
        _sync_folder(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def write_through(file: IO[bytes], data: bytes) -> None:
    """Write, and go on when it is on the disk."""
    file.write(data)
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # Windows has no such call, and keeps a rename without it
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
