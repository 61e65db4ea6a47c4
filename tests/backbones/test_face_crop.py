"""Photographs of two people, and what is none: every image gives one crop, whatever is in it."""

import functools
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, by_torch
from photographs import face_photograph, photo_of, seen_of
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import pad, resize, rotate

from get_images import find_images
from retrieval.backbones.alignment import FIVE_POINTS
from retrieval.backbones.backbone import find_pretrained
from retrieval.backbones.detectors import DETECTORS, _dlib
from retrieval.backbones.face_crop import FaceCrop, centre_box, main_face
from retrieval.embedding.embed import embed

CROPS = {"mtcnn": FaceCrop("mtcnn", 160, 14 / 160, 0.08), "dlib": FaceCrop("dlib", 150, 1 / 3, 0.08)}


@functools.cache
def hopper():
    """Grace Hopper, 250 pixels high as a photograph of LFW: small enough for no detector to shrink it."""
    return resize(face_photograph("hopper"), [250], antialias=True)[:, :250, :200]


def main_box(crop, image):
    """The chosen face's box, in shares of the photograph's sides."""
    photo = photo_of(image)
    height, width = photo.shape[:2]
    box = main_face(DETECTORS[crop.detector].find(photo, crop.min_face_size), (height, width))[:4]
    return np.array(box) / [width, height, width, height]


def overlap(one, other):
    """Intersection over union of two boxes."""
    sides = np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2])
    shared = sides.clip(0).prod()
    return shared / ((one[2:] - one[:2]).prod() + (other[2:] - other[:2]).prod() - shared)


def cosine(one, other):
    one, other = one.double().flatten() - 128, other.double().flatten() - 128
    return float(one @ other / one.norm() / other.norm())


@pytest.fixture(params=CROPS)
def crop(request):
    return CROPS[request.param]


def test_the_crop_is_mtcnns_own_pixel_by_pixel():
    from facenet_pytorch import MTCNN

    theirs = MTCNN(image_size=160, margin=14, post_process=False, selection_method="center_weighted_size")
    for image in (hopper(), hopper().flip(2)):
        expected = theirs(Image.fromarray(photo_of(image)))
        assert torch.equal(seen_of(CROPS["mtcnn"], image).pixels.float(), expected)


def test_facenets_input_is_its_own_standardisation():
    from facenet_pytorch import fixed_image_standardization

    row = find_pretrained("facenet")
    pixels = torch.arange(256, dtype=torch.float32)
    assert torch.allclose(
        (pixels / 255 - row.mean[0]) / row.std[0], fixed_image_standardization(pixels), atol=1e-6
    )


def test_the_chip_is_dlibs_own_pixel_by_pixel():
    import dlib

    detect, landmarks = _dlib()
    photo = photo_of(hopper())
    expected = dlib.get_face_chip(photo, landmarks(photo, detect(photo)[0]), size=150, padding=0.25)
    assert np.array_equal(photo_of(seen_of(CROPS["dlib"], hopper()).pixels), expected)


def test_a_large_photograph_gives_nearly_the_same_box(crop):
    large = resize(hopper(), [2000, 1600], antialias=True)
    assert overlap(main_box(crop, large), main_box(crop, hopper())) > 0.6
    assert seen_of(crop, large).pixels.shape == (3, crop.size, crop.size)


def test_a_face_of_a_tenth_of_a_large_photograph_is_found(crop):
    noise = torch.randint(60, 200, (3, 2400, 2000), dtype=torch.uint8, generator=torch.manual_seed(0))
    noise[:, 1000:1625, 800:1300] = resize(hopper(), [625, 500], antialias=True)  # the face: some 250 pixels
    assert seen_of(crop, noise).face is True
    there = main_box(crop, hopper()) * [500, 625, 500, 625] + [800, 1000, 800, 1000]
    assert overlap(main_box(crop, noise), there / [2000, 2400, 2000, 2400]) > 0.5


def test_of_several_faces_the_largest_and_most_central_wins(crop):
    small = resize(hopper(), [125, 100], antialias=True)
    two = torch.full((3, 250, 400), 255, dtype=torch.uint8)
    two[:, :, 100:300] = hopper()
    two[:, :125, :100] = small.flip(2)
    right = main_box(crop, hopper()) * [0.5, 1, 0.5, 1] + [0.25, 0, 0.25, 0]
    assert overlap(main_box(crop, two), right) > 0.7


def test_main_face():
    corner, centre = [0, 0, 60, 60], [80, 80, 130, 130]
    assert main_face(np.array([corner, centre]), (200, 200)).tolist() == centre
    assert main_face(np.array([[0, 0, 150, 150], centre]), (200, 200)).tolist() == [0, 0, 150, 150]
    assert main_face(np.empty((0, 4)), (200, 200)) is None
    outside = np.array([[-50.0, 10, 0, 60], [200, 0, 260, 50]])
    assert main_face(outside, (200, 200)) is None
    assert main_face(np.array([*outside, [-5, 20, 30, 55]]), (200, 200)).tolist() == [-5, 20, 30, 55]


def test_a_face_at_the_edge_gives_a_crop(crop):
    box = main_face(DETECTORS[crop.detector].find(photo_of(hopper()), crop.min_face_size), (250, 200))
    left, top, right, bottom = (int(side) for side in box[:4])
    for image in (hopper()[:, (top + bottom) // 2 - 30 :, left + 10 :], hopper()[:, :bottom, : right - 5]):
        assert seen_of(crop, image).pixels.shape == (3, crop.size, crop.size)


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (19, 200), (8, 8), (300, 1), (21, 500), (60, 40)])
@pytest.mark.parametrize("fill", ["black", "noise"])
def test_what_holds_no_face_gives_the_centre(crop, shape, fill):
    noise = torch.randint(0, 256, (3, *shape), dtype=torch.uint8, generator=torch.manual_seed(0))
    seen = seen_of(crop, noise if fill == "noise" else torch.zeros_like(noise))
    assert seen.face is False
    assert seen.pixels.shape == (3, crop.size, crop.size)
    assert seen.pixels.dtype == torch.uint8
    if fill == "black":
        assert not seen.pixels.any()


def test_without_a_face_the_centre_goes_the_same_way_as_a_box(monkeypatch, crop):
    detector = DETECTORS[crop.detector]
    monkeypatch.setitem(DETECTORS, crop.detector, detector._replace(find=lambda *_: np.empty((0, 4))))
    without = seen_of(crop, hopper())
    centre = centre_box((250, 200))
    monkeypatch.setitem(DETECTORS, crop.detector, detector._replace(find=lambda *_: centre[None]))
    with_face = seen_of(crop, hopper())
    assert (without.face, with_face.face) == (False, True)
    assert torch.equal(without.pixels, with_face.pixels)


ALIGNED = {name: FaceCrop(name, 112, 0, 0.08, "align") for name in CROPS}
LOOSE = {name: FaceCrop(name, 224, 0.5, 0.08, "loose") for name in CROPS}


def between_the_ears(pixels):
    return pixels[:, 30:105, 25:87]


@pytest.mark.parametrize("name", ["hopper", "collins"])
def test_mtcnns_and_dlibs_points_align_a_face_alike(name):
    photo = resize(face_photograph(name), [300], antialias=True)
    one, other = (between_the_ears(seen_of(ALIGNED[detector], photo).pixels) for detector in CROPS)
    assert cosine(one, other) > 0.9
    for shift, axis in ((5, 1), (-5, 1), (5, 2), (-5, 2)):
        assert cosine(one, other.roll(shift, axis)) < cosine(one, other)


@pytest.mark.parametrize("detector", CROPS)
def test_a_turned_photograph_gives_the_same_aligned_face(detector):
    turned = rotate(hopper(), 15, InterpolationMode.BILINEAR, expand=True)
    faces = [between_the_ears(seen_of(ALIGNED[detector], photo).pixels) for photo in (turned, hopper())]
    assert cosine(*faces) > 0.85
    upright = [seen_of(CROPS["mtcnn"], photo).pixels[:, 40:120, 40:120] for photo in (turned, hopper())]
    assert cosine(*upright) < 0.8


def test_the_eyes_of_an_aligned_face_lie_on_the_template():
    from retrieval.backbones.mtcnn import find_faces

    aligned = seen_of(replace(ALIGNED["mtcnn"], size=224), hopper()).pixels
    (face,) = find_faces([aligned], 0.08)[0]
    points = face[4:].reshape(5, 2)
    assert np.abs(points - 2 * FIVE_POINTS).max() < 8  # of 224 pixels: faces differ from the template


@pytest.mark.parametrize("detector", CROPS)
def test_without_a_face_the_centre_is_upright(detector):
    """Half of the shorter side is 112 pixels; a loose crop shows twice as much."""
    noise = torch.randint(0, 256, (3, 300, 224), dtype=torch.uint8, generator=torch.manual_seed(0))
    aligned, loose = (seen_of(crop[detector], noise) for crop in (ALIGNED, LOOSE))
    assert (aligned.face, loose.face) == (False, False)
    assert torch.equal(aligned.pixels, noise[:, 94:206, 56:168])
    assert torch.equal(loose.pixels, noise[:, 38:262])


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (19, 200), (300, 1)])
def test_every_photograph_gives_a_crop(shape):
    for crop in (*ALIGNED.values(), *LOOSE.values()):
        seen = seen_of(crop, torch.full((3, *shape), 200, dtype=torch.uint8))
        assert seen.pixels.shape == (3, crop.size, crop.size)
        assert seen.face is False


ON_A_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.parametrize("method", ["face", "align", "loose"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_A_GPU)])
def test_many_photographs_on_a_gpu_give_the_crops_of_each_alone(method, device):
    crop = FaceCrop("mtcnn", 112, 0.2, 0.08, method, "bicubic")
    photos = [hopper(), resize(face_photograph("collins"), [300], antialias=True), hopper().flip(2)]
    photos += [hopper()[:, 40:], torch.zeros(3, 80, 60, dtype=torch.uint8)]
    pixels, found = crop.on_gpu([photo.to(device) for photo in photos])
    assert found == [True] * 4 + [False]
    for photo, one in zip(photos, pixels.cpu(), strict=True):
        assert (one.int() - seen_of(crop, photo).pixels.int()).abs().max() <= 2


def test_old_checkpoints_have_no_method():
    assert FaceCrop(detector="dlib", size=150, margin=0.2, min_face_size=0.08).method == "face"


def test_dlib_needs_no_torch(tmp_path):
    """Which takes a reader process seconds to import."""
    Image.fromarray(photo_of(hopper())).save(tmp_path / "hopper.jpg")
    code = (
        "import sys; from get_images import read_image; from retrieval.backbones.face_crop import FaceCrop; "
        "import retrieval.embedding.loader; crop = FaceCrop('dlib', 150, 1 / 3, 0.08); "
        "print(crop(read_image(sys.argv[1])).face, 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, tmp_path / "hopper.jpg"]
    assert subprocess.check_output(command, cwd=ROOT, text=True).split() == ["True", "False"]


def test_margin_and_smallest_face_change_the_crop(crop):
    import dataclasses

    wider = dataclasses.replace(crop, margin=0.5)
    assert cosine(seen_of(wider, hopper()).pixels, seen_of(crop, hopper()).pixels) < 0.95
    small = pad(hopper(), [400, 400, 400, 400])  # a face of 8 % of the longer side, or less
    assert seen_of(dataclasses.replace(crop, min_face_size=0.5), small).face is False
    assert seen_of(dataclasses.replace(crop, min_face_size=0.9), hopper()).face is False
    assert seen_of(dataclasses.replace(crop, min_face_size=0.04), small).face is True


def test_one_vector_an_image_in_any_order_and_batch_size(tmp_path):
    """With dlib's real network, in the reader processes."""
    from retrieval.backbones.backbone import load_backbone

    people = {
        "hopper.png": hopper(),
        "collins.png": resize(face_photograph("collins"), [250], antialias=True),
    }
    none = {"black.png": torch.zeros(3, 30, 30), "noise.png": torch.randint(0, 256, (3, 90, 70))}
    for name, image in (people | none).items():
        Image.fromarray(photo_of(image.to(torch.uint8))).save(tmp_path / name)
    (tmp_path / "broken.png").write_bytes(b"")
    backbone = load_backbone("dlib", "cpu")
    assert backbone.transform.detects_faces
    files = find_images(tmp_path)
    first = embed(files, by_torch(backbone, 32))
    assert first.without_face == ["black.png", "noise.png"]
    assert first.unreadable == ["broken.png"]
    for order, batch_size in ((files[::-1], 1), (files[2:] + files[:2], 2)):
        again = embed(order, by_torch(backbone, batch_size))
        assert again.without_face == sorted(first.without_face, key=again.names.index)
        for name, vector in zip(again.names, again.vectors, strict=True):
            assert np.allclose(vector, first.vectors[first.names.index(name)], atol=1e-5)
