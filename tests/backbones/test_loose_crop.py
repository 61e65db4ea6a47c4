"""The region around a box, by hand, and its pixels beside Pillow's and torch's."""

import numpy as np
import pytest
import torch
from photographs import face_photograph, photo_of
from PIL import Image

from retrieval.backbones.loose_crop import cut_loosely, cut_loosely_on_gpu, loose_region

PHOTO = photo_of(face_photograph("hopper"))  # 600 x 512


@pytest.mark.parametrize(
    ("box", "shape", "margin", "region"),
    [
        ([100, 100, 140, 160], (400, 300), 0.5, (60, 70, 180, 190)),  # 2 x 60 pixels around (120, 130)
        ([100, 100, 140, 160], (400, 300), 0.0, (90, 100, 150, 160)),
        ([100, 100, 140, 160], (400, 300), 0.75, (0, 10, 240, 250)),
        ([0, 0, 40, 60], (400, 300), 0.5, (0, 0, 120, 120)),  # moved inside
        ([280, 350, 320, 410], (400, 300), 0.5, (180, 280, 300, 400)),
        ([10, 100, 60, 200], (400, 80), 0.5, (0, 50, 80, 250)),  # cut to the photograph's width
        ([10, 10, 60, 90], (100, 80), 0.5, (0, 0, 80, 100)),  # all of it
        ([0, 0, 1, 1], (1, 1), 0.5, (0, 0, 1, 1)),
        ([-20.6, -3.2, 30.1, 60.9], (100, 200), 0.5, (0, 0, 128, 100)),
    ],
)
def test_the_region_is_a_square_within_the_photograph(box, shape, margin, region):
    assert loose_region(np.array(box), shape, margin) == region


BOXES = np.array([[200.0, 150, 320, 310], [-40, 10, 60, 120], [10, 20, 480, 590], [300, 300, 312, 315]])


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [224, 64])
def test_the_region_is_resized_once(interpolation, size):
    photos = [torch.from_numpy(PHOTO.copy()).permute(2, 0, 1)] * len(BOXES)
    on_gpu = cut_loosely_on_gpu(photos, BOXES, size, 0.5, interpolation)
    assert (on_gpu.shape, on_gpu.dtype) == ((len(BOXES), 3, size, size), torch.uint8)
    for box, other in zip(BOXES, on_gpu, strict=True):
        crop = cut_loosely(PHOTO, box, size, 0.5, interpolation)
        region = Image.fromarray(PHOTO).crop(loose_region(box, PHOTO.shape[:2], 0.5))
        expected = region.resize((size, size), Image.Resampling[interpolation.upper()])
        assert np.array_equal(crop, np.asarray(expected))
        assert np.abs(photo_of(other).astype(int) - crop).max() <= 2
