"""What this machine has and runs: memory, processor cores, installed packages, the program."""

from __future__ import annotations

import ctypes
import logging
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from retrieval.errors import InputError, RunError

log = logging.getLogger("retrieval.machine")

# ---- memory ---------------------------------------------------------------------------------------

SHARE = 0.25  # of the memory, for one array: queries and gallery have one each, and the rest needs memory too
UNKNOWN_MEMORY = 2**32  # bytes, assumed where the system does not report its memory
MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container, in bytes or "max"
ON_DISK = "/var/tmp"  # on Unix: Filesystem Hierarchy Standard 3.0, 5.15


def zeros(shape: tuple[int, ...], dtype: type, what: str, processes: int = 1) -> np.ndarray:
    """Return an array of zeros, in memory or, if it is too large, in a temporary file (numpy.memmap).

    `what` names the content for the log. `processes` is how many processes on this machine allocate such an
    array and share the memory. Raises RunError if the disk has no room for the file.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size <= SHARE * memory() / processes:
        return np.zeros(shape, dtype)
    folder = _folder_on_disk()
    free = shutil.disk_usage(folder).free
    if size > free:
        raise RunError(
            f"{size / 1e9:.1f} GB of {what} do not fit into {folder}, where {free / 1e9:.1f} GB are free: "
            "make room, or set TMPDIR to another folder"
        )
    log.info("%.1f GB of %s are stored in %s during the run", size / 1e9, what, folder)
    with tempfile.TemporaryFile(dir=folder) as file:
        return np.memmap(file, dtype=dtype, mode="w+", shape=shape)


def _folder_on_disk() -> str:
    """Return the folder for large temporary files: /tmp may itself lie in memory, /var/tmp does not."""
    if not {"TMPDIR", "TEMP", "TMP"} & os.environ.keys() and os.access(ON_DISK, os.W_OK | os.X_OK):
        return ON_DISK
    return tempfile.gettempdir()


def memory() -> int:
    """Return the bytes of memory of this machine, or of the container in it."""
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return UNKNOWN_MEMORY
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = MEMORY_LIMIT.read_text().strip() if MEMORY_LIMIT.is_file() else "max"
    return min(installed, int(limit)) if limit.isdigit() else installed


def keep_freed_memory(most: int = 2**30) -> None:
    """Let glibc reuse the memory of one layer for the next instead of returning it to the system: about ×2.

    Otherwise half of the time goes into page faults. Blocks of more than `most` bytes are returned. The
    options and their numbers: man 3 mallopt.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(libc, "mallopt"):  # musl has none
        return
    # M_MMAP_THRESHOLD: only larger blocks come straight from the system; older releases accept 32 MiB.
    if libc.mallopt(-3, most) or libc.mallopt(-3, 2**25):
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: keep freed memory


def out_of_memory(error: Exception) -> bool:
    """Return whether a device ran out of memory: CUDA, MPS and the CPU raise different errors."""
    signs = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory")
    return isinstance(error, MemoryError) or any(sign in str(error).lower() for sign in signs)


def compute_what_fits(
    compute: Callable[[int], Any], at_once: int, device: str, advice: str
) -> tuple[Any, int]:
    """Return compute(at_once), and `at_once`: it is halved each time that the device runs out of memory.

    Raises RunError, whose sentence ends with `advice`, if not even one image fits.
    """
    import torch

    while True:
        try:
            return compute(at_once), at_once
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            if at_once == 1:
                raise RunError(f"not one image fits into the memory of {device}: {advice}") from None
        at_once //= 2
        log.warning("the batch does not fit into the memory of %s: trying %d at once", device, at_once)
        torch.accelerator.empty_cache()


# ---- cores ----------------------------------------------------------------------------------------

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: "max", or microseconds per period


def local_world_size() -> int:
    """Return how many processes of the run this machine has."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if several else 1


def cores() -> int:
    """Return the number of processor cores for this process: its share of the run's cores."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = (CPU_QUOTA.read_text() if CPU_QUOTA.is_file() else "max").partition(" ")
    if quota.isdecimal():
        usable = min(usable, round(int(quota) / int(period)))
    return max(1, usable // local_world_size())


# ---- packages and the program ---------------------------------------------------------------------


def require(package: str, module: str) -> None:
    """Raise InputError, with the command that installs it, unless `package` is installed."""
    if find_spec(module) is None:
        raise InputError(f"the package {package} is not installed: run `pip install {package}`")


def version_of(package: str) -> str:
    """Return the version of an installed package, "" if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def program() -> str:
    """Return the name of the running program: that of the script, or `python -m` and the module's."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name.removesuffix('.__main__')}" if spec else Path(sys.argv[0]).name
