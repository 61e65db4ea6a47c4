"""The pixels of an image in; the square that a network sees of it out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np


class Square(NamedTuple):
    """What a network sees of an image."""

    pixels: np.ndarray  # uint8 RGB (3, size, size)
    face: bool | None = None  # whether it shows a face that was found; None: none was looked for


@dataclass(frozen=True)
class Transform:
    """An image as a square of `size` pixels, by what weights were trained with: resize, then cut the centre.

    `crop_mode`, in timm's words: "squash" resizes the image to a square of `resize` pixels, whatever its
    shape; "center" resizes its shorter side to `resize` pixels.
    """

    size: int
    interpolation: str  # bilinear or bicubic, antialiased
    crop_mode: str = "squash"
    resize: int = 0  # pixels; 0: as `size`, so that "squash" keeps the whole image
    looks_for_faces: ClassVar[bool] = False
    module: ClassVar[str] = "torch"  # that does the work

    def __call__(self, image: np.ndarray) -> Square:
        """uint8 RGB (height, width, 3) → uint8 RGB (3, size, size)."""
        import torch  # for its resize, which takes a third of Pillow's time; torchvision's takes seconds more
        from torch.nn.functional import interpolate, pad

        side = self.resize or self.size
        sides = [side, side]
        if self.crop_mode == "center":
            image = _not_too_long(image)
            sides = [side * length // min(image.shape[:2]) for length in image.shape[:2]]
        pixels = torch.from_numpy(image.reshape(1, *image.shape)).permute(0, 3, 1, 2)
        pixels = interpolate(pixels, sides, mode=self.interpolation, antialias=True)
        lacks = [max(0, self.size - side) for side in sides]
        if any(lacks):
            pixels = pad(pixels, [n for lack in lacks[::-1] for n in (lack // 2, lack - lack // 2)])
        top, left = (round((side - self.size) / 2) for side in pixels.shape[2:])
        return Square(pixels[0, :, top:, left:][:, : self.size, : self.size].contiguous().numpy())

    @property
    def enough(self) -> int:
        """The shorter side of an image, in pixels, from which on more pixels change nothing that counts.

        Four times what is seen: a JPEG of 10 megapixels is then read in 0.6 to 0.9 of the time, less than one
        grey level away in the mean (cosines of 0.9995 and more; at twice what is seen, 0.998 and more).
        """
        return 4 * (self.resize or self.size)

    def of_size(self, size: int) -> Transform:
        """The same transform for another size of square."""
        resize = round(self.resize * size / self.size)
        return Transform(size, self.interpolation, self.crop_mode, resize)


def _not_too_long(image: np.ndarray, most: int = 16) -> np.ndarray:
    """The middle of an image that is over 16 times as long as wide: as a whole it would fill the memory."""
    longest = most * min(image.shape[:2])
    top, left = (max(0, (length - longest) // 2) for length in image.shape[:2])
    return np.ascontiguousarray(image[top : top + longest, left : left + longest])
