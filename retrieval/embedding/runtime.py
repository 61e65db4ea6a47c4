"""A backbone and a number of images in; the faster runtime for them out: torch or ONNX Runtime.

On a CPU that is ONNX Runtime from BREAK_EVEN images on, or if the network has been exported before.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from retrieval import distributed
from retrieval.backbones.backbone import LazyBackbone, cache_key
from retrieval.embedding import onnx_runtime, torch_runtime
from retrieval.embedding.onnx_runtime import (
    EXPORTED,
    ONNX_BATCH,
    NetworkFiles,
    is_refused,
    load_onnx,
    run_onnx,
)
from retrieval.embedding.torch_runtime import half_is_enough, half_type, torch_runner
from retrieval.errors import InputError
from retrieval.machine import cores, require

TORCH, ONNX = "torch", "onnx"
BREAK_EVEN = 200  # images: from there on the export saves more time than it takes, also for small networks
ONNX_PACKAGES = ("onnxruntime", "onnx")


@dataclass
class Runtime:
    """A backbone and how its network is run. `settle` loads the network."""

    backbone: LazyBackbone
    name: str  # TORCH or ONNX; `settle` changes it to TORCH if ONNX Runtime gives other vectors
    torch_batch: int  # images of a batch with torch
    files: NetworkFiles
    half: str = ""  # of a GPU: its type of half precision, which it uses if that gives the same vectors
    run: Callable[[np.ndarray], np.ndarray] | None = field(default=None, init=False)  # set by `settle`
    seconds: dict[str, float] = field(default_factory=lambda: {"load": 0.0, "decode": 0.0, "network": 0.0})
    lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    @property
    def key(self) -> bytes:
        """Return the cache key of the vectors."""
        version = onnx_runtime.VERSION if self.name == ONNX else torch_runtime.VERSION
        return self.backbone.key + f"{self.name} {version} {self.half}".encode()

    @cached_property
    def crops_key(self) -> bytes:
        """Return the cache key of the crops, if the transform detects faces."""
        return cache_key(self.backbone.transform)

    @property
    def description(self) -> str:
        """Return the model name and the runtime, for the log and the cache."""
        return f"{self.backbone.model_name} by {'ONNX Runtime' if self.name == ONNX else 'torch'}"

    @property
    def batch_size(self) -> int:
        """Return how many images a batch has."""
        return ONNX_BATCH if self.name == ONNX else self.torch_batch

    @property
    def threads(self) -> int:
        """Return how many batches may run at once."""
        return cores() if self.name == ONNX else 1

    def settle(self) -> None:
        """Load the network, and check the runtime's vectors of four fixed images against those of torch.

        If one of several processes cannot use ONNX Runtime, all use torch. Raises as the backbone's `load`,
        and RunError if a single image does not fit into a GPU's memory, or another process has ended.
        """
        if self.run:
            return
        start = time.perf_counter()
        pixels = check_images(self.backbone.transform.size)
        session = load_onnx(self.backbone, self.files, pixels) if self.name == ONNX else None
        if distributed.all_agree(session is not None):  # a collective, so that every process must call it
            self.run = partial(run_onnx, session)
        else:
            self.name = TORCH
            backbone = self.backbone.load()
            half = distributed.all_agree(bool(self.half) and half_is_enough(backbone, pixels))
            self.run = torch_runner(backbone, self.torch_batch, half)
        self.seconds["load"] += time.perf_counter() - start

    def embed(self, pixels: np.ndarray) -> np.ndarray:
        """Map uint8 RGB (images, 3, size, size) to float32 (images, dimension), not yet of unit length.

        Needs `settle` first. An image gets the same vector, to the last bit, in every batch. Raises RunError
        if a single image does not fit into a GPU's memory.
        """
        clock = time.thread_time if self.name == ONNX else time.perf_counter
        start = clock()
        features = self.run(pixels)
        spent = clock() - start
        with self.lock:
            self.seconds["network"] += spent
        return features


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
    backbone: LazyBackbone, engine: str, images: int, batch_size: int, folder: Path | None
) -> Runtime:
    """Choose the runtime for a backbone and the number of all images; `engine` is auto, torch or onnx.

    `folder` is the cache's; without it an exported network is not kept. Raises InputError if ONNX Runtime is
    asked for and cannot be used.
    """
    files = NetworkFiles(folder, backbone.key)
    if engine == ONNX:
        for package in ONNX_PACKAGES:
            require(package, package)
        if backbone.device != "cpu":
            raise InputError("--engine onnx runs on the CPU: give --device cpu with it, or --engine torch")
    elif engine == "auto":
        engine = ONNX if _is_worth_it(backbone, images, files) else TORCH
    if engine == ONNX and is_refused(backbone, files):
        engine = TORCH
    half = str(half_type()) if backbone.device == "cuda" else ""
    return Runtime(backbone, engine, min(batch_size, images), files, half)


def _is_worth_it(backbone: LazyBackbone, images: int, files: NetworkFiles) -> bool:
    if backbone.device != "cpu" or not all(map(find_spec, ONNX_PACKAGES)):
        return False
    return images >= BREAK_EVEN or files.exists(EXPORTED)
