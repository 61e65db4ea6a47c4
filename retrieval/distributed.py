"""torchrun's environment in; which process of how many this is, and what all of them wait for, out.

torchrun --nproc_per_node 2 model_not_tuned.py ...      # or accelerate launch; more machines likewise
"""

from __future__ import annotations

import atexit
import functools
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from retrieval.errors import InputError, OthersEndedError, RunError
from retrieval.machine import cores

NUMBERS = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
LONGEST_WAIT = timedelta(days=7)  # for a slower process: one that has ended is noticed at once
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


def is_first() -> bool:
    """Whether this is the process that ranks, sends, and writes the files of the run."""
    return number() == 0


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


def which_process() -> int:
    """Of several that torchrun has started, from 0; 0 where it is the only one, whatever RANK says."""
    several, rank = os.environ.get("WORLD_SIZE", "1") != "1", os.environ.get("RANK", "")
    return int(rank) if several and rank.isdecimal() else 0
