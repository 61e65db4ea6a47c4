"""A photograph in; the input of a face network out: the largest and most central face, cropped or aligned."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

from retrieval.backbones import alignment, loose_crop
from retrieval.backbones.alignment import align, align_on_gpu, map_of_box, map_of_points
from retrieval.backbones.detectors import DETECTORS
from retrieval.backbones.loose_crop import cut_loosely, cut_loosely_on_gpu
from retrieval.backbones.transform import ModelInput
from retrieval.machine import require

if TYPE_CHECKING:
    from torch import Tensor

VERSIONS = {"align": alignment.VERSION, "loose": loose_crop.VERSION}  # of methods that are no detector's own


@dataclass(frozen=True)
class FaceCrop:
    """Detect and crop the face of a photograph. A face network has a FaceCrop instead of a Transform.

    A `method` is "face", the detector's own crop: dlib's is turned by five points, all others are upright;
    "align", by five points to the template of ArcFace's family; or "loose", a square with some background.
    """

    detector: str  # a row of DETECTORS
    size: int  # pixels of the crop's side
    margin: float  # the share of the crop's side that lies around the face's box, 0 to 1; not of "align"
    min_face_size: float  # the smallest face to look for, as a share of the photograph's longer side
    method: Literal["face", "align", "loose"] = "face"  # checkpoints of earlier versions lack it and the next
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"  # of "loose"
    detects_faces: ClassVar[bool] = True

    def __call__(self, image: np.ndarray) -> ModelInput:
        """Return the largest and most central face of a photograph, uint8 RGB (height, width, 3).

        Where no face is detected, the square in the centre is cropped in its place.
        """
        photo = image.copy()  # dlib accepts only contiguous strides, even for a single pixel
        faces = DETECTORS[self.detector].find(photo, self.min_face_size)
        face, found = self._choose(faces, photo.shape[:2])
        if self.method == "align":
            crop = align(photo, self._map(photo, face, found), self.size)
        elif self.method == "loose":
            crop = cut_loosely(photo, face[:4], self.size, self.margin, self.interpolation)
        else:
            crop = DETECTORS[self.detector].cut(photo, face[:4], self.size, self.margin)
        return ModelInput(np.ascontiguousarray(crop.transpose(2, 0, 1)), face=found)

    def on_gpu(self, photos: list[Tensor]) -> tuple[Tensor, list[bool]]:
        """Do as for an image for photographs (3, height, width) on a GPU, uint8; only MTCNN can.

        Return uint8 (photographs, 3, size, size) on the GPU, and `face` of ModelInput for each.
        """
        from retrieval.backbones.mtcnn import cut_faces, find_faces

        faces = find_faces(photos, self.min_face_size)
        chosen = [self._choose(each, photo.shape[1:]) for each, photo in zip(faces, photos, strict=True)]
        boxes = np.array([face[:4] for face, _ in chosen])
        if self.method == "align":
            maps = [self._map(photo, *face) for photo, face in zip(photos, chosen, strict=True)]
            crops = align_on_gpu(photos, np.array(maps), self.size)
        elif self.method == "loose":
            crops = cut_loosely_on_gpu(photos, boxes, self.size, self.margin, self.interpolation)
        else:
            crops = cut_faces(photos, boxes, self.size, self.margin)
        return crops, [found for _, found in chosen]

    def _choose(self, faces: np.ndarray, shape: tuple[int, int]) -> tuple[np.ndarray, bool]:
        """Return the row of the face to crop, or a box without one, and whether it is that of a face."""
        # A detector's boxes are accurate to a tenth of their side.
        large = (faces[:, 2:4] - faces[:, :2]).max(1) > 0.9 * self.min_face_size * max(shape)
        face = main_face(faces[large], shape)
        return (centre_box(shape), False) if face is None else (face, True)

    def _map(self, photo: np.ndarray | Tensor, face: np.ndarray, found: bool) -> np.ndarray:
        """Return the map (2, 3) from an aligned crop to the photograph; without a face the box is upright."""
        detector = DETECTORS[self.detector]
        if not found:
            return map_of_box(face, self.size)
        return map_of_points(detector.points(photo, face), detector.template, self.size)

    def fetch(self) -> None:
        """Download the detector's file if need be; call it before readers start. Raises as OnHub.fetch.

        Raises InputError if a package of the detector is not installed.
        """
        detector = DETECTORS[self.detector]
        for package, module in detector.packages.items():
            require(package, module)
        if detector.file:
            detector.file.fetch()

    @property
    def module(self) -> str:
        """Return the detector's module, which reader processes import when they start."""
        return next(iter(DETECTORS[self.detector].packages.values()))

    @property
    def versions(self) -> dict[str, int | str]:
        """Return the versions of the detector, its file and the method, for the cache key."""
        detector = DETECTORS[self.detector]
        versions = {f"face crop by {self.detector}": detector.version}
        if self.method in VERSIONS:
            versions[self.method] = VERSIONS[self.method]
        if detector.file:
            versions["file"] = hashlib.sha256(detector.file.fetch().read_bytes()).hexdigest()
        return versions

    @property
    def enough(self) -> None:
        """Return None: a small face needs every pixel of the file."""
        return None

    def of_size(self, size: int) -> FaceCrop:
        """Return the same crop for another input size."""
        return replace(self, size=size)


def main_face(faces: np.ndarray, shape: tuple[int, int]) -> np.ndarray | None:
    """Return the face with the largest area less twice its squared distance from the centre; None if none is.

    `faces` (faces, 4 or more) are rows of left, top, right, bottom, in pixels of a photograph of `shape`
    (height, width), and what else belongs to the face. The boxes are cut to the photograph first, and dropped
    if no pixel is left. The rule is facenet-pytorch's "center_weighted_size", with which its results on
    Labeled Faces in the Wild were measured.

    >>> boxes = np.array([[0, 0, 40, 40], [80, 80, 120, 120]])
    >>> main_face(boxes, (200, 200)).tolist()
    [80, 80, 120, 120]
    """
    height, width = shape
    inside = faces[:, :4].clip(0, [width, height, width, height])
    sides = inside[:, 2:].astype(int) - inside[:, :2].astype(int)
    faces, inside = faces[(sides > 0).all(1)], inside[(sides > 0).all(1)]
    if not len(faces):
        return None
    areas = (inside[:, 2:] - inside[:, :2]).prod(1)
    offsets = (inside[:, :2] + inside[:, 2:]) / 2 - [width / 2, height / 2]
    return faces[np.argmax(areas - 2 * (offsets**2).sum(1))]


def centre_box(shape: tuple[int, int]) -> np.ndarray:
    """Return the square in the centre of (height, width): half the shorter side wide, at least one pixel.

    >>> centre_box((100, 200)).tolist()
    [75, 25, 125, 75]
    """
    height, width = shape
    side = max(1, min(shape) // 2)
    left, top = (width - side) // 2, (height - side) // 2
    return np.array([left, top, left + side, top + side])
