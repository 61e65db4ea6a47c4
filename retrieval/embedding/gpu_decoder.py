"""JPEG files in; the network's inputs, decoded, resized and cropped by the GPU, out.

NVIDIA's nvJPEG decodes 24 000 photographs of 500 x 375 a second on an H100, where a core of the CPU decodes
690. Its pixels differ by a sixth of a grey level in the mean. It is called through torchcodec, where that is
installed, or through torchvision, whose decoder is deprecated since 0.29 in favour of torchcodec's.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from get_images import ImageFile
from retrieval.embedding.loader import Batch, Jpeg, Reader
from retrieval.embedding.torch_runtime import cosines, embed_plainly

if TYPE_CHECKING:
    from torch import Tensor

    from retrieval.backbones.backbone import Backbone
    from retrieval.backbones.face_crop import FaceCrop
    from retrieval.backbones.transform import Transform

VERSION = 1  # part of the cache key: raise it when this moves pixels by more than rounding
SAMPLE = 32  # images on which the two decoders are compared
LEAST_COSINE = 0.999  # between the vectors of an image that the GPU decodes, and that the CPU decodes
PIXELS = 2**25  # of photographs that are decoded at a time: 100 MB, and four times as much to resize them

log = logging.getLogger("retrieval.runtime")


def can_decode(transform: Transform | FaceCrop) -> bool:
    """Return whether the transform can run on a GPU: dlib's detector cannot."""
    return not transform.detects_faces or transform.detector == "mtcnn"


def decode(jpegs: list[bytes], device: str) -> list[Tensor]:
    """Decode JPEG files on the device, to uint8 RGB (3, height, width). Raises RuntimeError if it cannot."""
    import torch

    sources = [torch.frombuffer(bytearray(jpeg), dtype=torch.uint8) for jpeg in jpegs]
    try:
        from torchcodec.decoders import decode_jpeg
    except (ImportError, OSError, RuntimeError):  # not installed, or for another version of torch
        from torchvision.io import decode_jpeg
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecation
        return decode_jpeg(sources, mode="RGB", device=device)


def decode_on_gpu(batch: Batch, transform: Transform | FaceCrop, device: str) -> None:
    """Decode the batch's JPEGs; its pixels are then on the device. The CPU decodes what the GPU refuses."""
    import torch

    pixels = torch.empty((len(batch.names), *batch.pixels.shape[1:]), dtype=torch.uint8, device=device)
    faces: list[bool | None] = [None] * len(batch.names)

    def _fill_in(rows: list[int], inputs: Tensor, found: list[bool | None]) -> None:
        pixels[rows] = inputs
        for row, face in zip(rows, found, strict=True):
            faces[row] = face

    others = [row for row in range(len(batch.names)) if row not in batch.jpegs]
    _fill_in(others, torch.from_numpy(batch.pixels).to(device), batch.faces)
    for rows in _parts(batch.jpegs):
        try:
            photos = decode([batch.jpegs[row].content for row in rows], device)
        except RuntimeError:
            by_cpu = Reader(transform).read_group(
                [ImageFile(batch.names[row], batch.jpegs[row].path) for row in rows]
            )
            batch.unreadable |= by_cpu.unreadable
            rows = [row for row in rows if batch.names[row] not in by_cpu.unreadable]
            _fill_in(rows, torch.from_numpy(by_cpu.pixels).to(device), by_cpu.faces)
        else:
            _fill_in(rows, *transform.on_gpu(photos))
    kept = [row for row, name in enumerate(batch.names) if name not in batch.unreadable]
    batch.names, batch.faces = [batch.names[row] for row in kept], [faces[row] for row in kept]
    batch.pixels, batch.jpegs = pixels if len(kept) == len(pixels) else pixels[kept], {}


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


def is_worth_it(files: list[ImageFile], backbone: Backbone) -> bool:
    """Return whether the GPU should decode: most of the first files are JPEGs, and keep their vectors.

    These are compared in full precision. With a face detector, the median of the cosines counts: a grey level
    can move a box by pixels. A log line says why, if the GPU cannot decode.
    """
    files, transform, device = files[:SAMPLE], backbone.transform, backbone.device
    by_gpu = Reader(transform, leave_jpegs=True).read_group(files)
    if 2 * len(by_gpu.jpegs) < len(files):
        return False
    try:
        decode([jpeg.content for jpeg in by_gpu.jpegs.values()], device)
    except RuntimeError as error:
        log.info("the CPU decodes JPEGs, since the GPU cannot: %s", str(error).partition("\n")[0])
        return False
    decode_on_gpu(by_gpu, transform, device)
    by_cpu = Reader(transform).read_group(files)
    vectors = [embed_plainly(backbone, batch.pixels) for batch in (by_gpu, by_cpu)]
    found = cosines(*vectors)
    cosine = np.median(found) if transform.detects_faces else found.min(initial=1.0)
    if not cosine >= LEAST_COSINE:  # also for NaN
        log.info("the CPU decodes JPEGs: decoded by the GPU, their vectors have cosines of %.4f", cosine)
    return bool(cosine >= LEAST_COSINE)
