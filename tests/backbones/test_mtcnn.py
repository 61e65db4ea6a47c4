"""Photographs of two people, many at a time: faces and crops are those of one photograph at a time."""

import functools

import facenet_pytorch
import numpy as np
import pytest
import torch
from photographs import face_photograph, photo_of
from PIL import Image
from torch.nn.functional import interpolate
from torchvision.transforms.v2.functional import resize

from retrieval.backbones import mtcnn
from retrieval.backbones.mtcnn import cut_faces, find_faces


def noise(*shape):
    return torch.randint(0, 256, (3, *shape), dtype=torch.uint8, generator=torch.manual_seed(0))


@functools.cache
def photographs():
    """Return five photographs of four sizes; MTCNN shrinks two. The last has two faces, the larger first."""
    small, collins = resize(face_photograph("hopper"), [250, 205], antialias=True), face_photograph("collins")
    large = resize(collins, [700, 800], antialias=True)
    both = torch.full((3, 250, 400), 255, dtype=torch.uint8)
    both[:, :, :205], both[:, :150, 250:] = small, resize(collins, [150, 150], antialias=True)
    return [small, collins, large, small.flip(2), both]


@functools.cache
def facenets():
    return facenet_pytorch.MTCNN()


def find_by_facenet(photo, min_face_size):
    """The faces (faces, 14) in a photograph (height, width, 3) by facenet-pytorch, shrunk to 500 pixels."""
    longest = max(photo.shape[:2])
    side = min(longest, max(500, 20 / min_face_size))
    small = photo
    if side < longest:
        height, width = (max(1, round(length * side / longest)) for length in photo.shape[:2])
        small = np.array(Image.fromarray(photo).resize((width, height), Image.Resampling.BILINEAR))
    facenets().min_face_size = max(20, round(min_face_size * max(small.shape[:2])))
    if min(small.shape[:2]) < facenets().min_face_size:
        return np.empty((0, 14))
    try:
        boxes, _, points = facenets().detect(small, landmarks=True)
    except (RuntimeError, ValueError, IndexError):  # a stage without candidates, as in pure noise
        boxes = None
    if boxes is None:
        return np.empty((0, 14))
    return np.hstack([boxes, points.reshape(-1, 10)]) * (longest / max(small.shape[:2]))


def cut_by_facenet(photo, box, size, margin):
    crop = facenet_pytorch.extract_face(Image.fromarray(photo), box, image_size=size, margin=margin * size)
    return crop.permute(1, 2, 0).numpy().astype(np.uint8)


def assert_same(found, expected, pixels):
    assert [len(boxes) for boxes in found] == [len(boxes) for boxes in expected]
    for faces, others in zip(found, expected, strict=True):
        assert faces.dtype == np.float32
        assert np.abs(faces - others.astype(float)).max(initial=0) <= pixels


@pytest.mark.parametrize("min_face_size", [0.08, 0.03, 0.4])  # the second: MTCNN shrinks to 667 pixels
def test_many_photographs_have_the_faces_of_each_alone(min_face_size):
    photos = photographs()
    found = find_faces(photos, min_face_size)
    assert_same(found, [find_faces([photo], min_face_size)[0] for photo in photos], pixels=0.01)
    expected = [find_by_facenet(photo_of(photo), min_face_size) for photo in photos]
    # MTCNN rounds boxes to whole pixels between its networks, so a grey level in a resized photograph can
    # move a face by up to a pixel of that, which is 1.6 of the large one.
    assert_same(found, expected, pixels=1.6)
    resized = [max(photo.shape) > 500 for photo in photos]
    assert resized == [False, True, True, False, False]
    kept = [i for i, is_resized in enumerate(resized) if not is_resized]
    assert_same([found[i] for i in kept], [expected[i] for i in kept], pixels=0.01)
    if min_face_size < 0.4:
        assert all(len(boxes) for boxes in found)


def test_boxes_and_points_are_facenet_pytorchs_the_largest_first():
    from facenet_pytorch import MTCNN

    small, *_, both = photographs()
    for photo, smallest in ((small, 20), (both, 32)):
        mtcnn, image = MTCNN(min_face_size=smallest), Image.fromarray(photo_of(photo))
        boxes, _, points = mtcnn.detect(image, landmarks=True)
        found = find_faces([photo], 0.08)
        assert_same([found[0][:, :4]], [boxes], pixels=0.01)
        assert_same([found[0][:, 4:].reshape(-1, 5, 2)], [points], pixels=0.01)
    sides = np.diff(find_faces([both], 0.08)[0][:, :4].reshape(-1, 2, 2), axis=1)
    areas = sides.prod(-1).flatten().tolist()
    assert len(areas) >= 2
    assert areas == sorted(areas, reverse=True)


def test_what_holds_no_face_has_no_box():
    person = photographs()[0]
    shapes = [(1, 1), (19, 200), (20, 20), (24, 24), (60, 40), (250, 205)]
    photos = [kind for shape in shapes for kind in (noise(*shape), torch.zeros_like(noise(*shape)))]
    found = find_faces([*photos, person], 0.08)
    assert_same(found, [find_by_facenet(photo_of(photo), 0.08) for photo in [*photos, person]], pixels=0.01)
    assert [len(boxes) for boxes in found] == [0] * len(photos) + [1]
    assert len(find_faces([person], 0.9)[0]) == 0
    assert find_faces([], 0.08) == []


def test_the_size_of_groups_changes_no_box(monkeypatch):
    small, *_, flipped, both = photographs()
    photos = [small, both, flipped, small]
    found = find_faces(photos, 0.08)
    monkeypatch.setattr(mtcnn, "GROUP_PIXELS", 2 * 250 * 205)
    monkeypatch.setattr(mtcnn, "CROP_PIXELS", 5 * 48 * 48)
    assert_same(find_faces(photos, 0.08), found, pixels=0.01)


@pytest.mark.parametrize("shift", [0, 2**31 - 5])  # the second as if many bright pixels lay above and left
def test_crops_are_averaged_as_by_adaptive_pooling(shift):
    photos = torch.stack([noise(90, 70), noise(90, 70).flip(2)])
    boxes = torch.tensor([[1, 1, 70, 90], [-8.7, 5.2, 40.9, 54.1], [50, 60, 99, 109], [20, 30, 22, 33]])
    owners = torch.tensor([0, 1, 1, 0])
    crops = mtcnn._crops(mtcnn._summed_areas(photos) + shift, boxes, owners, 24, 31)
    for crop, box, owner in zip(crops, boxes.int().tolist(), owners, strict=True):
        left, top, right, bottom = box
        pixels = photos[owner, None, :, max(top, 1) - 1 : bottom, max(left, 1) - 1 : right].float()
        expected = (interpolate(pixels, size=(24, 31), mode="area") - 127.5) * 0.0078125
        assert torch.allclose(crop, expected[0], atol=1e-6)


def test_a_box_outside_the_photograph_gives_a_crop():
    sums = mtcnn._summed_areas(noise(90, 70)[None])
    boxes = torch.tensor([[80.0, 100, 90, 110], [-30, -30, -10, -10]])
    assert mtcnn._crops(sums, boxes, torch.zeros(2, dtype=torch.long), 24, 24).isfinite().all()


@pytest.mark.parametrize(("size", "margin"), [(160, 14 / 160), (150, 1 / 3), (32, 0.0)])
def test_the_faces_are_cut_out_as_one_by_one(size, margin):
    photos = photographs()
    shares = np.random.default_rng(0).uniform([0.1, 0.1, 0.6, 0.6], [0.4, 0.4, 0.9, 0.9], (len(photos), 4))
    boxes = shares * [[*photo.shape[:0:-1]] * 2 for photo in photos]
    over_the_edge = boxes + np.eye(4)[[0, 1, 2, 3, 0]] * [-300, -300, 300, 300]
    for some in (boxes, over_the_edge):
        cut = cut_faces(photos, some, size, margin)
        assert cut.shape == (len(photos), 3, size, size)
        assert cut.dtype == torch.uint8
        for crop, photo, box in zip(cut, photos, some, strict=True):
            expected = cut_by_facenet(photo_of(photo), box, size, margin)
            assert np.abs(photo_of(crop).astype(int) - expected.astype(int)).max() <= 1
