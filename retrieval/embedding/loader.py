"""Image files and a transform in; batches for a network, read ahead by threads or processes, out."""

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
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from types import ModuleType
from typing import NamedTuple

import numpy as np

from get_images import ImageFile, UnreadableImageError, read_image
from retrieval.backbones.transform import ModelInput
from retrieval.errors import RunError
from retrieval.machine import cores, keep_freed_memory

AnyTransform = Callable[[np.ndarray], ModelInput]  # uint8 RGB (height, width, 3) → the network's input


class Read(NamedTuple):
    """An image file that was read: the network's input, or why there is none; and the processor's seconds."""

    file: ImageFile
    image: ModelInput | None
    reason: str = ""
    seconds: float = 0.0


@dataclass
class Batch:
    """Inputs of a network with their names, and the unreadable images among them, with the reasons."""

    names: list[str] = field(default_factory=list)
    images: list[ModelInput] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0  # the processor's, for reading

    def add(self, read: Read) -> None:
        """Add an image file that was read."""
        self.seconds += read.seconds
        if read.image is None:
            self.unreadable[read.file.name] = read.reason
        else:
            self.names.append(read.file.name)
            self.images.append(read.image)

    def pixels(self) -> np.ndarray:
        """Return uint8 (images, 3, size, size)."""
        return np.stack([image.pixels for image in self.images])


def read_ahead(
    files: list[ImageFile],
    transform: AnyTransform,
    ahead: int,
    processes: bool = False,
    enough: int | None = None,
    cached: Callable[[ImageFile], ModelInput | None] = lambda file: None,
) -> Iterator[Read]:
    """Yield the files in their order, read and transformed up to `ahead` images before the caller needs them.

    There is one reader for each core. Readers are threads, since decoding and resizing release Python's lock;
    or `processes` for a transform that holds the lock, which must be picklable. `enough` is read_image's. A
    file for which `cached` returns an input is not read. Raises RunError if a process was killed.
    """
    read = functools.partial(_read, transform, enough)
    remaining = iter(files)
    coming: deque[Read | Future[Read]] = deque()

    @functools.cache
    def pool() -> Executor:  # started for the first file that is not cached
        return _reader_processes(transform.module) if processes else _reader_threads()

    def start(count: int) -> None:
        for file in islice(remaining, count):
            image = cached(file)
            coming.append(Read(file, image) if image else pool().submit(read, file))

    try:
        start(ahead)
        while coming:
            first = coming.popleft()
            yield first.result() if isinstance(first, Future) else first
            start(1)
    except BrokenProcessPool:
        coming.clear()  # the pool ends these futures itself, and raises if they are cancelled too
        _reader_processes.cache_clear()
        raise RunError(
            "a process that looks for faces has ended: killed for want of memory (then free some)"
        ) from None
    finally:
        for future in coming:
            if isinstance(future, Future):
                future.cancel()
        if not processes:
            pool().shutdown()


def in_batches(images: Iterable[Read], batch_size: int) -> Iterator[Batch]:
    """Yield batches of `batch_size` readable images; the last may be smaller."""
    batch = Batch()
    for read in images:
        batch.add(read)
        if len(batch.images) == batch_size:
            yield batch
            batch = Batch()
    if batch.images or batch.unreadable:
        yield batch


def read_batches(
    files: list[ImageFile], transform: AnyTransform, batch_size: int, processes: bool = False
) -> Iterator[Batch]:
    """Yield the files in batches of `batch_size` images, read two batches ahead, as read_ahead does."""
    return in_batches(read_ahead(files, transform, 2 * batch_size, processes), batch_size)


# ---- the readers ----------------------------------------------------------------------------------


def _read(transform: AnyTransform, enough: int | None, file: ImageFile) -> Read:
    start = time.thread_time()
    image, reason = None, ""
    try:
        image = transform(read_image(file.path, enough))
    except UnreadableImageError as error:
        reason = str(error)
    return Read(file, image, reason, time.thread_time() - start)


def _reader_threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(cores(), initializer=_start_reading)


def _start_reading() -> None:
    import torch  # here, or its seconds count as the first image's

    torch.set_num_threads(1)  # of this thread: the readers run in parallel, and the network has its own


@functools.cache
def _reader_processes(module: str) -> ProcessPoolExecutor:
    """Start the reader processes, one for each core. They serve until the program ends.

    They are no forks of this process, since a fork of a process with threads may hang.
    """
    if "forkserver" in multiprocessing.get_all_start_methods():
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, module])  # imported once for all readers
    else:
        context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(cores(), mp_context=context, initializer=_start_reader)
    try:
        with _without_main():
            _start_without_ctrl_c(pool)
    except KeyboardInterrupt:
        pool.shutdown(cancel_futures=True)
        raise
    return pool


@contextmanager
def _without_main() -> Iterator[None]:
    """Hide the program's own module from the processes that start meanwhile.

    They would import it, and run it once more if it lacks `if __name__ == "__main__":`.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _start_without_ctrl_c(pool: ProcessPoolExecutor) -> None:
    """Start a pool's processes with Ctrl-C blocked, which a terminal sends to every process.

    They inherit the blocked signal. (Windows has none; there they ignore Ctrl-C once they have started.) In
    this process Ctrl-C waits: if a start broke off, the pool would not know its process.
    """
    received = []
    in_main = threading.current_thread() is threading.main_thread()  # where Python handles signals
    handler = signal.signal(signal.SIGINT, lambda *_: received.append(True)) if in_main else None
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if os.name == "posix" else None
    try:
        for _ in range(cores()):
            pool.submit(os.getpid)  # a task for which no process waits starts a process
    finally:
        if mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if in_main:
            signal.signal(signal.SIGINT, handler)
    if received:
        raise KeyboardInterrupt


def _start_reader() -> None:
    keep_freed_memory(2**27)  # not the memory of a huge photograph
    os.environ["OMP_NUM_THREADS"] = "1"  # for torch, if it is imported later
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_program, daemon=True).start()


def _end_with_the_program() -> None:
    """End this reader when the program ends: a killed program cannot tell its readers to."""
    multiprocessing.parent_process().join()
    os._exit(1)
