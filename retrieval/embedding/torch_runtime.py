"""A loaded backbone in; a function that embeds batches of images with torch out.

A GPU computes in half precision if that gives the same vectors. A batch that does not fit is halved.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from retrieval.backbones.backbone import Backbone
from retrieval.errors import RunError
from retrieval.machine import cores, out_of_memory

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1  # part of the cache key: raise it when this moves vectors by more than rounding
LEAST_COSINE_HALF = 0.999  # between a vector in half precision and the vector in full precision

log = logging.getLogger("retrieval.runtime")


def torch_runner(backbone: Backbone, batch: int, half: bool) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function from uint8 (images, 3, size, size) to float32 (images, dimension).

    Each batch is filled up to `batch` images: with torch the size of a batch shifts vectors by about 5e-6.
    """
    import torch

    if backbone.device == "cpu":
        torch.set_num_threads(cores())  # torchrun sets 1, and so do the readers, for all threads to come
    fits = batch

    def _run(pixels: np.ndarray) -> np.ndarray:
        nonlocal fits
        images = torch.from_numpy(filled_up(pixels, batch))
        if backbone.device == "cuda":
            images = images.pin_memory()  # twice as fast to copy
        with torch.inference_mode(), torch.autocast(backbone.device, dtype=half_type(), enabled=half):
            features, fits = embed_what_fits(backbone, images, fits)
        return features[: len(pixels)].numpy()

    return _run


def filled_up(images: np.ndarray, batch: int) -> np.ndarray:
    """Append black images to uint8 (images, 3, size, size) until there are `batch`."""
    if len(images) >= batch:
        return images
    filled = np.zeros((batch, *images.shape[1:]), images.dtype)
    filled[: len(images)] = images
    return filled


def embed_what_fits(backbone: Backbone, images: Tensor, fits: int) -> tuple[Tensor, int]:
    """Embed (images, 3, size, size), `fits` at once; return (images, dimension) on the CPU, and `fits`.

    If they do not fit into the device's memory, `fits` is halved. Raises RunError if a single one does not.
    """
    import torch

    while True:
        try:
            return torch.cat([backbone.embed(part) for part in images.split(fits)]).cpu(), fits
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            if fits == 1:
                raise RunError(
                    f"not one image fits into the memory of {backbone.device}: use --device cpu"
                ) from None
        fits = max(1, min(fits, len(images)) // 2)
        log.warning("the batch does not fit into the memory of %s: trying %d at once", backbone.device, fits)
        torch.accelerator.empty_cache()


def embed_plainly(backbone: Backbone, pixels: np.ndarray) -> np.ndarray:
    """Embed a few images as the network does: the vectors that other ways to run it are compared with."""
    import torch

    with torch.inference_mode():
        return embed_what_fits(backbone, torch.from_numpy(pixels), len(pixels))[0].numpy()


def least_cosine(vectors: np.ndarray, others: np.ndarray) -> float:
    """Return the least cosine between rows of the same number; NaN if just one of the two is zero."""
    vectors, others = vectors.astype(np.float64), others.astype(np.float64)
    lengths = np.linalg.norm(vectors, axis=1) * np.linalg.norm(others, axis=1)
    nonzero = (vectors**2).sum(1) + (others**2).sum(1) > 0
    with np.errstate(invalid="ignore", divide="ignore"):
        cosines = (vectors * others).sum(1) / lengths
    return float(cosines[nonzero].min()) if nonzero.any() else 1.0


# ---- half precision -------------------------------------------------------------------------------


def half_type() -> Any:
    """Return torch.bfloat16 if the GPU supports it, else torch.float16."""
    import torch

    bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if bf16 else torch.float16


def half_is_enough(backbone: Backbone, pixels: np.ndarray) -> bool:
    """Return whether half precision gives vectors with the same directions."""
    import torch

    plain = embed_plainly(backbone, pixels)
    with torch.autocast(backbone.device, dtype=half_type()):
        cosine = least_cosine(embed_plainly(backbone, pixels), plain)
    enough = cosine >= LEAST_COSINE_HALF  # False for NaN
    if not enough:
        log.info("%s needs full precision: in half, cosines fall to %.4f", backbone.model_name, cosine)
    return enough
