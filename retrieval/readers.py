"""Image files and what prepares them in; batches for a network, read ahead by threads or processes, out."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from get_images import ImageFile, UnreadableImageError, read_image
from retrieval.settings import RunError
from retrieval.transforms import Square

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Batch:
    """Images ready for a network, with their names; and those that could not be read, with the reason."""

    names: list[str] = field(default_factory=list)
    images: list[Square] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)


def read_batches(
    files: list[ImageFile], prepare: Callable[[Tensor], Square], batch_size: int, processes: bool = False
) -> Iterator[Batch]:
    """Yield the files in their order as batches of `batch_size` prepared images; the last may be smaller.

    Readers, one a core, read and prepare up to two batches ahead of the caller: threads, since decoding and
    resizing release Python's lock; or processes for a `prepare` that does not, which must then be picklable.
    `prepare` turns pixels (3, height, width) into what the network sees. Raises RunError where a process was
    killed.
    """
    import torch

    pool: Executor = _reader_processes() if processes else _reader_threads()
    read = functools.partial(_read_in_process if processes else _read, prepare)
    remaining = iter(files)
    ahead: deque[tuple[ImageFile, Future]] = deque()
    try:
        ahead.extend((file, pool.submit(read, file.path)) for file in islice(remaining, 2 * batch_size))
        batch = Batch()
        while ahead:
            file, future = ahead.popleft()
            result = future.result()
            ahead.extend((file, pool.submit(read, file.path)) for file in islice(remaining, 1))
            if isinstance(result, UnreadableImageError):
                batch.unreadable[file.name] = str(result)
            else:
                batch.names.append(file.name)
                batch.images.append(result._replace(pixels=torch.as_tensor(result.pixels)))
            if len(batch.images) == batch_size or not ahead:
                yield batch
                batch = Batch()
    except BrokenProcessPool:
        ahead.clear()  # the pool ends them itself, and does not bear that they are cancelled too
        _reader_processes.cache_clear()
        raise RunError(
            "a process that looks for faces has ended: killed for want of memory (then free some), or "
            'started by a script of your own without `if __name__ == "__main__":`'
        ) from None
    finally:
        for _, future in ahead:
            future.cancel()
        if not processes:
            pool.shutdown()


# ---- the readers ----------------------------------------------------------------------------------


def _read(prepare: Callable[[Tensor], Square], path: Path) -> Square | UnreadableImageError:
    try:
        return prepare(read_image(path))
    except UnreadableImageError as error:
        return error


def _read_in_process(prepare: Callable[[Tensor], Square], path: Path) -> Square | UnreadableImageError:
    """As _read, with pixels that travel as plain bytes: shared memory is scarce in containers."""
    result = _read(prepare, path)
    return result._replace(pixels=result.pixels.numpy()) if isinstance(result, Square) else result


def _reader_threads() -> ThreadPoolExecutor:
    import torch

    # One torch thread a worker: the workers are the parallelism, and the network keeps its own threads.
    return ThreadPoolExecutor(os.cpu_count(), initializer=torch.set_num_threads, initargs=(1,))


@functools.cache
def _reader_processes() -> ProcessPoolExecutor:
    """The reader processes, one a core, which start at the first call and serve until the program ends.

    Not forks of this process: a fork of a process with threads may hang.
    """
    if "forkserver" in multiprocessing.get_all_start_methods():
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torchvision.io"])  # imported once for all of them
    else:
        context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(mp_context=context, initializer=_start_reader)
    try:
        _start_without_ctrl_c(pool)
    except KeyboardInterrupt:
        pool.shutdown(cancel_futures=True)
        raise
    return pool


def _start_without_ctrl_c(pool: ProcessPoolExecutor) -> None:
    """Start a pool's processes so that Ctrl-C, which reaches each process of a terminal, is not for them.

    They inherit that it is blocked. (Windows has no such thing; there they ignore it once they are up.) Here
    it waits: a start that breaks off would leave processes that the pool does not know.
    """
    came = []
    in_main = threading.current_thread() is threading.main_thread()  # where Python handles signals
    handler = signal.signal(signal.SIGINT, lambda *_: came.append(True)) if in_main else None
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if os.name == "posix" else None
    try:
        for _ in range(os.cpu_count()):
            pool.submit(os.getpid)  # each task that finds no process waiting starts one
    finally:
        if mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if in_main:
            signal.signal(signal.SIGINT, handler)
    if came:
        raise KeyboardInterrupt


def _start_reader() -> None:
    import torch

    torch.set_num_threads(1)  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_program, daemon=True).start()


def _end_with_the_program() -> None:
    """A program that is killed cannot tell its readers: they would wait for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)
