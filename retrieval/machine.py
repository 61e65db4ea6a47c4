"""What this machine has: processor cores, memory, installed packages."""

from __future__ import annotations

import ctypes
import logging
import math
import os
import shutil
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from retrieval.errors import InputError, RunError

log = logging.getLogger("retrieval.machine")

SHARE = 0.25  # of the memory, for one array: queries and gallery have one each, and others need some too
ELSEWHERE = 2**32  # bytes, where the system does not say how much memory it has


ON_DISK = "/var/tmp"  # on Unix: Filesystem Hierarchy Standard 3.0, 5.15
LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container, in bytes or "max"


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


QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds in each so many; or "max"


def on_this_machine() -> int:
    """How many processes the run has on this machine."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if several else 1


def cores() -> int:
    """The processor cores for this process: its share of those that the machine gives the run."""
    given = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = (QUOTA.read_text() if QUOTA.is_file() else "max").partition(" ")
    if quota.isdecimal():
        given = min(given, round(int(quota) / int(period)))
    return max(1, given // on_this_machine())


def keep_freed_memory(most: int = 2**30) -> None:
    """Let glibc keep the memory of one layer for the next instead of returning it to the system: about ×2.

    Without it half of the time goes into page faults. What takes more than `most` bytes is returned. Options
    and their numbers: man 3 mallopt.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(libc, "mallopt"):  # musl has none
        return
    # M_MMAP_THRESHOLD: only what is larger comes straight from the system; older releases take 32 MiB.
    if libc.mallopt(-3, most) or libc.mallopt(-3, 2**25):
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: keep what is freed


def require(package: str, module: str) -> None:
    """Raise InputError, with the line that installs it, unless `package` is here to import `module` from."""
    if find_spec(module) is None:
        raise InputError(f"the package {package} is not installed: run `pip install {package}`")


def version_of(package: str) -> str:
    """Of an installed package; nothing where it is not there."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def out_of_memory(error: RuntimeError) -> bool:
    """Whether a device had no room: torch.OutOfMemoryError on CUDA, a RuntimeError on MPS and the CPU."""
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return any(part in str(error) for part in words)
