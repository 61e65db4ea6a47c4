"""A face's box in; the square around it, with the hair, the neck and some of the background, out.

Networks that were trained on whole photographs, such as CLIP, know people better with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1  # part of the cache key: raise it when a crop moves by more than rounding


def loose_region(box: np.ndarray, shape: tuple[int, int], margin: float) -> tuple[int, int, int, int]:
    """Return left, top, right, bottom, in whole pixels, of the square around a box in (height, width).

    Its side is the box's longer side / (1 - margin). Where it sticks out of the photograph, it is moved
    inside; where the photograph is smaller, it is cut, and is no square then.

    >>> loose_region(np.array([40, 40, 60, 80]), (200, 200), 0.5)
    (10, 20, 90, 100)
    >>> loose_region(np.array([0, 40, 20, 80]), (70, 200), 0.5)
    (0, 0, 80, 70)
    """
    lengths = np.array(shape[::-1])
    side = max(1, round(float((box[2:] - box[:2]).max() / (1 - margin))))
    sides = np.minimum(side, lengths)
    first = np.round((box[:2] + box[2:]) / 2 - side / 2).astype(int).clip(0, lengths - sides)
    left, top, right, bottom = np.concatenate([first, first + sides]).tolist()
    return left, top, right, bottom


def cut_loosely(
    photo: np.ndarray, box: np.ndarray, size: int, margin: float, interpolation: str
) -> np.ndarray:
    """Resize the region around a box of a photograph (height, width, 3), uint8, to (size, size, 3)."""
    left, top, right, bottom = loose_region(box, photo.shape[:2], margin)
    region = Image.fromarray(photo[top:bottom, left:right])
    return np.asarray(region.resize((size, size), Image.Resampling[interpolation.upper()]))


def cut_loosely_on_gpu(
    photos: list[Tensor], boxes: np.ndarray, size: int, margin: float, interpolation: str
) -> Tensor:
    """Do as `cut_loosely` for photographs (3, height, width) on one device, by a box (4,) for each.

    Return uint8 (photos, 3, size, size).
    """
    import torch
    from torch.nn.functional import interpolate

    crops = []
    for photo, box in zip(photos, boxes, strict=True):
        left, top, right, bottom = loose_region(box, photo.shape[1:], margin)
        pixels = photo[None, :, top:bottom, left:right].float()
        for sides in ((bottom - top, size), (size, size)):  # rows, then columns, both rounded, as Pillow does
            pixels = interpolate(pixels, sides, mode=interpolation, antialias=True).round_().clamp_(0, 255)
        crops.append(pixels)
    return torch.cat(crops).byte()
