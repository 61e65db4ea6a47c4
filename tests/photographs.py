"""Two photographs of people, and what a backbone's transform makes of a photograph."""

import numpy as np
import torch
from PIL import Image


def face_photograph(name):
    """A photograph of one person, uint8 RGB (3, height, width): Grace Hopper or Eileen Collins."""
    if name == "hopper":
        from matplotlib.cbook import get_sample_data

        with get_sample_data("grace_hopper.jpg") as file:
            pixels = np.array(Image.open(file))
    else:
        from skimage.data import astronaut

        pixels = astronaut()
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


def photo_of(image):
    """A tensor (3, height, width) as read_image gives it."""
    return np.ascontiguousarray(image.permute(1, 2, 0).numpy())


def seen_of(transform, image):
    """The network's input for such a tensor, its pixels as another."""
    seen = transform(photo_of(image))
    return seen._replace(pixels=torch.from_numpy(seen.pixels))
