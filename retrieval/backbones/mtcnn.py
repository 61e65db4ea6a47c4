"""Photographs on any device in; their faces as boxes and points, or cut out, out: many at once, for a GPU.

The detector is facenet-pytorch's MTCNN (Zhang et al., "Joint Face Detection and Alignment using Multi-task
Cascaded Convolutional Networks", 2016): its networks, weights, thresholds and rules. Its own code loops over
the candidates; here each step takes the candidates of all photographs of one shape at once.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from itertools import accumulate, groupby

import numpy as np
import torch
from facenet_pytorch import MTCNN
from facenet_pytorch.models.utils.detect_face import bbreg, nms_numpy, rerec
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torchvision.ops import batched_nms

SMALLEST = 20  # pixels of a face: facenet-pytorch's default
LONGEST = 500  # pixels of the photograph's longer side, unless smaller faces are asked for
GROUP_PIXELS = 2**23  # of the resized photographs processed at a time: some 1 GB of memory
CROP_PIXELS = 2**21  # of the crops in one pass of a network: at most some 1 GB of memory


@torch.inference_mode()
def find_faces(photos: list[Tensor], min_face_size: float) -> list[np.ndarray]:
    """Return the faces (faces, 14) of each photograph, float32, the largest first.

    `photos` are uint8 RGB (3, height, width) of any sizes, all on one device. `min_face_size` is the smallest
    face to look for, as a share of the longer side. A face is a box, then five points, in pixels of its
    photograph: left, top, right, bottom; x and y of the left eye, the right eye, the nose, the left and the
    right corner of the mouth, left and right as in the image. They are facenet-pytorch's up to rounding. In a
    resized photograph single pixels differ from Pillow's by a grey level, which can move a box by about a
    pixel.
    """
    shapes = [_resized_shape(*photo.shape[1:], min_face_size) for photo in photos]
    found: list[np.ndarray] = [np.empty((0, 14), np.float32)] * len(photos)
    by_shape = sorted(range(len(photos)), key=shapes.__getitem__)
    for shape, indices in groupby(by_shape, shapes.__getitem__):
        same, at_once = list(indices), max(1, GROUP_PIXELS // (shape[0] * shape[1]))
        for group in (same[start : start + at_once] for start in range(0, len(same), at_once)):
            small = torch.stack([_resized(photos[i], *shape) for i in group])
            smallest = max(SMALLEST, round(min_face_size * max(shape)))
            # In TF32, a GPU's default, boxes would move by up to four pixels.
            flags = {"enabled": True, "allow_tf32": False}
            with torch.backends.cudnn.flags(**flags) if small.is_cuda else nullcontext():
                faces_of_group = _cascade(small, smallest)
            for i, faces in zip(group, faces_of_group, strict=True):
                found[i] = faces * np.float32(max(photos[i].shape[1:]) / max(shape))
    return found


def _resized_shape(height: int, width: int, min_face_size: float) -> tuple[int, int]:
    """Return the (height, width) at which faces are looked for.

    >>> _resized_shape(3000, 4000, 0.08), _resized_shape(250, 250, 0.08)
    ((375, 500), (250, 250))
    """
    scale = min(1, max(LONGEST, SMALLEST / min_face_size) / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def _resized(photo: Tensor, height: int, width: int) -> Tensor:
    """Resize uint8 pixels (3, height, width) as Pillow does: rows, then columns, both rounded half up."""
    if photo.shape[1:] == (height, width):
        return photo
    pixels = photo[None].float()
    for shape in ((photo.shape[1], width), (height, width)):
        pixels = interpolate(pixels, shape, mode="bilinear", antialias=True).add_(0.5).floor_()
    return pixels[0].byte()


@cache
def _mtcnn(device: torch.device) -> MTCNN:
    mtcnn = MTCNN(device=device)
    for network in (mtcnn.pnet, mtcnn.rnet, mtcnn.onet):
        network.to(memory_format=torch.channels_last)  # like its inputs; pooling on a CPU is 6 times as fast
    return mtcnn


def _cascade(photos: Tensor, smallest: int) -> list[np.ndarray]:
    """Return the faces (faces, 14) of each of the photos (photos, 3, height, width), the largest first."""
    mtcnn, sums = _mtcnn(photos.device), _summed_areas(photos)
    faces = [np.empty((0, 16), np.float32)] * len(photos)
    boxes, owners = _propose(mtcnn, sums, smallest)
    if len(boxes):
        boxes, moves, scores, owners = _judge(mtcnn.rnet, 24, mtcnn.thresholds[1], sums, boxes, owners)
    if len(boxes):
        # batched_nms keeps photographs apart by large offsets, which need float64 and boxes from 0 upwards.
        kept = batched_nms((boxes - boxes.min()).double(), scores.double(), owners, 0.7)
        boxes, owners = rerec(bbreg(boxes[kept], moves[kept])), owners[kept]
        boxes, moves, scores, owners = _judge(mtcnn.onet, 48, mtcnn.thresholds[2], sums, boxes, owners)
    if len(boxes):
        points = _points(boxes, moves[:, 4:])  # first, since bbreg moves the boxes in place
        rows = torch.column_stack([bbreg(boxes, moves[:, :4]), points, scores, owners]).cpu().numpy()
        faces = [rows[rows[:, 15] == photo] for photo in range(len(photos))]
        faces = [face[nms_numpy(face, face[:, 14], 0.7, "Min")] if len(face) else face for face in faces]
    areas = [(face[:, 2:4].astype(float) - face[:, :2]).prod(1) for face in faces]
    return [face[np.argsort(area)[::-1], :14] for face, area in zip(faces, areas, strict=True)]


def _points(boxes: Tensor, shares: Tensor) -> Tensor:
    """Return x and y of five points (faces, 10) from ONet's five x and five y, shares of the boxes' sides."""
    first, sides = boxes[:, None, :2], (boxes[:, 2:] - boxes[:, :2] + 1)[:, None]
    return (sides * shares.view(-1, 2, 5).transpose(1, 2) + first - 1).flatten(1)


def _propose(mtcnn: MTCNN, sums: Tensor, smallest: int) -> tuple[Tensor, Tensor]:
    """Return PNet's candidates: boxes (candidates, 4), and the index of each one's photo (candidates,)."""
    photos, height, width = len(sums), sums.shape[1] - 1, sums.shape[2] - 1
    owners = torch.arange(photos, device=sums.device)
    whole = torch.zeros(photos, 4, device=sums.device)
    whole[:, 2], whole[:, 3] = width, height
    scales = _pyramid(min(height, width), smallest, mtcnn.factor)
    if not scales:
        return whole[:0], owners[:0]
    maps = []
    for scale in scales:
        rows, columns = int(height * scale + 1), int(width * scale + 1)
        moves, scores = mtcnn.pnet(_crops(sums, whole, owners, rows, columns))
        maps.append(torch.cat([scores[:, 1:], moves], 1))  # (photos, 5, rows, columns)

    # All levels in one tensor, since Python waits for the GPU at each nonzero.
    cells = torch.cat([level.flatten(2) for level in maps], 2)  # (photos, 5, cells)
    owners, cell = (cells[:, 0] >= mtcnn.thresholds[0]).nonzero(as_tuple=True)
    scores, moves = cells[owners, :, cell].tensor_split([1], 1)
    ends = list(accumulate(level.shape[2] * level.shape[3] for level in maps))
    boxes, levels = _boxes_of_cells(cell, ends, [level.shape[3] for level in maps], scales)
    kept = batched_nms(boxes, scores[:, 0], owners * len(scales) + levels, 0.5)
    kept = kept[batched_nms(boxes[kept], scores[kept, 0], owners[kept], 0.7)]
    boxes, moves = boxes[kept], moves[kept]
    return rerec(boxes + moves * (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)), owners[kept]


def _pyramid(side: int, smallest: int, factor: float) -> list[float]:
    """Return the scales at which faces of `smallest` pixels or more have PNet's 12 pixels."""
    scale = 12 / smallest
    scales, side = [], side * scale
    while side >= 12:
        scales.append(scale)
        scale, side = scale * factor, side * factor
    return scales


def _boxes_of_cells(
    cell: Tensor, ends: list[int], columns: list[int], scales: list[float]
) -> tuple[Tensor, Tensor]:
    """Return the boxes (cells, 4) that PNet saw in cells of its output maps, and each one's pyramid level.

    Cells are numbered from level to level, and row by row in a level. `ends` is each level's last number + 1.
    """
    table = torch.tensor([ends, [0, *ends[:-1]], columns, scales], dtype=torch.float64)
    ends, *table = table.to(cell.device, non_blocking=True)  # else Python waits for the GPU
    level = torch.bucketize(cell.double(), ends, right=True)
    start, columns, scale = (row[level] for row in table)
    y = ((cell - start) / columns).floor()
    corner = 2 * torch.stack([cell - start - y * columns, y], 1)  # PNet's stride is 2
    # Division by a tensor: a GPU multiplies by a number's inverse, which rounds otherwise than on a CPU.
    return (torch.cat([corner + 1, corner + 12], 1).float() / scale.float()[:, None]).floor(), level


def _judge(
    network: nn.Module, side: int, threshold: float, sums: Tensor, boxes: Tensor, owners: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the boxes that RNet or ONet accepts, how to move each one's sides, its score and its photo.

    With ONet, the five points (boxes, 10) follow in the columns after the moves (boxes, 4).
    """
    chunks = zip(boxes.split(CROP_PIXELS // side**2), owners.split(CROP_PIXELS // side**2), strict=True)
    outputs = [network(_crops(sums, *chunk, side, side)) for chunk in chunks]
    moves = torch.cat([torch.cat(output[:-1], 1) for output in outputs])
    scores = torch.cat([output[-1][:, 1] for output in outputs])
    passed = (scores > threshold).nonzero()[:, 0]
    return boxes[passed], moves[passed], scores[passed], owners[passed]


def _summed_areas(photos: Tensor) -> Tensor:
    """Return the sums (photos, height + 1, width + 1, 3) of all pixels above and left of each pixel's corner.

    In a large photograph int32 overflows. Differences of sums are still exact, since they wrap back.
    """
    count, channels, height, width = photos.shape
    sums = torch.zeros(count, height + 1, width + 1, channels, dtype=torch.int32, device=photos.device)
    sums[:, 1:, 1:] = photos.cumsum(3, dtype=torch.int32).cumsum(2, dtype=torch.int32).permute(0, 2, 3, 1)
    return sums


def _crops(sums: Tensor, boxes: Tensor, owners: Tensor, rows: int, columns: int) -> Tensor:
    """Return the boxes' pixels, averaged to (boxes, 3, rows, columns) by adaptive_avg_pool2d's rule."""
    height, width = sums.shape[1] - 1, sums.shape[2] - 1
    left, top, right, bottom = boxes.long().unbind(1)
    # The rule of facenet-pytorch: boxes count pixels from 1. A box outside the photograph gets a pixel of it.
    left, top = (left - 1).clamp(0, width - 1), (top - 1).clamp(0, height - 1)
    right, bottom = right.clamp(max=width).maximum(left + 1), bottom.clamp(max=height).maximum(top + 1)
    above, below = _bins(top, bottom, rows)
    before, after = _bins(left, right, columns)

    def corner(y: Tensor, x: Tensor) -> Tensor:
        """Return the sums (boxes, rows, columns, 3) at y (boxes, rows) and x (boxes, columns)."""
        flat = (owners[:, None, None] * (height + 1) + y[:, :, None]) * (width + 1) + x[:, None, :]
        # On a CPU three times as fast as sums[owners, y, x].
        return sums.view(-1, 3).index_select(0, flat.flatten()).view(*flat.shape, 3)

    total = corner(below, after) - corner(above, after) - corner(below, before) + corner(above, before)
    means = total.float() / (below - above)[:, :, None, None] / (after - before)[:, None, :, None]
    return (means.permute(0, 3, 1, 2) - 127.5) * 0.0078125


def _bins(start: Tensor, end: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the first pixels and the ends of `count` bins, (boxes, count) each, between `start` and `end`.

    >>> [bins.tolist() for bins in _bins(torch.tensor([10]), torch.tensor([15]), 3)]  # they may overlap
    [[[10, 11, 13]], [[12, 14, 15]]]
    """
    places, length = torch.arange(count + 1, device=start.device), (end - start)[:, None]
    first = places[:-1] * length // count
    return start[:, None] + first, start[:, None] - (-places[1:] * length // count)


@torch.inference_mode()
def cut_faces(photos: list[Tensor], boxes: np.ndarray, size: int, margin: float) -> Tensor:
    """Crop one box (4,) of each photograph with its margin to (photos, 3, size, size), as facenet-pytorch.

    The photographs are uint8 (3, height, width) on one device, and so is the result. The pixels differ from
    those of its `extract_face` by at most one grey level.
    """
    boxes = boxes.astype(np.float64)  # Python's numbers, with which facenet-pytorch computes
    around = margin * size * (boxes[:, 2:] - boxes[:, :2]) / (size - margin * size) / 2
    first = (boxes[:, :2] - around).clip(0).astype(int)
    limits = [photo.shape[:0:-1] for photo in photos]  # (width, height)
    end = np.minimum(boxes[:, 2:] + around, limits).astype(int)
    places = zip(photos, first.tolist(), end.tolist(), strict=True)
    # In one pass: Pillow does either the rows or the columns of a face first, by a rule of its own.
    crops = (photo[None, :, y:y2, x:x2].float() for photo, (x, y), (x2, y2) in places)
    crops = [interpolate(crop, (size, size), mode="bilinear", antialias=True) for crop in crops]
    return torch.cat(crops).add_(0.5).byte()
