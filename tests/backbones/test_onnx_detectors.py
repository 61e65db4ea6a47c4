"""Tiny ONNX files with planted outputs, where the hub keeps its downloads; the decoders beside loops."""

import math

import numpy as np
import pytest
from hub import CELLS, POINTS, lay_detector, lay_in_hub, scrfds
from huggingface_hub import constants
from photographs import face_photograph, photo_of

from retrieval.backbones import onnx_detectors
from retrieval.backbones.alignment import FIVE_POINTS, align, map_of_points
from retrieval.backbones.backbone import find_backbone
from retrieval.backbones.detectors import DETECTORS, cut_upright
from retrieval.backbones.face_crop import FaceCrop
from retrieval.backbones.loose_crop import cut_loosely
from retrieval.backbones.onnx_detectors import SCRFD, YUNET, decode_scrfd, decode_yunet
from retrieval.errors import InputError, RunError

PHOTO = photo_of(face_photograph("hopper"))[:500, :400]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty cache of the Hugging Face hub, without a network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    onnx_detectors._session.cache_clear()
    yield tmp_path
    onnx_detectors._session.cache_clear()


def yunets(*faces, sides=(640, 640)):
    """YuNet's twelve outputs with faces of (stride, row, column, both scores, the box)."""
    height, width = sides
    outputs = {}
    for kind, n in (("cls", 1), ("obj", 1), ("bbox", 4), ("kps", 10)):
        outputs |= {f"{kind}_{s}": np.zeros((1, height // s * (width // s), n), np.float32) for s in CELLS}
    for stride, row, column, (face, thing), box in faces:
        at = row * (width // stride) + column
        for kind, values in (("cls", [face]), ("obj", [thing]), ("bbox", box), ("kps", POINTS)):
            outputs[f"{kind}_{stride}"][0, at] = values
    return outputs


FIXED, ANY = [1, 3, 640, 640], [1, 3, "?", "?"]


@pytest.mark.parametrize("name", ["scrfd", "scrfd:small"])
@pytest.mark.parametrize(("shape", "batch"), [(FIXED, ()), (ANY, ()), (ANY, (1,))])
def test_scrfd_finds_what_was_planted(home, name, shape, batch):
    planted = scrfds(
        (16, 15, 18, 1, 0.9, [4, 5, 4, 6]),
        (16, 15, 18, 0, 0.7, [4, 5, 4, 5]),  # the same face
        (32, 5, 3, 0, 0.5, [1, 1, 1, 1]),
        (8, 70, 70, 0, 0.49, [9, 9, 9, 9]),  # no face
        batch=batch,
    )
    lay_detector(home, DETECTORS[name].file, planted, shape)
    faces = DETECTORS[name].find(PHOTO, 0.08)  # 500 pixels high, enlarged to 640: by 1.28
    assert faces.shape == (2, 14)
    centre = np.array([18 * 16, 15 * 16])
    box = np.tile(centre, 2) + np.array([-64, -80, 64, 96])
    points = np.tile(centre, 5) + 16 * np.array(POINTS)
    assert np.allclose(faces[0], np.concatenate([box, points]) / 1.28, atol=1e-3)
    assert np.allclose(faces[1, :4], np.array([64, 128, 128, 192]) / 1.28, atol=1e-3)


# A photograph of 500 x 400 is padded to multiples of 32.
@pytest.mark.parametrize(("shape", "sides"), [(FIXED, (640, 640)), (ANY, (512, 416))])
def test_yunet_finds_what_was_planted(home, shape, sides):
    planted = yunets(
        (32, 6, 5, (0.99, 0.95), [0.5, 0.25, math.log(4), math.log(5)]),
        (16, 12, 10, (0.95, 0.95), [1, 1, math.log(8), math.log(10)]),  # the same face
        (8, 3, 3, (0.9, 0.8), [0, 0, 1, 1]),  # no face
        sides=sides,
    )
    lay_detector(home, YUNET, planted, shape)
    (face,) = DETECTORS["yunet"].find(PHOTO, 0.08)
    assert np.allclose(face[:4], [5.5 * 32 - 64, 6.25 * 32 - 80, 5.5 * 32 + 64, 6.25 * 32 + 80], atol=1e-3)
    assert np.allclose(face[4:], np.tile([160, 192], 5) + 32 * np.array(POINTS), atol=1e-3)


class Recorder:
    """A session that keeps what it sees, and finds nothing."""

    def __init__(self, shape, outputs):
        self.shape, self.outputs, self.seen = shape, outputs, None

    def get_inputs(self):
        return [self]

    name = "input"

    def run(self, names, feeds):
        self.seen = feeds["input"]
        return [self.outputs[name] for name in names or self.outputs]


def resized(photo, height, width):
    """cv2.resize's INTER_LINEAR: between the four nearest pixels, the edge repeated."""
    y = ((np.arange(height) + 0.5) * photo.shape[0] / height - 0.5).clip(0, photo.shape[0] - 1)
    x = ((np.arange(width) + 0.5) * photo.shape[1] / width - 0.5).clip(0, photo.shape[1] - 1)
    top, left = np.floor(y).astype(int), np.floor(x).astype(int)
    below, right = (top + 1).clip(max=photo.shape[0] - 1), (left + 1).clip(max=photo.shape[1] - 1)
    v, u = (y - top)[:, None, None], (x - left)[None, :, None]
    above = photo[top][:, left] * (1 - u) + photo[top][:, right] * u
    return above * (1 - v) + (photo[below][:, left] * (1 - u) + photo[below][:, right] * u) * v


@pytest.mark.parametrize(("height", "width"), [(500, 400), (250, 250), (333, 500), (200, 512)])
def test_scrfd_sees_what_insightface_shows_it(monkeypatch, height, width):
    session = Recorder(ANY, scrfds())
    monkeypatch.setattr(onnx_detectors, "_session", lambda file: session)
    photo = photo_of(face_photograph("hopper"))[:height, :width]
    assert DETECTORS["scrfd"].find(photo, 0.08).shape == (0, 14)
    tall = height > width
    inner = (640, int(640 / (height / width))) if tall else (int(640 * (height / width)), 640)
    boxed = np.zeros((640, 640, 3))
    boxed[: inner[0], : inner[1]] = resized(photo.astype(float), *inner)
    expected = ((boxed - 127.5) / 128).transpose(2, 0, 1)[None]
    assert session.seen.dtype == np.float32
    assert session.seen.shape == expected.shape
    assert np.abs(session.seen - expected).max() <= 1.01 / 128
    assert np.abs(session.seen[:, ::-1] - expected).max() > 0.1  # BGR would show


@pytest.mark.parametrize(
    ("shape", "photo", "inner", "sides"),
    [
        (ANY, PHOTO, (500, 400), (512, 416)),
        (ANY, np.tile(PHOTO, (2, 2, 1)), (640, 512), (640, 512)),
        (FIXED, PHOTO, (500, 400), (640, 640)),
        ([1, 3, 320, 320], PHOTO, (320, 256), (320, 320)),
    ],
)
def test_yunet_sees_what_opencv_shows_it(monkeypatch, shape, photo, inner, sides):
    session = Recorder(shape, yunets())
    monkeypatch.setattr(onnx_detectors, "_session", lambda file: session)
    assert DETECTORS["yunet"].find(photo, 0.08).shape == (0, 14)
    assert session.seen.shape == (1, 3, *sides)
    boxed = np.zeros((*sides, 3))
    boxed[: inner[0], : inner[1]] = resized(photo.astype(float), *inner)
    expected = boxed[:, :, ::-1].transpose(2, 0, 1)[None]
    assert np.abs(session.seen - expected).max() <= (0 if inner == photo.shape[:2] else 1.01)


def test_scrfds_decoder_is_the_double_loop():
    random = np.random.default_rng(0)
    outputs = [random.random((2 * CELLS[s], 1)) * 0.502 for s in CELLS]
    outputs += [random.normal(size=(2 * CELLS[s], n)) for n in (4, 10) for s in CELLS]
    expected = []
    for level, stride in enumerate(CELLS):
        for row in range(640 // stride):
            for column in range(640 // stride):
                for anchor in (0, 1):
                    at = 2 * (row * (640 // stride) + column) + anchor
                    if outputs[level][at, 0] >= 0.5:
                        x, y, sides = column * stride, row * stride, stride * outputs[level + 3][at]
                        points = stride * outputs[level + 6][at] + [x, y] * 5
                        face = [x - sides[0], y - sides[1], x + sides[2], y + sides[3], *points]
                        expected.append((face, outputs[level][at, 0]))
    faces, scores = decode_scrfd(outputs, 640)
    assert len(faces) > 20
    assert np.allclose(faces, [face for face, _ in expected])
    assert np.allclose(scores, [score for _, score in expected])


def test_yunets_decoder_is_the_double_loop():
    random = np.random.default_rng(0)
    height, width = 320, 416
    cells = [(height // s, width // s) for s in CELLS]
    outputs = [1.2 * random.random((1, r * c, 1)) - 0.1 for _ in range(2) for r, c in cells]
    outputs += [random.normal(size=(1, r * c, n)) for n in (4, 10) for r, c in cells]
    expected = []
    for level, (stride, (rows, columns)) in enumerate(zip(CELLS, cells, strict=True)):
        for row in range(rows):
            for column in range(columns):
                at = row * columns + column
                one, other = (min(1, max(0, outputs[level + start][0, at, 0])) for start in (0, 3))
                if math.sqrt(one * other) >= 0.9:
                    box, points = outputs[level + 6][0, at], outputs[level + 9][0, at]
                    x, y = (column + box[0]) * stride, (row + box[1]) * stride
                    w, h = math.exp(box[2]) * stride, math.exp(box[3]) * stride
                    five = [(point + (column, row)[i % 2]) * stride for i, point in enumerate(points)]
                    expected.append(
                        ([x - w / 2, y - h / 2, x + w / 2, y + h / 2, *five], math.sqrt(one * other))
                    )
    faces, scores = decode_yunet(outputs, width)
    assert len(faces) > 20
    assert np.allclose(faces, [face for face, _ in expected])
    assert np.allclose(scores, [score for _, score in expected])


def test_overlapping_boxes_leave_the_best():
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 4], [20, 20, 30, 30], [20, 20, 29, 30]])
    kept = onnx_detectors._without_overlaps(boxes, np.array([0.8, 0.9, 0.7, 0.6, 0.6]), 0.4)
    assert kept.tolist() == [1, 3]  # the third shares 4/9 with the second
    kept = onnx_detectors._without_overlaps(boxes, np.array([0.8, 0.9, 0.7, 0.6, 0.6]), 0.45)
    assert kept.tolist() == [1, 2, 3]
    assert onnx_detectors._without_overlaps(np.empty((0, 4)), np.empty(0), 0.4).tolist() == []


# ---- the file -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["scrfd", "scrfd:small", "yunet"])
def test_a_detector_that_cannot_be_downloaded_is_a_sentence_before_anything_is_read(home, name):
    with pytest.raises(
        RunError, match=r"could not be downloaded .*copy that machine's cache of the hub here"
    ):
        find_backbone("dlib", "cpu", crop="align", detector=name)


def test_a_file_that_is_no_network_is_a_sentence(home):
    def write(path):
        path.write_text("version https://git-lfs.github.com/spec/v1")

    lay_in_hub(home, YUNET.repository, **{YUNET.names[0]: write})
    with pytest.raises(InputError, match=r"is no face detector .*delete it, and it is downloaded again"):
        FaceCrop("yunet", 112, 0, 0.08, "align")(PHOTO)


def test_the_digest_of_the_file_is_part_of_the_keys(home):
    def keys():
        lazy = find_backbone("dlib", "cpu", crop="align", detector="scrfd")
        return lazy.key, lazy.transform.versions

    lay_detector(home, SCRFD, scrfds(), FIXED)
    (before, versions), again = keys(), keys()
    assert again == (before, versions)
    file = SCRFD.find()
    file.write_bytes(file.read_bytes() + b"\0")
    assert keys()[0] != before
    assert keys()[1] != versions


@pytest.mark.parametrize("method", ["face", "align", "loose"])
def test_each_method_cuts_what_they_find(home, method):
    lay_detector(home, SCRFD, scrfds((32, 10, 11, 0, 0.9, [3, 3, 3, 3])), FIXED)
    seen = FaceCrop("scrfd", 112, 0.2, 0.08, method)(PHOTO)
    assert seen.face is True
    centre = np.array([11, 10]) * 25.0  # strides of 32 / 1.28 pixels
    box, points = np.concatenate([centre - 75, centre + 75]), centre + 25 * np.array(POINTS).reshape(5, 2)
    expected = {
        "face": lambda: cut_upright(PHOTO, box, 112, 0.2),
        "align": lambda: align(PHOTO, map_of_points(points, FIVE_POINTS, 112), 112),
        "loose": lambda: cut_loosely(PHOTO, box, 112, 0.2, "bilinear"),
    }[method]()
    assert np.abs(seen.pixels.transpose(1, 2, 0).astype(int) - expected).max() <= 1
    assert not FaceCrop("scrfd", 112, 0.2, 0.9, method)(PHOTO).face
