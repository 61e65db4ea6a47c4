"""A batch of images in; randomly cropped, flipped and coloured views of them, as inputs of a network, out.

The views of a batch are made at once and on its device, each with its own random numbers. On a CPU that is
five times as fast as one image after the other, and on a GPU no loader has to keep up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

GREY = (0.2989, 0.587, 0.114)  # weights of R, G, B in the brightness: ITU-R BT.601, as in torchvision


@dataclass(frozen=True)
class Augmentation:
    """How much a view may differ from its image; the names and their meaning are torchvision's."""

    scale: tuple[float, float]  # RandomResizedCrop: the share of the area
    ratio: tuple[float, float]  # … width / height
    jitter: float  # the share of the views whose colours are changed: RandomApply(ColorJitter)
    brightness: float
    contrast: float
    saturation: float
    hue: float  # 0.5 is half a turn
    grey: float  # RandomGrayscale: the share of the views


# hueRotate's coefficients: Filter Effects Module Level 1, feColorMatrix.
LIGHTNESS = (0.213, 0.715, 0.072)
SINE = ((-0.213, -0.715, 0.928), (0.143, 0.140, -0.283), (-0.787, 0.715, 0.072))


AUGMENTATIONS = {
    "gentle": Augmentation((0.8, 1.0), (0.95, 1.05), 1.0, 0.2, 0.2, 0.1, 0.0, 0.05),
    "plain": Augmentation((0.5, 1.0), (3 / 4, 4 / 3), 1.0, 0.2, 0.2, 0.0, 0.0, 0.0),
    # Khosla et al. 2020, from their code
    "strong": Augmentation((0.2, 1.0), (3 / 4, 4 / 3), 0.8, 0.4, 0.4, 0.4, 0.1, 0.2),
}


@dataclass(frozen=True)
class Draw:
    """The random numbers of a batch of views, one row a view."""

    boxes: Tensor  # (views, 4) left, top, width, height, as shares of the side
    flipped: Tensor  # (views,) bool
    brightness: Tensor  # (views,) like contrast and saturation: factors, 1 leaves the image as it is
    contrast: Tensor
    saturation: Tensor
    hue: Tensor  # (views,) turns
    grey: Tensor  # (views,) bool

    def of(self, rows: slice) -> Draw:
        """Return the random numbers of some of the views."""
        return Draw(**{name: value[rows] for name, value in vars(self).items()})


def draw(kind: Augmentation, views: int, random: torch.Generator) -> Draw:
    """Draw the random numbers of `views` views from a generator on the CPU: the same for every device."""

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(views, generator=random) * (high - low) + low

    area, ratio = uniform(*kind.scale), uniform(*map(math.log, kind.ratio)).exp()
    sides = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], 1).clamp(max=1)
    corners = torch.stack([uniform(0, 1), uniform(0, 1)], 1) * (1 - sides)
    jittered = uniform(0, 1) < kind.jitter
    factors = [
        uniform(1 - amount, 1 + amount).where(jittered, 1)
        for amount in (kind.brightness, kind.contrast, kind.saturation)
    ]
    hue = uniform(-kind.hue, kind.hue).where(jittered, 0)
    flipped, grey = uniform(0, 1) < 0.5, uniform(0, 1) < kind.grey
    return Draw(torch.cat([corners, sides], 1), flipped, *factors, hue, grey)


def augment(images: Tensor, size: int, drawn: Draw) -> Tensor:
    """Make the drawn views: uint8 (views, 3, side, side) → float32 (views, 3, size, size), 0 to 1."""
    device = images.device
    grid = _places(drawn.boxes.to(device), drawn.flipped.to(device), size)
    pixels = functional.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    grey = pixels.mean((2, 3)) @ torch.tensor(GREY, device=device)  # (views,) the mean brightness
    colours, shift = _colours(drawn) / 255, (1 - drawn.contrast) * drawn.brightness / 255
    shift, colours = (shift.to(device) * grey).view(-1, 1, 1), colours.to(device)
    changed = torch.baddbmm(shift, colours, pixels.flatten(2)).clamp_(0, 1)
    return changed.view_as(pixels).contiguous(memory_format=torch.channels_last)


def _places(boxes: Tensor, flipped: Tensor, size: int) -> Tensor:
    """Return where each pixel of a view lies in its image, -1 to 1: grid_sample's (views, size, size, 2).

    The boxes are not turned, so that x is the same in each row and y in each column.
    """
    left, top, width, height = boxes.T[:, :, None]
    steps = (torch.arange(size, device=boxes.device) + 0.5) / size
    x = left + width * steps.where(~flipped[:, None], 1 - steps)  # (views, size)
    y = top + height * steps
    shape = len(boxes), size, size
    return torch.stack([x[:, None].expand(shape), y[:, :, None].expand(shape)], 3).mul_(2).sub_(1)


def _colours(drawn: Draw) -> Tensor:
    """Return the colour matrix of each view (views, 3, 3): its brightness, contrast, saturation and hue.

    A colour matrix maps RGB to RGB. Brightness, contrast and saturation are those of torchvision; `augment`
    adds the constant part of the contrast. The hue is rotated at constant brightness, by hueRotate of the
    W3C's Filter Effects. torchvision rotates it in HSV, which takes ten times as long.
    """
    grey = torch.tensor(GREY).expand(3, 3)  # every channel becomes the brightness
    saturation = drawn.saturation.view(-1, 1, 1)
    matrices = saturation * torch.eye(3) + (1 - saturation) * grey
    turn = drawn.hue.view(-1, 1, 1) * 2 * math.pi
    lightness = torch.tensor(LIGHTNESS).expand(3, 3)
    matrices = (
        lightness + turn.cos() * (torch.eye(3) - lightness) + turn.sin() * torch.tensor(SINE)
    ) @ matrices
    matrices = torch.where(drawn.grey.view(-1, 1, 1), grey, matrices)
    return matrices * (drawn.brightness * drawn.contrast).view(-1, 1, 1)
