"""Faces aligned by five points, beside Umeyama's equations and a resampling written pixel by pixel."""

import numpy as np
import pytest
import torch
from photographs import face_photograph, photo_of
from PIL import Image

from retrieval.backbones.alignment import FIVE_POINTS, align, align_on_gpu, map_of_box, map_of_points

PHOTO = photo_of(face_photograph("hopper"))  # 600 x 512
# Both eyes, the nose, both corners of the mouth.
POINTS = np.array([[216.0, 196], [304, 190], [263, 250], [222, 286], [302, 281]])


def umeyama(points, template):
    """The similarity transform (2, 3) from the points to the template: equations 34 to 43 of the paper."""
    mean_x, mean_y = points.mean(0), template.mean(0)
    x, y = points - mean_x, template - mean_y
    u, d, vt = np.linalg.svd(y.T @ x / len(points))
    s = np.array([1, np.sign(np.linalg.det(u) * np.linalg.det(vt))])
    rotation = u @ np.diag(s) @ vt
    scale = (d * s).sum() / (x**2).sum(1).mean()
    return np.column_stack([scale * rotation, mean_y - scale * rotation @ mean_x])


def warped(photo, to_crop, size):
    """What cv2.warpAffine makes of a photograph, bilinear and black outside, but without its fixed point."""
    inverse = np.linalg.inv(np.vstack([to_crop, [0, 0, 1]]))
    columns, rows = np.meshgrid(np.arange(size), np.arange(size))
    x, y, _ = np.tensordot(inverse, np.stack([columns, rows, np.ones_like(rows)]), 1)
    left, top = np.floor(x).astype(int), np.floor(y).astype(int)
    height, width = photo.shape[:2]
    crop = np.zeros((size, size, 3))
    for dx in (0, 1):
        for dy in (0, 1):
            at_x, at_y = left + dx, top + dy
            inside = (at_x >= 0) & (at_x < width) & (at_y >= 0) & (at_y < height)
            pixels = photo[at_y.clip(0, height - 1), at_x.clip(0, width - 1)] * inside[..., None]
            crop += pixels * ((1 - abs(x - at_x)) * (1 - abs(y - at_y)))[..., None]
    return crop


def turned(points, degrees, scale=1.0, centre=(263, 240), to=(263, 240)):
    angle = np.deg2rad(degrees)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return scale * (points - centre) @ turn.T + to


NOT_SIMILAR = np.array([[0, 3.0], [-4, 1], [6, -5], [2, 2], [-3, 7]])  # as real points are
FACES = {
    "upright": POINTS,
    "turned": turned(POINTS, 35),
    "upside down": turned(POINTS, 170),
    "small": turned(POINTS, -10, 0.2),
    "huge": turned(POINTS, 5, 2.5),
    "over the corner": turned(POINTS, 0, to=(20, 30)),
    "over the edge, turned": turned(POINTS, -50, 0.5, to=(500, 560)),
    "outside": turned(POINTS, 0, to=(-900, 100)),
}


@pytest.fixture(params=FACES)
def points(request):
    return FACES[request.param] + NOT_SIMILAR


@pytest.mark.parametrize("size", [112, 160, 97])
def test_a_face_is_aligned_as_by_umeyama_and_cv2(points, size):
    to_crop = umeyama(points, FIVE_POINTS * size / 112)
    to_photo = map_of_points(points, FIVE_POINTS, size)
    inverse = np.linalg.inv(np.vstack([to_crop, [0, 0, 1]]))[:2]
    assert np.allclose(to_photo, inverse, atol=1e-8)
    expected = warped(PHOTO, to_crop, size)
    assert np.abs(align(PHOTO, to_photo, size) - expected).max() <= 2


def test_a_face_is_aligned_as_by_pillow(points):
    """Pillow counts from the pixels' corners, and does not blend the photograph's edge into black."""
    (a, b, x), (c, d, y) = to_photo = map_of_points(points, FIVE_POINTS, 112)
    shift = 0.5 - (a + b) / 2, 0.5 - (c + d) / 2
    crop = Image.fromarray(PHOTO).transform(
        (112, 112),
        Image.Transform.AFFINE,
        (a, b, x + shift[0], c, d, y + shift[1]),
        Image.Resampling.BILINEAR,
    )
    columns, rows = np.meshgrid(np.arange(112), np.arange(112))
    at = np.tensordot(to_photo, np.stack([columns, rows, np.ones_like(rows)]), 1)
    height, width = PHOTO.shape[:2]
    edge = np.min(
        [abs(at[0] + 0.5), abs(at[0] - width + 0.5), abs(at[1] + 0.5), abs(at[1] - height + 0.5)], 0
    )
    moved = np.abs(align(PHOTO, to_photo, 112).astype(int) - np.asarray(crop).astype(int))
    assert moved[edge > 0.5].max() <= 2


def test_other_conventions_are_other_crops():
    """Each is a mistake that a wrong line would make: the comparisons above would show it."""
    to_crop = umeyama(POINTS, FIVE_POINTS)
    aligned = align(PHOTO, map_of_points(POINTS, FIVE_POINTS, 112), 112).astype(float)
    wrong = {
        "half a pixel": warped(PHOTO, to_crop + np.array([0, 0, 0.25]), 112),
        "BGR": warped(PHOTO[:, :, ::-1], to_crop, 112),
        "mirrored eyes": warped(PHOTO, umeyama(POINTS[[1, 0, 2, 4, 3]], FIVE_POINTS), 112),
        "the template of 96 x 112": warped(PHOTO, umeyama(POINTS, FIVE_POINTS - [8, 0]), 112),
    }
    for mistake, crop in wrong.items():
        assert np.abs(aligned - crop).max() > 10, mistake


def test_points_in_mirrored_order_turn_the_face_and_never_mirror_it():
    """A detector that names the eyes the other way round gives a face upside down, not a mirrored one."""
    for points in (POINTS, POINTS[[1, 0, 2, 4, 3]]):
        to_photo = map_of_points(points, FIVE_POINTS, 112)
        assert np.linalg.det(to_photo[:, :2]) > 0
        assert np.allclose(to_photo, np.linalg.inv(np.vstack([umeyama(points, FIVE_POINTS), [0, 0, 1]]))[:2])


def test_a_box_without_points_is_shown_upright():
    box = np.array([100, 200, 212, 312])
    assert np.abs(align(PHOTO, map_of_box(box, 112), 112).astype(int) - PHOTO[200:312, 100:212]).max() <= 1
    twice = Image.fromarray(PHOTO[200:256, 100:156]).resize((112, 112), Image.Resampling.BILINEAR)
    inner = (slice(1, -1), slice(1, -1))  # outside the box, align sees the photograph
    aligned = align(PHOTO, map_of_box(np.array([100, 200, 156, 256]), 112), 112)
    assert np.abs(aligned.astype(int) - np.asarray(twice))[inner].max() <= 2


def test_a_gpu_aligns_many_photographs_as_the_cpu_does_each():
    photos = [PHOTO, PHOTO[:300], np.ascontiguousarray(PHOTO[::-1, 50:450])]
    photos += [np.zeros((1, 1, 3), np.uint8) + 200]
    for size in (112, 80):
        for points in FACES.values():
            maps = np.array([map_of_points(points, FIVE_POINTS, size)] * 4)
            tensors = [torch.from_numpy(photo).permute(2, 0, 1) for photo in photos]
            crops = align_on_gpu(tensors, maps, size)
            assert (crops.shape, crops.dtype) == ((4, 3, size, size), torch.uint8)
            for crop, photo, to_photo in zip(crops, photos, maps, strict=True):
                assert np.abs(photo_of(crop).astype(int) - align(photo, to_photo, size)).max() <= 2
