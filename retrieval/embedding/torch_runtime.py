"""A loaded backbone in; a function that embeds batches of images with torch out.

A GPU computes in half precision if that gives the same vectors. A batch that does not fit is halved.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from threading import Thread
from typing import TYPE_CHECKING, Any

import numpy as np

from retrieval.backbones.backbone import Backbone
from retrieval.machine import compute_what_fits, cores

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1  # part of the cache key: raise it when this moves vectors by more than rounding
LEAST_COSINE_HALF = 0.999  # between a vector in half precision and the vector in full precision

log = logging.getLogger("retrieval.runtime")


def torch_runner(backbone: Backbone, batch: int) -> Callable[[np.ndarray | Tensor], Callable[[], np.ndarray]]:
    """Return a function that starts to embed uint8 (images, 3, size, size).

    What it returns waits for the vectors, float32 (images, dimension): meanwhile a GPU computes, and the CPU
    can prepare the next batch. Each batch is filled up to `batch` images, with black ones, since with torch
    the size of a batch shifts vectors by about 5e-6.
    """
    import torch

    cuda, fits = backbone.device == "cuda", batch
    if backbone.device == "cpu":
        torch.set_num_threads(cores())  # torchrun sets 1, and so do the readers, for all threads to come

    def _start(pixels: np.ndarray | Tensor) -> Callable[[], np.ndarray]:
        nonlocal fits
        images = torch.as_tensor(pixels)
        if cuda and not images.is_cuda:
            images = images.pin_memory()  # so that the copy does not wait for the batch before
        images = images.to(backbone.device, non_blocking=cuda)
        missing = max(0, batch - len(images))
        filled = torch.nn.functional.pad(images, (0, 0, 0, 0, 0, 0, 0, missing))
        with torch.inference_mode():
            features, fits = embed_what_fits(backbone, filled, fits)
        features = features[: len(images)].to("cpu", non_blocking=cuda)
        done = torch.cuda.current_stream().record_event() if cuda else None

        def _wait() -> np.ndarray:
            if done:
                done.synchronize()
            return features.numpy()

        return _wait

    return _start


def embed_what_fits(backbone: Backbone, images: Tensor, fits: int) -> tuple[Tensor, int]:
    """Embed (images, 3, size, size), `fits` at once; return (images, dimension) on the device, and `fits`.

    If they do not fit into the device's memory, `fits` is halved. Raises RunError if a single one does not.
    """
    import torch

    def _embed(at_once: int) -> Tensor:
        return torch.cat([backbone.embed(part) for part in images.split(at_once)])

    return compute_what_fits(_embed, min(fits, len(images)), backbone.device, "use --device cpu")


def embed_plainly(backbone: Backbone, pixels: np.ndarray | Tensor) -> np.ndarray:
    """Embed a few images as the network does: the vectors that other ways to run it are compared with."""
    import torch

    with torch.inference_mode():
        return embed_what_fits(backbone, torch.as_tensor(pixels), len(pixels))[0].cpu().numpy()


def least_cosine(vectors: np.ndarray, others: np.ndarray) -> float:
    """Return the least cosine between rows of the same number; NaN if just one of the two is zero."""
    return float(cosines(vectors, others).min(initial=1.0))


def cosines(vectors: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the cosines between rows of the same number, but for those that are both zero."""
    vectors, others = vectors.astype(np.float64), others.astype(np.float64)
    lengths = np.linalg.norm(vectors, axis=1) * np.linalg.norm(others, axis=1)
    nonzero = (vectors**2).sum(1) + (others**2).sum(1) > 0
    with np.errstate(invalid="ignore", divide="ignore"):
        return ((vectors * others).sum(1) / lengths)[nonzero]


# ---- half precision -------------------------------------------------------------------------------

FULL, AUTOCAST, CAST = range(3)  # precisions, the fastest last: CAST has weights in half precision


def half_type() -> Any:
    """Return torch.bfloat16 if the GPU supports it, else torch.float16."""
    import torch

    bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if bf16 else torch.float16


def wake_gpu() -> Thread:
    """Start to load CUDA's libraries, by a first convolution and product, while modules are imported."""
    import torch

    device = torch.device("cuda", torch.cuda.current_device())  # each thread has a current one of its own

    def _compute() -> None:
        with suppress(RuntimeError):  # which the network will meet, too
            for dtype in (torch.float32, half_type()):
                images = torch.zeros(1, 8, 32, 32, device=device, dtype=dtype)
                torch.nn.functional.conv2d(images, images[:, :, :3, :3])
                images @ images

    thread = Thread(target=_compute, daemon=True)
    thread.start()
    return thread


def with_precision(backbone: Backbone, precision: int) -> Backbone:
    """Return the backbone in this precision; it takes the same images."""
    import torch

    half = half_type()
    if precision == CAST:
        weights = copy.deepcopy(backbone.network).to(half)
        return replace(backbone, network=lambda pixels: weights(pixels.to(half)))

    def _autocast(pixels: Tensor) -> Tensor:
        with torch.autocast(backbone.device, dtype=half):
            return backbone.network(pixels)

    return replace(backbone, network=_autocast) if precision == AUTOCAST else backbone


def fastest_precision(backbone: Backbone, pixels: np.ndarray) -> int:
    """Return the fastest precision that gives vectors of the same directions for a few images."""
    plain = embed_plainly(backbone, pixels)
    for precision in (CAST, AUTOCAST):
        try:
            cosine = least_cosine(embed_plainly(with_precision(backbone, precision), pixels), plain)
        except Exception:  # as of a network that computes with numbers of its own, or cannot be copied
            cosine = float("nan")
        if cosine >= LEAST_COSINE_HALF:
            return precision
    log.info("%s needs full precision: in half, cosines fall to %.4f", backbone.model_name, cosine)
    return FULL
