"""Image files and a transform in; batches for a network, read ahead by threads or processes, out.

Threads read for a network on the CPU: decoding and resizing release Python's lock, and they start at once.
But turning an image into an array holds the lock, so that sixteen threads read 650 photographs of 500 x 375 a
second. So processes read where the network is faster, on a GPU, and for face detectors, which hold the lock
all the time. Sixteen workers of torch's DataLoader read 6700 photographs a second. But a DataLoader imports
torch in its workers, of which dlib's detector needs nothing: on two cores, a first run on 1415 photographs
took 18 s with it and 15 s with a pool. So the processes are a pool, and large batches go through shared
memory as a DataLoader's do.
"""

from __future__ import annotations

import functools
import hashlib
import io
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate, islice
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from get_images import (
    MOST_PIXELS,
    ImageFile,
    TooManyPixelsError,
    UnreadableImageError,
    decode_image,
    open_image,
    read_bytes,
)
from retrieval.backbones.transform import ModelInput
from retrieval.errors import RunError
from retrieval.machine import cores, keep_freed_memory, local_world_size, memory, require

if TYPE_CHECKING:
    from torch import Tensor

    from retrieval.backbones.face_crop import FaceCrop
    from retrieval.backbones.transform import Transform

FEW = 2000  # images: beside a GPU, threads read them while processes would start
PIPE_BYTES = 2**22  # more go from a process to this one through shared memory, at 1.6 times the speed
SHARED_MEMORY, BATCHES = Path("/dev/shm"), 64  # of Linux, which must have room for so many batches
ORIENTATION = 0x0112  # EXIF's tag; 1 is upright
MOST_GPU_PIXELS = 2**25  # of a photograph that a GPU decodes, 100 MB
BYTES_PER_PIXEL = 16  # while an image is read: PNG and JPEG take 10 to 16, JPEG 2000 19, WebP up to 25
SHARE = 0.25  # of the memory: for what all readers decode at once, and as much for the one very large image
_turn: Any = threading.Lock()  # of the very large images; processes that read share another


class Jpeg(NamedTuple):
    """A JPEG file that a GPU can decode."""

    content: bytes
    pixels: int


@dataclass
class Batch:
    """The inputs of a network with their names, and the unreadable images among the files, with the reasons.

    Where the GPU is to decode, `jpegs` are the files that `pixels` and `faces` lack, by their row in `names`.
    """

    names: list[str]
    pixels: np.ndarray | Tensor  # uint8 (images, 3, size, size)
    faces: list[bool | None]  # as in ModelInput
    unreadable: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0  # the processor's, for reading
    jpegs: dict[int, Jpeg] = field(default_factory=dict)
    digests: dict[str, bytes] = field(default_factory=dict)  # of the bytes that were decoded, by name
    damaged: dict[str, str] = field(default_factory=dict)  # images that were read in part, and why

    @classmethod
    def joined(cls, batches: list[Batch]) -> Batch:
        """Return one batch of several that were read one after another."""
        if len(batches) == 1:
            return batches[0]
        starts = accumulate((len(batch.names) for batch in batches), initial=0)
        return cls(
            names=[name for batch in batches for name in batch.names],
            pixels=np.concatenate([batch.pixels for batch in batches]),
            faces=[face for batch in batches for face in batch.faces],
            unreadable={name: reason for batch in batches for name, reason in batch.unreadable.items()},
            seconds=sum(batch.seconds for batch in batches),
            jpegs={
                start + row: jpeg
                for start, batch in zip(starts, batches, strict=False)
                for row, jpeg in batch.jpegs.items()
            },
            digests={name: digest for batch in batches for name, digest in batch.digests.items()},
            damaged={name: reason for batch in batches for name, reason in batch.damaged.items()},
        )

    def inputs(self) -> list[ModelInput]:
        """Return the input for each image, in the memory of the CPU."""
        pixels = self.pixels if isinstance(self.pixels, np.ndarray) else self.pixels.cpu().numpy()
        return [ModelInput(*each) for each in zip(pixels, self.faces, strict=True)]


@dataclass(frozen=True)
class Reader:
    """Read a group of files as a Batch, each by `transform`. A reader runs in threads and in processes."""

    transform: Transform | FaceCrop
    leave_jpegs: bool = False  # to a GPU, which decodes them

    def read_group(self, files: list[ImageFile]) -> Batch:
        """Read some files as a batch."""
        start = time.thread_time()
        names: list[str] = []
        images: list[ModelInput | Jpeg] = []
        unreadable, digests, damaged = {}, {}, {}
        for file in files:
            try:
                content = read_bytes(file.path)
                image, damage = self.read(content)
                images.append(image)
                names.append(file.name)
                digests[file.name] = digest_of(content)
                if damage:
                    damaged[file.name] = damage
            except UnreadableImageError as error:
                unreadable[file.name] = str(error)
        jpegs = {row: image for row, image in enumerate(images) if isinstance(image, Jpeg)}
        inputs = [image for image in images if isinstance(image, ModelInput)]
        pixels = np.empty((len(inputs), 3, self.transform.size, self.transform.size), np.uint8)
        for row, image in enumerate(inputs):
            pixels[row] = image.pixels
        faces = [image.face for image in inputs]
        in_a_process = multiprocessing.parent_process() is not None
        if in_a_process and "torch" in sys.modules and _should_be_shared(pixels):  # dlib needs no torch
            pixels = sys.modules["torch"].from_numpy(pixels)  # which does not go through the pipe
        seconds = time.thread_time() - start
        return Batch(names, pixels, faces, unreadable, seconds, jpegs, digests, damaged)

    def read(self, content: bytes) -> tuple[ModelInput | Jpeg, str | None]:
        """Return the network's input for a file's bytes, or these bytes if the GPU is to decode them.

        The second value says what is damaged, as decode_image does.

        Very large images are read one at a time, since there is no memory for one in every reader. Raises
        UnreadableImageError as decode_image does.
        """
        if self.leave_jpegs and (jpeg := plain_jpeg(content)):
            return jpeg, None
        try:
            return self._input(content, readers=cores())
        except TooManyPixelsError:
            with _turn:
                return self._input(content, readers=1)

    def _input(self, content: bytes, readers: int) -> tuple[ModelInput, str | None]:
        pixels, damage = decode_image(content, self.transform.enough, pixels_that_fit(readers))
        return self.transform(pixels), damage


@functools.cache
def pixels_that_fit(readers: int) -> int:
    """Return how many pixels an image may have so that so many readers can decode one each at once."""
    share = SHARE * memory() / local_world_size()
    return min(MOST_PIXELS, int(share / readers / BYTES_PER_PIXEL))


def digest_of(content: bytes) -> bytes:
    """Return the SHA-256 of a file's bytes, under which the cache finds an image."""
    return hashlib.sha256(content).digest()


def named_jpeg(file: ImageFile) -> bool:
    """Return whether a file has a JPEG's suffix."""
    return file.name.lower().endswith((".jpg", ".jpeg"))


def plain_jpeg(content: bytes) -> Jpeg | None:
    """Return a JPEG file about which decoders agree but for a few grey levels; None for any other bytes.

    It is whole, upright, grey or YCbCr with 8 bits, and not too large for a GPU's memory.
    """
    if not (content.startswith(b"\xff\xd8") and content.rstrip(b"\0").endswith(b"\xff\xd9")):
        return None
    try:
        pixels = _pixels_if_plain(content)
    except IndexError:
        return None
    return Jpeg(content, pixels) if 0 < pixels <= MOST_GPU_PIXELS else None


def _pixels_if_plain(jpeg: bytes) -> int:
    """Return the number of pixels of a JPEG as its header tells; 0 if decoders may differ about it.

    The header is a chain of segments (ITU-T T.81, B.1.1): a marker of two bytes, a length, its content. This
    takes a quarter of the time in which Pillow would hold Python's lock.
    """
    at = 2
    while jpeg[at] == 0xFF:
        marker, content = jpeg[at + 1], at + 4
        if marker in (0xC0, 0xC1, 0xC2):  # a frame, sequential or progressive
            bits, components = jpeg[content], jpeg[content + 5]
            names = jpeg[content + 6 : content + 6 + 3 * components : 3]
            height, width = (int.from_bytes(jpeg[i : i + 2]) for i in (content + 1, content + 3))
            return height * width if bits == 8 and components in (1, 3) and names != b"RGB" else 0
        if marker == 0xE1 and jpeg[content : content + 4] == b"Exif" and not _is_upright(jpeg):
            return 0
        if marker == 0xEE and jpeg[content + 11] != 1:  # Adobe's segment: 1 is YCbCr
            return 0
        at += 2 + int.from_bytes(jpeg[at + 2 : content])
    return 0


def _is_upright(jpeg: bytes) -> bool:
    try:
        with open_image(io.BytesIO(jpeg)) as image:
            return image.getexif().get(ORIENTATION, 1) == 1
    except Exception:  # anything, on broken bytes: read_image says what is wrong
        return False


@contextmanager
def read_ahead(
    files: list[ImageFile], reader: Reader, batch_size: int, ahead: int, processes: bool
) -> Iterator[Iterator[Batch]]:
    """Start to read the files in batches of `batch_size`; yield an iterator over the batches, in order.

    There is a reader for each core, and `ahead` batches are read before they are needed: by threads, which
    end with the block, or by `processes`. The iterator raises RunError if a process was killed.
    """
    pool = _reader_processes(reader.transform.module) if processes and files else _reader_threads()
    if processes:
        if reader.transform.module != "dlib":  # whose readers have no torch, and send no tensors
            # Before a batch can arrive: the pool's own thread unpickles it, and so imports a module inside
            # torch. If this thread imported torch meanwhile, each would wait for the other.
            import torch  # noqa: F401
        ahead = max(ahead, cores() + 2)  # so that none is idle
        files = [ImageFile(file.name, file.path.absolute()) for file in files]  # they run elsewhere
    groups = in_groups(files, batch_size)
    coming: deque[Future[Batch]] = deque()

    def _submit(count: int) -> None:
        coming.extend(pool.submit(reader.read_group, group) for group in islice(groups, count))

    def _batches() -> Iterator[Batch]:
        try:
            while coming:
                batch = coming.popleft().result()
                batch.pixels = np.asarray(batch.pixels)  # no copy of a tensor in shared memory
                yield batch
                _submit(1)
        except BrokenProcessPool:
            coming.clear()  # the pool ends these futures itself, and raises if they are cancelled too
            _reader_processes.cache_clear()
            raise RunError(
                "a process that reads images has ended, probably killed for want of memory: then free some"
            ) from None

    try:
        _submit(ahead)
    except BrokenProcessPool:  # it ended while nobody read: start another
        _reader_processes.cache_clear()
        pool = _reader_processes(reader.transform.module)
        coming.clear()
        groups = in_groups(files, batch_size)
        _submit(ahead)
    try:
        yield _batches()
    finally:
        for future in coming:
            future.cancel()
        if isinstance(pool, ThreadPoolExecutor):
            pool.shutdown()


def in_groups(files: list[ImageFile], size: int) -> Iterator[list[ImageFile]]:
    """Yield the files in groups of `size`."""
    return (files[start : start + size] for start in range(0, len(files), size))


def read_batches(
    files: list[ImageFile], transform: Transform | FaceCrop, batch_size: int, processes: bool = False
) -> Iterator[Batch]:
    """Yield the files in batches, read at least two batches ahead, as read_ahead does."""
    with read_ahead(files, Reader(transform), batch_size, 2, processes) as batches:
        yield from batches


# ---- the readers ----------------------------------------------------------------------------------


def _reader_threads() -> ThreadPoolExecutor:
    require("torch", "torch")  # a sentence, where the thread would print a traceback
    return ThreadPoolExecutor(cores(), initializer=use_one_thread)


def _should_be_shared(pixels: np.ndarray) -> bool:
    """Return whether an array is large and shared memory has room: a container may have 64 MB, or none."""
    if pixels.nbytes <= PIPE_BYTES:
        return False
    if sys.platform != "linux":  # other systems set no limit
        return True
    return SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > BATCHES * pixels.nbytes


def use_one_thread() -> None:
    """Let torch use one core in this thread, since others like it run in parallel."""
    import torch  # here, or its seconds count as the first image's

    torch.set_num_threads(1)


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
    start = functools.partial(_start_reader, context.Lock())
    pool = ProcessPoolExecutor(min(cores(), 61), mp_context=context, initializer=start)
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


def _start_reader(turn: Any) -> None:
    global _turn
    _turn = turn
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
