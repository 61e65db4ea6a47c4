"""The pixels of an image in; the square that a network sees of it out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Square(NamedTuple):
    """What a network sees of an image."""

    pixels: Tensor  # uint8 RGB (3, size, size)
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

    def __call__(self, image: Tensor) -> Square:
        """uint8 RGB (3, height, width) → uint8 RGB (3, size, size)."""
        from torchvision.transforms.v2 import InterpolationMode
        from torchvision.transforms.v2.functional import center_crop, resize

        side = self.resize or self.size
        sides = [side, side] if self.crop_mode == "squash" else [side]
        if self.crop_mode == "center":
            image = _not_too_long(image)
        image = resize(image, sides, interpolation=InterpolationMode(self.interpolation), antialias=True)
        return Square(center_crop(image, [self.size, self.size]))

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


def _not_too_long(image: Tensor, most: int = 16) -> Tensor:
    """The middle of an image that is over 16 times as long as wide: as a whole it would fill the memory."""
    longest = most * min(image.shape[1:])
    for side in (1, 2):
        if image.shape[side] > longest:
            image = image.narrow(side, (image.shape[side] - longest) // 2, longest)
    return image
