"""Ten images of odd sizes, modes and aspects, on which a transform is compared with a reference."""

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_image

SIZES = {  # of the images in RGB
    "wide.png": (400, 90),
    "tall.png": (61, 300),
    "tiny.png": (7, 5),
    "square.png": (112, 112),
    "large.png": (640, 427),
}
MODES = {"grey.png": "L", "palette.png": "P", "cmyk.tif": "CMYK", "bits.png": "1", "opaque.png": "RGBA"}


def write_odd_images(folder):
    """Write them into a new folder, without loss: any decoder reads the same pixels from them."""
    folder.mkdir()
    photos = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    for row, (name, size) in enumerate(SIZES.items()):
        part = photos[row % 2].crop((90 * row, 0, 640, 427 - 40 * row))
        part.resize(size, Image.Resampling.BICUBIC).save(folder / name)
    for row, (name, mode) in enumerate(MODES.items()):
        left = 40 * row
        photos[row % 2].crop((left, left, left + 250 + 13 * row, left + 230)).convert(mode).save(
            folder / name
        )
    assert len({np.asarray(Image.open(file).convert("RGB")).tobytes() for file in folder.iterdir()}) == 10
