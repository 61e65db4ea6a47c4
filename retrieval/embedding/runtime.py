"""A backbone and a number of images in; the faster runtime for them out: torch or ONNX Runtime.

On a CPU that is ONNX Runtime from BREAK_EVEN images on, or if the network has been exported before.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from get_images import ImageFile
from retrieval import distributed
from retrieval.backbones.backbone import Backbone, LazyBackbone, cache_key
from retrieval.embedding import gpu_decoder, onnx_runtime, torch_runtime
from retrieval.embedding.gpu_decoder import can_decode, decode_on_gpu, keeps_vectors
from retrieval.embedding.loader import FEW, Batch, use_one_thread
from retrieval.embedding.onnx_runtime import (
    EXPORTED,
    ONNX_BATCH,
    NetworkFiles,
    is_refused,
    load_onnx,
)
from retrieval.embedding.torch_runtime import (
    FULL,
    fastest_precision,
    half_type,
    torch_runner,
    wake_gpu,
    with_precision,
)
from retrieval.errors import InputError
from retrieval.machine import cores, require

TORCH, ONNX = "torch", "onnx"
BREAK_EVEN = 200  # images: from there on the export saves more time than it takes, also for small networks
DECODER = f"{gpu_decoder.VERSION}.decoder"  # kind of file that says what decodes JPEGs: GPU or CPU
QUEUED = 16  # batches that wait for ONNX Runtime's threads while the cache is written
ONNX_PACKAGES = ("onnxruntime", "onnx")

log = logging.getLogger("retrieval.runtime")


@dataclass
class Runtime:
    """A backbone and how its network is run. `settle` loads the network."""

    backbone: LazyBackbone
    name: str  # TORCH or ONNX; `settle` changes it to TORCH if ONNX Runtime gives other vectors
    torch_batch: int | None  # images of a batch with torch; None: what suits the device
    images: int  # in all: a batch is not larger
    files: NetworkFiles
    half: str = ""  # of a GPU: its type of half precision, which it uses if that gives the same vectors
    gpu_decodes: bool | None = False  # JPEGs; None: `settle` finds out whether that gives the same vectors
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # of each part of a run
    readers_seconds: float = 0.0  # of all cores together, for reading
    _start: Callable[[Any], Callable[[], np.ndarray]] | None = field(default=None, init=False)

    @property
    def key(self) -> bytes:
        """Return the cache key of the vectors."""
        version = onnx_runtime.VERSION if self.name == ONNX else torch_runtime.VERSION
        return self.backbone.key + f"{self.name} {version} {self.half}{self._decoder}".encode()

    @property
    def crops_key(self) -> bytes:
        """Return the cache key of the crops, if the transform detects faces."""
        return cache_key(self.backbone.transform, (), *filter(None, [self._decoder]))

    @property
    def _decoder(self) -> str:
        return f" JPEGs by the GPU {gpu_decoder.VERSION}" if self.gpu_decodes else ""

    @property
    def description(self) -> str:
        """Return the model name and the runtime, for the log and the cache."""
        return f"{self.backbone.model_name} by {'ONNX Runtime' if self.name == ONNX else 'torch'}"

    @property
    def batch_size(self) -> int:
        """Return how many images a batch has."""
        if self.runs_several:
            return ONNX_BATCH
        return min(self.torch_batch or _default_batch(self.backbone.device, self.gpu_decodes), self.images)

    @property
    def runs_several(self) -> bool:
        """Return whether several batches run at once, each by one core."""
        return self.name == ONNX and self.backbone.device == "cpu"

    @property
    def threads(self) -> int:
        """Return how many batches may run at once."""
        return cores() if self.runs_several else 1

    @property
    def reads_by_processes(self) -> bool:
        """Return whether processes read images and find faces on the CPU, and not threads: see the loader."""
        many_for_a_gpu = self.backbone.device != "cpu" and self.images > FEW
        return many_for_a_gpu or self.backbone.transform.detects_faces

    @property
    def queued(self) -> int:
        """Return how many batches may wait for the network, or run, while the cache is written."""
        return max(QUEUED, 2 * self.threads) if self.runs_several else 1

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the seconds of the block to those of a part of the run."""
        start = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - start

    def settle(self, files: Sequence[ImageFile] = ()) -> None:
        """Load the network, and check the runtime's vectors of four fixed images against those of torch.

        Where the GPU decodes JPEGs, it is checked on the first of `files`. What one of several processes
        cannot use, ONNX Runtime or the GPU's decoder, none uses. Raises as the backbone's `load`, and
        RunError if a single image does not fit into a GPU's memory, or another process has ended.
        """
        if self._start:
            return
        with self.timed("load"):
            waking = wake_gpu() if self.half else None
            pixels = check_images(self.backbone.transform.size)
            run = load_onnx(self.backbone, self.files, pixels) if self.runs_several else None
            if distributed.all_agree(run is not None):  # a collective, so that every process must call it
                with_torch = use_one_thread if self.backbone.onnx else None
                pool = ThreadPoolExecutor(self.threads, initializer=with_torch)
                self._start = lambda pixels: pool.submit(run, pixels).result
                return
            log.info("loading %s: some seconds", self.backbone.model_name)
            backbone = self.backbone.load()
            self.name = ONNX if backbone.onnx else TORCH
            self._choose_decoder(files, backbone)
            precision = fastest_precision(backbone, pixels) if self.half else FULL
            backbone = with_precision(backbone, min(distributed.all_gather(precision)))
            self._start = torch_runner(backbone, self.batch_size)
            if waking:
                waking.join()

    def _choose_decoder(self, files: Sequence[ImageFile], backbone: Backbone) -> None:
        """Find out whether the GPU decodes, unless an earlier run has; keep the answer for the next runs."""
        undecided = self.gpu_decodes is None
        kept = keeps_vectors(files, backbone) if undecided else self.gpu_decodes
        self.gpu_decodes = distributed.all_agree(bool(kept))
        if undecided and kept is not None:
            self.files.write(DECODER, b"GPU" if self.gpu_decodes else b"CPU")

    def start(self, batch: Batch) -> Callable[[], np.ndarray]:
        """Start to embed a batch; what is returned waits for its vectors. Needs `settle` first."""
        if self.gpu_decodes:
            with self.timed("decode"):
                decode_on_gpu(batch, self.backbone.transform, self.backbone.device)
        if not batch.names:
            return lambda: np.empty((0, 0), np.float32)
        with self.timed("network"):
            return self._start(batch.pixels)

    def embed(self, pixels: Any) -> np.ndarray:
        """Map uint8 RGB (images, 3, size, size) to float32 (images, dimension), not yet of unit length.

        Needs `settle` first. An image gets the same vector, to the last bit, in every batch, unless batches
        had to be halved. Raises RunError if a single image does not fit into a GPU's memory.
        """
        return self._start(pixels)()


def check_images(size: int) -> np.ndarray:
    """Return four images, uint8 (4, 3, size, size): noise with the spectrum of photographs, 1 / frequency.

    With these, half precision moves vectors about as far as with photographs: EfficientNet-Lite in bfloat16
    has cosines of 0.9997 here, and of 0.9990 to 0.9998 on photographs.
    """
    frequencies = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size))
    frequencies[0, 0] = 1
    noise = np.random.default_rng(0).normal(size=(4, 3, size, size))
    images = np.fft.irfft2(np.fft.rfft2(noise) / frequencies, s=(size, size))
    return (128 + 60 * images / images.std()).clip(0, 255).astype(np.uint8)


def choose_runtime(
    backbone: LazyBackbone, engine: str, images: int, batch_size: int | None, folder: Path | None
) -> Runtime:
    """Choose the runtime for a backbone and the number of all images; `engine` is auto, torch or onnx.

    `batch_size` is torch's; None: what suits the device. `folder` is the cache's; without it an exported
    network is not kept. Raises InputError if ONNX Runtime is asked for and cannot be used.
    """
    files = NetworkFiles(folder, backbone.key)
    if backbone.onnx:
        if engine == TORCH:
            raise InputError(
                f"{backbone.model_name} is an ONNX file, which torch cannot run: leave out --engine"
            )
        engine = ONNX
    elif engine == ONNX:
        for package in ONNX_PACKAGES:
            require(package, package)
        if backbone.device != "cpu":
            raise InputError("--engine onnx runs on the CPU: give --device cpu with it, or --engine torch")
    elif engine == "auto":
        engine = ONNX if _is_worth_it(backbone, images, files) else TORCH
    if engine == ONNX and is_refused(backbone, files):
        engine = TORCH
    half = f"{half_type()} weights" if backbone.device == "cuda" and not backbone.onnx else ""
    decodes = None if backbone.device == "cuda" and can_decode(backbone.transform) else False
    if decodes is None and (decoder := files.read(DECODER)):
        decodes = decoder == b"GPU"
    return Runtime(backbone, engine, batch_size, images, files, half, decodes)


def _default_batch(device: str, gpu_decodes: bool) -> int:
    """Return how many images a batch has with torch.

    A GPU that computes faster than Python starts its kernels needs large batches: ResNet-50 on an H100 embeds
    7600 images a second in batches of 32, 12 000 in 128, and 12 900 in 512. Where the CPU decodes,
    reading is the limit, and smaller batches take less memory.
    """
    if device == "cpu":
        return 32
    return 512 if gpu_decodes else 128


def _is_worth_it(backbone: LazyBackbone, images: int, files: NetworkFiles) -> bool:
    if backbone.device != "cpu" or not all(map(find_spec, ONNX_PACKAGES)):
        return False
    return images >= BREAK_EVEN or files.exists(EXPORTED)
