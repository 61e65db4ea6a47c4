"""JPEG files in; the network's inputs, decoded, resized and cropped by the GPU, out.

NVIDIA's nvJPEG decodes 24 000 photographs of 500 x 375 a second on an H100, where a core of the CPU decodes
690. Its pixels differ by a sixth of a grey level in the mean. It is called through torchcodec, where that is
installed, or through torchvision, whose decoder is deprecated since 0.29 in favour of torchcodec's.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from get_images import ImageFile, UnreadableImageError, read_bytes
from retrieval.backbones.transform import ModelInput
from retrieval.embedding.loader import Batch, Jpeg, Reader, named_jpeg, plain_jpeg
from retrieval.embedding.torch_runtime import cosines, embed_plainly

if TYPE_CHECKING:
    from torch import Tensor

    from retrieval.backbones.backbone import Backbone
    from retrieval.backbones.face_crop import FaceCrop
    from retrieval.backbones.transform import Transform

VERSION = 1  # part of the cache key: raise it when this moves pixels by more than rounding
SAMPLE = 32  # images on which the two decoders are compared
LEAST_COSINE = 0.999  # between the vectors of an image that the GPU decodes, and that the CPU decodes
PIXELS = 2**26  # of photographs decoded at a time: 200 MB, and four times as much to resize them

log = logging.getLogger("retrieval.runtime")


def can_decode(transform: Transform | FaceCrop) -> bool:
    """Return whether the transform can run on a GPU: of the face detectors only MTCNN can."""
    return not transform.detects_faces or transform.detector == "mtcnn"


@cache
def _library() -> Callable[..., list[Tensor]]:
    try:
        from torchcodec.decoders import decode_jpeg
    except (ImportError, OSError, RuntimeError):  # not installed, or for another version of torch
        from torchvision.io import decode_jpeg
    return decode_jpeg


def decode(jpegs: list[bytes], device: str) -> list[Tensor]:
    """Decode JPEG files on the device, to uint8 RGB (3, height, width). Raises RuntimeError if it cannot."""
    import torch

    sources = [torch.frombuffer(bytearray(jpeg), dtype=torch.uint8) for jpeg in jpegs]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecation
        if device == "cpu":  # in tests
            return _library()(sources, mode="RGB", device=device)
        # nvJPEG writes without waiting for this stream, where a network may still use memory that Python has
        # freed. So the photographs get memory of another stream, and keep it while this stream reads them.
        this, other = torch.cuda.current_stream(), _stream()
        with torch.cuda.stream(other):
            photos = _library()(sources, mode="RGB", device=device)
    this.wait_stream(other)
    for photo in photos:
        photo.record_stream(this)
    return photos


@cache
def _stream() -> Any:
    import torch

    return torch.cuda.Stream()


def decode_on_gpu(batch: Batch, transform: Transform | FaceCrop, device: str) -> int:
    """Decode the batch's JPEGs; its pixels are then on the device. Return how many it could decode.

    The CPU decodes what the GPU refuses, or has no memory for.
    """
    import torch

    pixels = torch.empty((len(batch.names), *batch.pixels.shape[1:]), dtype=torch.uint8, device=device)
    faces: list[bool | None] = [None] * len(batch.names)
    decoded = 0

    def _fill_in(rows: list[int], inputs: Tensor, found: list[bool | None]) -> None:
        if rows:  # most often all that follow one another: a slice needs no copy of the numbers to the GPU
            in_a_row = rows[-1] - rows[0] + 1 == len(rows)
            pixels[slice(rows[0], rows[-1] + 1) if in_a_row else rows] = inputs
        for row, face in zip(rows, found, strict=True):
            faces[row] = face

    def _decode(rows: list[int]) -> None:
        nonlocal decoded
        try:
            inputs, found = transform.on_gpu(decode([batch.jpegs[row].content for row in rows], device))
        except RuntimeError:
            if len(rows) > 1:  # find out which of them it is
                _decode(rows[: len(rows) // 2])
                _decode(rows[len(rows) // 2 :])
                return
            if by_cpu := _by_cpu(batch, rows[0], transform):
                _fill_in(rows, torch.from_numpy(by_cpu.pixels[None]).to(device), [by_cpu.face])
        else:
            decoded += len(rows)
            _fill_in(rows, inputs, found)

    others = [row for row in range(len(batch.names)) if row not in batch.jpegs]
    _fill_in(others, torch.from_numpy(batch.pixels).to(device), batch.faces)
    for rows in _parts(batch.jpegs):
        _decode(rows)
    kept = [row for row, name in enumerate(batch.names) if name not in batch.unreadable]
    batch.pixels, batch.jpegs = pixels if len(kept) == len(pixels) else pixels[kept], {}
    batch.names, batch.faces = [batch.names[row] for row in kept], [faces[row] for row in kept]
    return decoded


def _by_cpu(batch: Batch, row: int, transform: Transform | FaceCrop) -> ModelInput | None:
    """Return the network's input for one of the batch's JPEGs; note there what is wrong with it."""
    name = batch.names[row]
    try:
        found, damage = Reader(transform).read(batch.jpegs[row].content)
    except UnreadableImageError as error:
        batch.unreadable[name] = str(error)
        return None
    if damage:
        batch.damaged[name] = damage
    return found


def _parts(jpegs: dict[int, Jpeg]) -> Iterator[list[int]]:
    """Yield the rows of JPEGs that have at most PIXELS together."""
    part, pixels = [], 0
    for row, jpeg in jpegs.items():
        if part and pixels + jpeg.pixels > PIXELS:
            yield part
            part, pixels = [], 0
        part.append(row)
        pixels += jpeg.pixels
    if part:
        yield part


def _is_plain_jpeg(file: ImageFile) -> bool:
    try:
        return named_jpeg(file) and plain_jpeg(read_bytes(file.path)) is not None
    except UnreadableImageError:
        return False


def keeps_vectors(files: Sequence[ImageFile], backbone: Backbone) -> bool | None:
    """Return whether the first JPEGs keep their vectors if the GPU decodes them; None if there is no JPEG.

    They are compared in full precision. With a face detector, the median of the cosines counts: a grey level
    can move a box by pixels. A log line says why, if the CPU is to decode.
    """
    jpegs = list(islice(filter(_is_plain_jpeg, files), SAMPLE))
    if not jpegs:
        return None
    transform = backbone.transform
    by_gpu = Reader(transform, leave_jpegs=True).read_group(jpegs)
    if decode_on_gpu(by_gpu, transform, backbone.device) < len(jpegs) / 2:
        log.info("the CPU decodes JPEGs, since the GPU cannot, or has no memory for them")
        return False
    by_cpu = Reader(transform).read_group([file for file in jpegs if file.name in by_gpu.names])
    vectors = [embed_plainly(backbone, batch.pixels) for batch in (by_gpu, by_cpu)]
    found = cosines(*vectors)
    cosine = np.median(found) if transform.detects_faces else found.min(initial=1.0)
    if not cosine >= LEAST_COSINE:  # also for NaN
        log.info("the CPU decodes JPEGs: decoded by the GPU, their vectors have cosines of %.4f", cosine)
    return bool(cosine >= LEAST_COSINE)
