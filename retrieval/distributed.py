"""The environment that torchrun sets in; this process's rank, its share of the work, and collectives, out.

    torchrun --nproc_per_node 2 model_not_tuned.py ...      # or accelerate launch; several machines likewise

A process that was started alone is rank 0 of 1, and every function works there without torch.
"""

from __future__ import annotations

import atexit
import functools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from tqdm import tqdm

from retrieval.errors import InputError, OthersEndedError, RunError
from retrieval.machine import cores

NUMBERS = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
TIMEOUT = timedelta(days=7)  # to wait for a slower process; gloo detects at once that a process has ended
ENDED = (
    "another process of this run has ended or cannot be reached; unless it was killed, its own error message "
    "says why. Start the same command again: it reuses the results that are saved on disk"
)


# ---- this process among the others ----------------------------------------------------------------


def world_size() -> int:
    """Return how many processes the run has, on all machines together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def several() -> bool:
    """Return whether the run has more than one process."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def rank() -> int:
    """Return the number of this process, from 0; a single process is 0, whatever RANK says."""
    text = os.environ.get("RANK", "")
    return int(text) if several() and text.isdecimal() else 0


def rank_zero_only(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a function that writes, sends or draws: other ranks skip it and get None."""

    @functools.wraps(function)
    def _on_rank_zero(*arguments: Any, **named: Any) -> Any:
        return function(*arguments, **named) if rank() == 0 else None

    return _on_rank_zero


def progress_bar(total: int, what: str, unit: str = "image", **options: Any) -> tqdm:
    """Return a tqdm progress bar for `total` images, or other units; only rank 0 shows it."""
    return tqdm(total=total, desc=what, unit=unit, disable=rank() != 0, **options)


def shard(count: int) -> slice:
    """Return this process's shard of `count` rows: shards are contiguous and differ by one row at most.

    >>> shard(8)
    slice(0, 8, None)
    """
    size, larger = divmod(count, world_size())
    start = rank() * size + min(rank(), larger)
    return slice(start, start + size + (rank() < larger))


# ---- set up ---------------------------------------------------------------------------------------


def set_up() -> None:
    """Check torchrun's environment, and make SIGTERM end this process with an error message.

    Raises InputError if WORLD_SIZE says several processes, and another variable of torchrun is missing.
    """
    if not several():
        return
    unclear = [name for name in NUMBERS if not os.environ.get(name, "").isdecimal()]
    unclear += [] if os.environ.get("MASTER_ADDR") else ["MASTER_ADDR"]
    if unclear:
        raise InputError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(unclear)} is not set as torchrun sets "
            "it: start the script with torchrun, or unset WORLD_SIZE"
        )

    def _end(*_: Any) -> None:
        raise OthersEndedError(ENDED)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _end)  # which torchrun sends when another process has ended


def claim_devices() -> None:
    """Limit this process to its share of the machine's cores, and choose its GPU if there is one."""
    if not several():
        return
    import torch

    torch.set_num_threads(cores())  # torchrun sets OMP_NUM_THREADS=1
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())


# ---- collectives: every process calls them, in the same order -------------------------------------


def all_gather(value: Any) -> list[Any]:
    """Return the values of all processes, by rank. Raises RunError if a process has ended."""
    if not several():
        return [value]
    values = [None] * world_size()
    with explain_lost_process():
        process_group().all_gather_object(values, value)
    return values


def gather(value: Any) -> list[Any] | None:
    """Return the values of all processes, by rank, on rank 0; None elsewhere. Raises as all_gather."""
    if not several():
        return [value]
    values = [None] * world_size() if rank() == 0 else None
    with explain_lost_process():
        process_group().gather_object(value, values)
    return values


def from_rank_0(value: Any) -> Any:
    """Return rank 0's value in every process. Raises as all_gather."""
    return all_gather(value)[0]


def all_agree(yes: bool) -> bool:
    """Return whether `yes` is true in every process. Raises as all_gather."""
    return all(all_gather(yes))


@contextmanager
def explain_lost_process() -> Iterator[None]:
    """Turn the error that a collective raises when another process has ended into a RunError."""
    try:
        yield
    except RuntimeError as error:  # torch.distributed's errors have no narrower class in common
        raise RunError(f"{ENDED} ({str(error).partition(chr(10))[0]})") from error


@functools.cache
def process_group() -> Any:
    """Return torch.distributed with all processes connected, by gloo on the CPU."""
    from torch import distributed

    if not distributed.is_initialized():
        distributed.init_process_group("gloo", timeout=TIMEOUT)
        atexit.register(distributed.destroy_process_group)
    return distributed
