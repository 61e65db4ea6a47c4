"""The pixels of an image in; the input of a network out: resized and cropped to a square."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

GREY = 128  # around an image by "border"
VERSION = 1  # part of the cache key: raise it when a Transform moves pixels by more than rounding


class ModelInput(NamedTuple):
    """The input of a network for one image."""

    pixels: np.ndarray  # uint8 RGB (3, size, size)
    face: bool | None = None  # whether a face was detected; None: the transform detects none


@dataclass(frozen=True)
class Transform:
    """Resize an image and crop its centre to `size` × `size` pixels, as the network was trained.

    `crop_mode` uses timm's terms: "squash" resizes the image to a square of `resize` pixels, whatever its
    shape; "center" resizes its shorter side to `resize` pixels, and "border" its longer side, which leaves
    grey beside the image.
    """

    size: int
    interpolation: Literal["bilinear", "bicubic"]  # antialiased
    crop_mode: Literal["squash", "center", "border"] = "squash"
    resize: int = 0  # pixels; 0: as `size`, so that "squash" keeps the whole image
    detects_faces: ClassVar[bool] = False
    module: ClassVar[str] = "torch"  # what reader processes import when they start
    versions: ClassVar[dict[str, int]] = {"transform": VERSION}  # for the cache key

    def __call__(self, image: np.ndarray) -> ModelInput:
        """Return the network's input for an image, uint8 RGB (height, width, 3)."""
        import torch  # for its resize, which takes a third of Pillow's time; torchvision's takes seconds more

        pixels = torch.from_numpy(image.reshape(1, *image.shape)).permute(0, 3, 1, 2)
        return ModelInput(self._square(pixels)[0].contiguous().numpy())

    def on_gpu(self, photos: list[Tensor]) -> tuple[Tensor, list[bool | None]]:
        """Do as for an image for photographs (3, height, width) on a GPU, uint8, which round once more.

        Return uint8 (photographs, 3, size, size) on the GPU, and `face` of ModelInput for each.
        """
        import torch

        inputs: list[Tensor | None] = [None] * len(photos)
        by_shape = defaultdict(list)
        for row, photo in enumerate(photos):
            by_shape[photo.shape].append(row)
        for rows in by_shape.values():
            floats = torch.stack([photos[row] for row in rows]).float()  # a GPU resizes no integers
            squares = self._square(floats).round_().clamp_(0, 255).to(torch.uint8)
            for row, square in zip(rows, squares, strict=True):
                inputs[row] = square
        return torch.stack(inputs), [None] * len(photos)

    def _square(self, pixels: Tensor) -> Tensor:
        """Resize and crop images of one shape, (images, 3, height, width) → (images, 3, size, size)."""
        from torch.nn.functional import interpolate, pad

        side = self.resize or self.size
        sides = [side, side]
        if self.crop_mode == "center":
            pixels = _not_too_long(pixels)
            sides = [side * length // min(pixels.shape[2:]) for length in pixels.shape[2:]]
        elif self.crop_mode == "border":
            sides = [max(1, round(side * length / max(pixels.shape[2:]))) for length in pixels.shape[2:]]
        pixels = interpolate(pixels, sides, mode=self.interpolation, antialias=True)
        lacks = [max(0, self.size - side) for side in sides]
        if any(lacks):
            around = GREY if self.crop_mode == "border" else 0
            margins = [n for lack in lacks[::-1] for n in (lack // 2, lack - lack // 2)]
            pixels = pad(pixels, margins, value=around)
        top, left = (round((side - self.size) / 2) for side in pixels.shape[2:])
        return pixels[:, :, top:, left:][:, :, : self.size, : self.size]

    @property
    def enough(self) -> int:
        """Return the shorter side, in pixels, at which a larger JPEG may be decoded: four times the input's.

        A JPEG of 10 megapixels is then read in 0.6 to 0.9 of the time, and the mean difference is below one
        grey level (cosines of 0.9995 and more; at twice the input's side, 0.998 and more).
        """
        return 4 * (self.resize or self.size)

    def of_size(self, size: int) -> Transform:
        """Return the same transform for another input size."""
        resize = round(self.resize * size / self.size)
        return Transform(size, self.interpolation, self.crop_mode, resize)


def _not_too_long(pixels: Tensor, most: int = 16) -> Tensor:
    """Cut an image over 16 times as long as wide to its middle: resizing all of it would fill the memory."""
    longest = most * min(pixels.shape[2:])
    top, left = (max(0, (length - longest) // 2) for length in pixels.shape[2:])
    return pixels[:, :, top : top + longest, left : left + longest]
