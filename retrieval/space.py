"""A shape in; an array of zeros out, in memory as far as that is large enough, or else in a file."""

from __future__ import annotations

import logging
import math
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np

from retrieval.settings import RunError

SHARE = 0.25  # of the memory, for one array: queries and gallery have one each, and others need some too
ELSEWHERE = 2**32  # bytes, where the system does not say how much memory it has
ON_DISK = "/var/tmp"  # on Unix: Filesystem Hierarchy Standard 3.0, 5.15
LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container, in bytes or "max"

log = logging.getLogger("retrieval.space")


def zeros(shape: tuple[int, ...], dtype: type, what: str, makers: int = 1) -> np.ndarray:
    """An array of zeros, of `what`: in memory, or in a file that goes with the program.

    So many processes of this machine make one like it.

    Raises RunError where there is no room for that file.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size <= SHARE * memory() / makers:
        return np.zeros(shape, dtype)
    folder = _folder()
    free = shutil.disk_usage(folder).free
    if size > free:
        raise RunError(
            f"{size / 1e9:.1f} GB of {what} do not fit into {folder}, which has {free / 1e9:.1f}: make room, "
            "or set TMPDIR to another folder"
        )
    log.info("%.1f GB of %s lie in %s while this runs", size / 1e9, what, folder)
    with tempfile.TemporaryFile(dir=folder) as file:
        return np.memmap(file, dtype=dtype, mode="w+", shape=shape)


def _folder() -> str:
    """Where large files go that nobody is to keep: /tmp may itself lie in memory, and /var/tmp does not."""
    if not {"TMPDIR", "TEMP", "TMP"} & os.environ.keys() and os.access(ON_DISK, os.W_OK | os.X_OK):
        return ON_DISK
    return tempfile.gettempdir()


def memory() -> int:
    """The bytes of memory that this machine, or the container in it, has."""
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return ELSEWHERE
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = LIMIT.read_text().strip() if LIMIT.is_file() else "max"
    return min(there, int(limit)) if limit.isdigit() else there
