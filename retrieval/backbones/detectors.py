"""A photograph in; the faces in it, by one of five detectors, out; and how each crops a face.

To add a detector: write how it finds faces, and give it a row in DETECTORS.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from retrieval.backbones.alignment import FIVE_POINTS
from retrieval.backbones.onnx_detectors import SCRFD, SCRFD_SMALL, YUNET, find_by_scrfd, find_by_yunet
from retrieval.backbones.weights import InPackage, OnHub

# ---- MTCNN ----------------------------------------------------------------------------------------


def find_by_mtcnn(photo: np.ndarray, min_face_size: float) -> np.ndarray:
    """Return faces (faces, 14) by MTCNN."""
    import torch

    from retrieval.backbones.mtcnn import find_faces

    return find_faces([torch.from_numpy(photo).permute(2, 0, 1)], min_face_size)[0]


def cut_upright(photo: np.ndarray, box: np.ndarray, size: int, margin: float) -> np.ndarray:
    """Crop the box and its margin, upright and cut to the photograph, as facenet-pytorch does."""
    from facenet_pytorch import extract_face

    crop = extract_face(Image.fromarray(photo), box, image_size=size, margin=margin * size)
    return crop.permute(1, 2, 0).numpy().astype(np.uint8)  # whole numbers already


def own_points(_: np.ndarray, face: np.ndarray) -> np.ndarray:
    """Return the points (5, 2) that a detector finds together with the box, from a face's row (14,)."""
    return face[4:].reshape(5, 2)


# ---- dlib -----------------------------------------------------------------------------------------

DLIB_SMALLEST = 80  # pixels: the size of face that dlib's detector was trained for
DLIB_MODELS = "face-recognition-models", "face_recognition_models"  # the package, and the module in it
LANDMARKS = InPackage(*DLIB_MODELS, "models/shape_predictor_5_face_landmarks.dat")


# dlib's template: the outer and inner corner of the eye on the right in the image, those of the other eye,
# and the base of the nose. They are the means of dlib's points in the crop that MTCNN's points align, over
# the 2320 of 2725 photographs of Labeled Faces in the Wild in which both detectors find one face, the same.
# The standard deviations are 1.5 to 2.5 pixels; the means of two halves differ by at most 0.12.
DLIB_POINTS = np.array([[78.98, 52.29], [65.40, 52.81], [30.95, 52.65], [44.53, 52.94], [55.19, 79.14]])


@cache
def _dlib() -> tuple[Any, Any]:
    """Return the face detector and the predictor of five landmarks."""
    import dlib

    return dlib.get_frontal_face_detector(), dlib.shape_predictor(str(LANDMARKS.fetch()))


def _landmarks(photo: np.ndarray, box: np.ndarray) -> Any:
    """Return dlib.full_object_detection of the face in a box (4,)."""
    import dlib

    _, predict = _dlib()
    left, top, right, bottom = (round(float(x)) for x in box)
    return predict(photo, dlib.rectangle(left, top, right - 1, bottom - 1))


def _resized(photo: np.ndarray, side: float) -> np.ndarray:
    """Resize a photograph (height, width, 3) to a longer side of `side` pixels."""
    scale = side / max(photo.shape[:2])
    if scale == 1:
        return photo
    height, width = (max(1, round(length * scale)) for length in photo.shape[:2])
    return np.array(Image.fromarray(photo).resize((width, height), Image.Resampling.BILINEAR))


def find_by_dlib(photo: np.ndarray, min_face_size: float) -> np.ndarray:
    """Return boxes (faces, 4) by dlib's HOG detector.

    If it finds none, the photograph is enlarged twice, then four times; the last finds `min_face_size`.
    """
    detect, _ = _dlib()
    longest = max(photo.shape[:2])
    first = min(longest, DLIB_SMALLEST / 4 / min_face_size)
    for side in (first, 2 * first, 4 * first):
        boxes = [[r.left(), r.top(), r.right() + 1, r.bottom() + 1] for r in detect(_resized(photo, side))]
        if boxes:
            return np.array(boxes) * (longest / side)
    return np.empty((0, 4))


def cut_by_dlib(photo: np.ndarray, box: np.ndarray, size: int, margin: float) -> np.ndarray:
    """Crop dlib's face chip: rotated and scaled by five landmarks, black beyond the photograph's edge."""
    import dlib

    return dlib.get_face_chip(photo, _landmarks(photo, box), size=size, padding=margin / (1 - margin) / 2)


def points_by_dlib(photo: np.ndarray, face: np.ndarray) -> np.ndarray:
    """Return five points (5, 2) of a face (4,): the corners of both eyes, and the base of the nose."""
    return np.array([[point.x, point.y] for point in _landmarks(photo, face).parts()])


# ---- the table ------------------------------------------------------------------------------------

Find = Callable[[np.ndarray, float], np.ndarray]


class Detector(NamedTuple):
    """What finds faces in a photograph (height, width, 3), uint8 RGB."""

    find: Find  # and the smallest face, as a share of the longer side → boxes (faces, 4), or (faces, 14)
    points: Callable[[np.ndarray, np.ndarray], np.ndarray]  # and a face's row → five points (5, 2)
    template: np.ndarray  # where these points (5, 2) lie in an aligned face of 112 pixels
    cut: Callable[[np.ndarray, np.ndarray, int, float], np.ndarray]  # and box, size, margin → (size, size, 3)
    packages: dict[str, str]  # pip's name → module; first the detector's
    version: int = 1  # part of the cache key: raise it when boxes, points or crops move by more than rounding
    file: OnHub | None = None  # of weights


def _onnx_row(find: Callable[[np.ndarray, float, OnHub], np.ndarray], file: OnHub) -> Detector:
    packages = {"onnxruntime": "onnxruntime"} | FACENET  # the second to cut upright
    return Detector(partial(find, file=file), own_points, FIVE_POINTS, cut_upright, packages, file=file)


FACENET = {"facenet-pytorch": "facenet_pytorch"}
DLIB = dict([("dlib-bin", "dlib"), DLIB_MODELS])
DETECTORS = {
    "mtcnn": Detector(find_by_mtcnn, own_points, FIVE_POINTS, cut_upright, FACENET),
    "dlib": Detector(find_by_dlib, points_by_dlib, DLIB_POINTS, cut_by_dlib, DLIB),
    "scrfd": _onnx_row(find_by_scrfd, SCRFD),
    "scrfd:small": _onnx_row(find_by_scrfd, SCRFD_SMALL),
    "yunet": _onnx_row(find_by_yunet, YUNET),
}
