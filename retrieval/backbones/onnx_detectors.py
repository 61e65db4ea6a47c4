"""A photograph in; its faces as boxes and points, by a detector that is an ONNX file, out.

SCRFD (Guo et al., "Sample and Computation Redistribution for Efficient Face Detection", 2022) is run as in
InsightFace's scrfd.py, and YuNet (Wu et al., "YuNet: A Tiny Millisecond-level Face Detector", 2023) as in
OpenCV's FaceDetectorYN. Both have outputs for cells of 8, 16 and 32 pixels. ONNX Runtime runs them in one
thread, since the reader processes run side by side.

A face is a row of 14 numbers, in pixels: left, top, right, bottom; x and y of the left eye, the right eye,
the nose, the left and the right corner of the mouth, left and right as in the image.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from retrieval.backbones.onnx_session import open_session
from retrieval.backbones.weights import OnHub
from retrieval.errors import InputError

STRIDES = (8, 16, 32)
SIDE = 640  # pixels of the input, where the file takes any size
BY_HAND = "copy that machine's cache of the hub here"
SCRFD = OnHub("immich-app/buffalo_l", ("detection/model.onnx",), BY_HAND, "5838f7fe053675b1")  # SCRFD-10G
SCRFD_SMALL = OnHub("immich-app/buffalo_s", ("detection/model.onnx",), BY_HAND)  # SCRFD-500M
YUNET = OnHub("opencv/face_detection_yunet", ("face_detection_yunet_2023mar.onnx",), BY_HAND)
SCRFD_SCORE, SCRFD_OVERLAP = 0.5, 0.4  # InsightFace's defaults
YUNET_SCORE, YUNET_OVERLAP = 0.9, 0.3  # FaceDetectorYN's defaults


@cache
def _session(file: OnHub) -> Any:
    """Open a detector's file, once in each process. Raises InputError if it is another kind of file."""
    path, outputs = file.find(), 12 if file is YUNET else 9
    try:
        session = open_session(path)
        if len(session.get_outputs()) != outputs:
            raise ValueError(f"it has not {outputs} outputs")
        return session
    except Exception as error:  # ONNX Runtime's errors have no common class
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"{path} is no face detector ({reason}): delete it, and it is downloaded again"
        ) from None


def _input_sides(session: Any) -> tuple[int, int] | None:
    """Return the height and width of a network's input; None if it takes any."""
    height, width = session.get_inputs()[0].shape[2:]
    return (height, width) if isinstance(height, int) and isinstance(width, int) else None


def _fitted(shape: tuple[int, int], sides: tuple[int, int]) -> tuple[int, int]:
    """Return the height and width of a photograph of `shape` that just fits into `sides`.

    >>> _fitted((250, 500), (640, 640))
    (320, 640)
    """
    (height, width), (rows, columns) = shape, sides
    if height * columns > width * rows:
        return rows, max(1, rows * width // height)
    return max(1, columns * height // width), columns


def _letterboxed(photo: np.ndarray, inner: tuple[int, int], sides: tuple[int, int]) -> np.ndarray:
    """Resize a photograph to `inner`, at the top left of a black image of `sides`, both (height, width).

    As cv2.resize, it interpolates between four pixels, without antialiasing.
    """
    scaled = photo
    if inner != photo.shape[:2]:
        scales = photo.shape[1] / inner[1], 0, 0, 0, photo.shape[0] / inner[0], 0
        method, bilinear = Image.Transform.AFFINE, Image.Resampling.BILINEAR
        scaled = np.asarray(Image.fromarray(photo).transform(inner[::-1], method, scales, bilinear))
    boxed = np.zeros((*sides, 3), np.uint8)
    boxed[: inner[0], : inner[1]] = scaled
    return boxed


def _blob(image: np.ndarray) -> np.ndarray:
    """Turn pixels (height, width, 3) into a network's input (1, 3, height, width) float32."""
    return np.ascontiguousarray(image.transpose(2, 0, 1)[None], np.float32)


def _without_overlaps(boxes: np.ndarray, scores: np.ndarray, most: float) -> np.ndarray:
    """Return the indices of the boxes (boxes, 4) that overlap no better one, the best first.

    Two boxes overlap if their intersection over their union is larger than `most`.
    """
    order, kept = np.argsort(-scores, kind="stable"), []
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    while len(order):
        best, others = order[0], order[1:]
        kept.append(best)
        first, end = (
            np.maximum(boxes[best, :2], boxes[others, :2]),
            np.minimum(boxes[best, 2:], boxes[others, 2:]),
        )
        shared = (end - first).clip(0).prod(1)
        order = others[shared <= most * (areas[best] + areas[others] - shared)]
    return np.array(kept, int)


# ---- SCRFD ----------------------------------------------------------------------------------------


def find_by_scrfd(photo: np.ndarray, _: float, file: OnHub) -> np.ndarray:
    """Return the faces (faces, 14) of a photograph (height, width, 3), uint8 RGB, by SCRFD.

    The smallest face is ignored, since SCRFD looks for all sizes at once.
    """
    session = _session(file)
    sides = _input_sides(session) or (SIDE, SIDE)
    inner = _fitted(photo.shape[:2], sides)  # smaller photographs are enlarged
    blob = (_blob(_letterboxed(photo, inner, sides)) - 127.5) / 128
    outputs = session.run(None, {session.get_inputs()[0].name: blob})
    faces, scores = decode_scrfd(outputs, sides[1])
    faces *= photo.shape[0] / inner[0]
    return faces[_without_overlaps(faces[:, :4] + [0, 0, 1, 1], scores, SCRFD_OVERLAP)]


def decode_scrfd(outputs: list[np.ndarray], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the faces (faces, 14), in pixels of an input `width` pixels wide, and their scores (faces,).

    The outputs are, each for three strides: the score, the distances of the box's four sides from the cell's
    corner, and the five points as seen from there. The unit of length is the stride. A cell has two rows.
    """
    faces, scores = [], []
    for level, stride in enumerate(STRIDES):
        score, sides, points = (
            outputs[level + start].reshape(-1, n) for start, n in ((0, 1), (3, 4), (6, 10))
        )
        good = (score[:, 0] >= SCRFD_SCORE).nonzero()[0]
        rows, columns = np.divmod(good // 2, width // stride)
        cell = stride * np.stack([columns, rows], 1)  # (faces, x and y)
        sides, points = stride * sides[good], stride * points[good]
        faces.append(np.hstack([cell - sides[:, :2], cell + sides[:, 2:], np.tile(cell, 5) + points]))
        scores.append(score[good, 0])
    return np.concatenate(faces), np.concatenate(scores)


# ---- YuNet ----------------------------------------------------------------------------------------


def find_by_yunet(photo: np.ndarray, _: float, file: OnHub) -> np.ndarray:
    """Return the faces (faces, 14) of a photograph (height, width, 3), uint8 RGB, by YuNet, of all sizes.

    YuNet was trained on faces of about 10 to 300 pixels, so a photograph of more than 640 pixels is reduced.
    """
    session = _session(file)
    fixed = _input_sides(session)
    most, inner = fixed or (SIDE, SIDE), photo.shape[:2]
    if inner[0] > most[0] or inner[1] > most[1]:
        inner = _fitted(inner, most)
    sides = fixed or tuple(-(-length // 32) * 32 for length in inner)
    blob = _blob(_letterboxed(photo, inner, sides)[:, :, ::-1])  # BGR, 0 to 255
    names = [f"{kind}_{stride}" for kind in ("cls", "obj", "bbox", "kps") for stride in STRIDES]
    faces, scores = decode_yunet(session.run(names, {session.get_inputs()[0].name: blob}), sides[1])
    whole = np.hstack([faces[:, :2].astype(int), (faces[:, 2:4] - faces[:, :2]).astype(int)])  # as OpenCV
    whole[:, 2:] += whole[:, :2]
    return faces[_without_overlaps(whole, scores, YUNET_OVERLAP)] * (max(photo.shape[:2]) / max(inner))


def decode_yunet(outputs: list[np.ndarray], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the faces (faces, 14), in pixels of an input `width` pixels wide, and their scores (faces,).

    The outputs are, each for three strides: the score of a face, that of an object, the box (its centre as
    seen from the cell's corner, and the logarithms of its sides), and the five points as seen from there. The
    unit of length is the stride.
    """
    faces, scores = [], []
    for level, stride in enumerate(STRIDES):
        face, thing, box, points = (
            outputs[level + start].reshape(-1, n) for start, n in ((0, 1), (3, 1), (6, 4), (9, 10))
        )
        score = np.sqrt(face.clip(0, 1) * thing.clip(0, 1))[:, 0]
        good = (score >= YUNET_SCORE).nonzero()[0]
        rows, columns = np.divmod(good, width // stride)
        cell = np.stack([columns, rows], 1)  # (faces, x and y)
        centre, half = cell + box[good, :2], np.exp(box[good, 2:]) / 2
        faces.append(stride * np.hstack([centre - half, centre + half, np.tile(cell, 5) + points[good]]))
        scores.append(score[good])
    return np.concatenate(faces), np.concatenate(scores)
