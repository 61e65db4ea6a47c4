"""Image files and what prepares them in; batches for a network, read ahead by threads or processes, out."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from get_images import ImageFile, UnreadableImageError, read_image
from retrieval.backbones.transform import Square
from retrieval.errors import RunError
from retrieval.machine import cores, keep_freed_memory

Prepare = Callable[[np.ndarray], Square]  # uint8 RGB (height, width, 3) → what a network sees of it


class Read(NamedTuple):
    """What became of an image file: its square, or why it could not be read; and the seconds it took."""

    file: ImageFile
    square: Square | None
    reason: str = ""
    seconds: float = 0.0  # of a processor


@dataclass
class Batch:
    """Images ready for a network, with their names; and those that could not be read, with the reason."""

    names: list[str] = field(default_factory=list)
    images: list[Square] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0  # that reading them took, of a processor

    def add(self, read: Read) -> None:
        """Add what became of a file."""
        self.seconds += read.seconds
        if read.square is None:
            self.unreadable[read.file.name] = read.reason
        else:
            self.names.append(read.file.name)
            self.images.append(read.square)

    def pixels(self) -> np.ndarray:
        """uint8 (images, 3, size, size)"""
        return np.stack([image.pixels for image in self.images])


def read_ahead(
    files: list[ImageFile],
    prepare: Prepare,
    ahead: int,
    processes: bool = False,
    enough: int | None = None,
    kept: Callable[[ImageFile], Square | None] = lambda file: None,
) -> Iterator[Read]:
    """Yield the files in their order, read and prepared up to `ahead` images before the caller asks for them.

    The readers, one a core, are threads, since decoding and resizing release Python's lock; or processes for
    a `prepare` that does not, which must then be picklable. `enough` is what read_image takes. A file that
    is `kept` is not read. Raises RunError where a process was killed.
    """
    read = functools.partial(_read, prepare, enough)
    remaining = iter(files)
    coming: deque[tuple[ImageFile, Future | Square]] = deque()

    @functools.cache
    def pool() -> Executor:  # at the first file that is not kept
        return _reader_processes(prepare.module) if processes else _reader_threads()

    def start(count: int) -> None:
        coming.extend(
            (file, kept(file) or pool().submit(read, file.path)) for file in islice(remaining, count)
        )

    try:
        start(ahead)
        while coming:
            file, future = coming.popleft()
            yield Read(file, future) if isinstance(future, Square) else _finished(file, future)
            start(1)
    except BrokenProcessPool:
        coming.clear()  # the pool ends them itself, and does not bear that they are cancelled too
        _reader_processes.cache_clear()
        raise RunError(
            "a process that looks for faces has ended: killed for want of memory (then free some), or "
            'started by a script of your own without `if __name__ == "__main__":`'
        ) from None
    finally:
        for _, future in coming:
            if isinstance(future, Future):
                future.cancel()
        if not processes:
            pool().shutdown()


def _finished(file: ImageFile, future: Future) -> Read:
    result, seconds = future.result()
    if isinstance(result, UnreadableImageError):
        return Read(file, None, str(result), seconds)
    return Read(file, result, "", seconds)


def in_batches(images: Iterable[Read], batch_size: int) -> Iterator[Batch]:
    """Yield batches of `batch_size` images that could be read; the last may be smaller."""
    batch = Batch()
    for read in images:
        batch.add(read)
        if len(batch.images) == batch_size:
            yield batch
            batch = Batch()
    if batch.images or batch.unreadable:
        yield batch


def read_batches(
    files: list[ImageFile], prepare: Prepare, batch_size: int, processes: bool = False
) -> Iterator[Batch]:
    """Yield the files as batches of `batch_size` prepared images, two batches ahead, by read_ahead."""
    return in_batches(read_ahead(files, prepare, 2 * batch_size, processes), batch_size)


# ---- the readers ----------------------------------------------------------------------------------


def _read(prepare: Prepare, enough: int | None, path: Path) -> tuple[Square | UnreadableImageError, float]:
    """The square, or what was wrong; and the seconds of a processor."""
    start = time.thread_time()
    try:
        result = prepare(read_image(path, enough))
    except UnreadableImageError as error:
        result = error
    return result, time.thread_time() - start


def _reader_threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(cores(), initializer=_start_reading)


def _start_reading() -> None:
    import torch  # takes seconds, which are none of the first image's

    torch.set_num_threads(1)  # the readers are the parallelism, and the network keeps its own threads


@functools.cache
def _reader_processes(module: str) -> ProcessPoolExecutor:
    """The reader processes, one a core, which start at the first call and serve until the program ends.

    Not forks of this process: a fork of a process with threads may hang.
    """
    if "forkserver" in multiprocessing.get_all_start_methods():
        context = multiprocessing.get_context("forkserver")
        # Imported once for all of them: what the scripts begin with (found where they are run from their own
        # folder; else each imports it), and what the work is done in.
        context.set_forkserver_preload(["retrieval.pipeline", module])
    else:
        context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(cores(), mp_context=context, initializer=_start_reader)
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
        for _ in range(cores()):
            pool.submit(os.getpid)  # each task that finds no process waiting starts one
    finally:
        if mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if in_main:
            signal.signal(signal.SIGINT, handler)
    if came:
        raise KeyboardInterrupt


def _start_reader() -> None:
    keep_freed_memory(2**27)  # not of a huge photograph
    os.environ["OMP_NUM_THREADS"] = "1"  # for torch, where it is not imported yet
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_program, daemon=True).start()


def _end_with_the_program() -> None:
    """A program that is killed cannot tell its readers: they would wait for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)
