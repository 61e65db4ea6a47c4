"""Five points of a face in; a crop in which they lie where networks of ArcFace's family expect them, out.

A map is a matrix (2, 3) from a pixel of the crop to its place in the photograph: (x, y, 1) → (x, y). As for
cv2.warpAffine and InsightFace, the centre of the first pixel is (0, 0).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1  # part of the cache key: raise it when an aligned face moves by more than rounding
SIDE = 112  # pixels of the crop in which the templates are given

# InsightFace's template: both eyes, the nose, both corners of the mouth, left and right as in the image.
FIVE_POINTS = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)


def map_of_points(points: np.ndarray, template: np.ndarray, size: int) -> np.ndarray:
    """Return the map (2, 3) of a crop of `size` pixels in which a face's points (5, 2) lie on the template.

    It inverts the similarity transform (turn, scale and move, no reflection) from the photograph to the crop
    with the least squared distances to the template (Umeyama, "Least-squares estimation of transformation
    parameters between two point patterns", 1991). In the plane that is a regression of complex numbers:
    crop = slope · photo + start. The template is scaled from 112 pixels to `size`.

    >>> points = 2 * FIVE_POINTS + [30, 10]  # a face twice as large as the template
    >>> map_of_points(points, FIVE_POINTS, 112).round(6).tolist()
    [[2.0, 0.0, 30.0], [-0.0, 2.0, 10.0]]
    """
    photo, crop = (xy[:, 0] + 1j * xy[:, 1] for xy in (points.astype(float), template * (size / SIDE)))
    from_mean = photo - photo.mean()
    slope = (from_mean.conj() @ (crop - crop.mean())) / (abs(from_mean) ** 2).sum()
    inverse, corner = 1 / slope, photo.mean() - crop.mean() / slope
    return np.array([[inverse.real, -inverse.imag, corner.real], [inverse.imag, inverse.real, corner.imag]])


def map_of_box(box: np.ndarray, size: int) -> np.ndarray:
    """Return the map (2, 3) of a crop that shows a square box (left, top, right, bottom) upright.

    >>> map_of_box(np.array([10, 20, 20, 30]), 20).tolist()
    [[0.5, 0.0, 9.75], [0.0, 0.5, 19.75]]
    """
    scale = (box[2] - box[0]) / size
    left, top = box[:2] + scale / 2 - 0.5  # the centre of the crop's first pixel
    return np.array([[scale, 0, left], [0, scale, top]])


def align(photo: np.ndarray, to_photo: np.ndarray, size: int) -> np.ndarray:
    """Resample a photograph (height, width, 3), uint8, by a map to (size, size, 3); outside it is black.

    Each pixel is interpolated between four of the photograph, as by cv2.warpAffine. A face much larger than
    the crop is not smoothed, since InsightFace's crops are not.
    """
    # Only the pixels that the crop sees: copying all of a large photograph would take longer.
    far = size - 1
    corners = to_photo @ np.array([[0, far, 0, far], [0, 0, far, far], [1, 1, 1, 1]])
    sides = np.array(photo.shape[1::-1])  # width, height
    left, top = first = np.floor(corners.min(1)).astype(int).clip(0, sides - 1)
    right, bottom = (np.floor(corners.max(1)).astype(int) + 2).clip(first + 1, sides)
    # With a black frame Pillow blends the photograph's edge into black, as cv2 does.
    frame = (-1, -1, int(right - left) + 1, int(bottom - top) + 1)
    framed = Image.fromarray(photo[top:bottom, left:right]).crop(frame)
    a, b, c, d = to_photo[:, :2].ravel().tolist()
    x, y = (to_photo[:, 2] - first).tolist()
    # In Pillow the centre of the first pixel is (0.5, 0.5), in the crop as in the photograph.
    pillows = (a, b, x + 1.5 - (a + b) / 2, c, d, y + 1.5 - (c + d) / 2)
    aligned = framed.transform((size, size), Image.Transform.AFFINE, pillows, Image.Resampling.BILINEAR)
    return np.asarray(aligned)


def align_on_gpu(photos: list[Tensor], to_photos: np.ndarray, size: int) -> Tensor:
    """Do as `align` for photographs (3, height, width) on one device, by maps (photos, 2, 3).

    Return uint8 (photos, 3, size, size).
    """
    import torch
    from torch.nn.functional import grid_sample

    device = photos[0].device
    maps, sides = (
        torch.tensor(np.array(values), dtype=torch.float32).to(device, non_blocking=True)
        for values in (to_photos, [photo.shape[:0:-1] for photo in photos])  # (width, height)
    )
    along = torch.arange(size, device=device)
    maps = maps[:, None, None]  # (photos, rows, columns, x and y, 3)
    # No matrix product, which a GPU may round to ten bits.
    places = maps[..., 0] * along[:, None] + maps[..., 1] * along[:, None, None] + maps[..., 2]
    places = (2 * places + 1) / sides[:, None, None] - 1  # from -1 to 1: grid_sample's units
    crops = [
        grid_sample(photo[None].float(), place[None], padding_mode="zeros", align_corners=False)
        for photo, place in zip(photos, places, strict=True)
    ]
    return torch.cat(crops).byte()  # cuts the fraction off, as Pillow does
