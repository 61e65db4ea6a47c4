"""torchrun's environment in; which process of how many this is, and what all of them wait for, out.

torchrun --nproc_per_node 2 model_not_tuned.py ...      # or accelerate launch; more machines likewise
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from retrieval.settings import InputError, OthersEndedError, RunError, which_process

NUMBERS = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
LONGEST_WAIT = timedelta(days=7)  # for a slower process: one that has ended is noticed at once
QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds in each so many; or "max"
ENDED = (
    "another process of this run has ended or cannot be reached; unless it was killed, it says why itself. "
    "Start the same command again: it goes on from what is on the disk"
)


def number() -> int:
    """Which process of the run this is, from 0; 0 where it is the only one."""
    return which_process()


def count() -> int:
    """How many processes the run has, on all machines together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def several() -> bool:
    """Whether the run has more than one process."""
    return count() > 1


def on_this_machine() -> int:
    """How many processes the run has on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if several() else 1


def is_first() -> bool:
    """Whether this is the process that ranks, sends, and writes the files of the run."""
    return number() == 0


def cores() -> int:
    """The processor cores for this process: its share of those that the machine gives the run."""
    given = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = (QUOTA.read_text() if QUOTA.is_file() else "max").partition(" ")
    if quota.isdecimal():
        given = min(given, round(int(quota) / int(period)))
    return max(1, given // on_this_machine())


def take_a_share() -> None:
    """Let each process of a machine work on its share of the cores, and a GPU of its own if there is one."""
    if not several():
        return
    import torch

    torch.set_num_threads(cores())  # torchrun says one
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())


def wait() -> None:
    """Wait until every process of the run is here. Raises RunError where one has ended."""
    if several():
        with a_sentence():
            _group().barrier()


def all_say(yes: bool) -> bool:
    """Whether every process says yes. Raises RunError where one has ended."""
    if not several():
        return yes
    import torch

    said = torch.tensor([int(yes)])
    with a_sentence():
        _group().all_reduce(said, op=_group().ReduceOp.MIN)
    return bool(said)


@contextmanager
def a_sentence() -> Iterator[None]:
    """Around what waits for the other processes: one that has ended is a RunError."""
    try:
        yield
    except RuntimeError as error:  # of torch.distributed, whose errors have no other class in common
        if isinstance(error, RunError):
            raise
        reason = str(error).partition("\n")[0]
        raise RunError(f"{ENDED} ({reason})") from error


@functools.cache
def _group() -> Any:
    """torch.distributed, in which the processes have met, on the CPU."""
    from torch import distributed

    if not distributed.is_initialized():
        with a_sentence():
            distributed.init_process_group("gloo", timeout=LONGEST_WAIT)
        atexit.register(distributed.destroy_process_group)
    return distributed


def end_with_the_others() -> None:
    """From here on, what torchrun sends when another process has ended ends this one with a sentence.

    Raises InputError where the environment says that there are several processes, but not how they meet.
    """
    told = os.environ.get("WORLD_SIZE", "1")
    if told == "1":
        return
    unclear = [word for word in NUMBERS if not os.environ.get(word, "").isdecimal()]
    unclear += [] if os.environ.get("MASTER_ADDR") else ["MASTER_ADDR"]
    if unclear:
        raise InputError(
            f"WORLD_SIZE is {told}, as of several processes, but {', '.join(unclear)} is not set as torchrun "
            "sets it: start the script with torchrun, or unset WORLD_SIZE"
        )

    def _end(*_: Any) -> None:
        raise OthersEndedError(ENDED)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _end)


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
