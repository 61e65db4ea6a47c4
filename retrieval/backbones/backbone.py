"""A word in; a network together with the transform it was trained with out.

python -m retrieval.backbones                           # the words, and whose weights are on this machine
python -m retrieval.backbones --fetch simclr facenet    # download theirs ahead of the day
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrieval.backbones.face_crop import DETECTORS, FaceCrop
from retrieval.backbones.timm_zoo import find_timm, hub_config
from retrieval.backbones.transform import Transform
from retrieval.backbones.zoo import ALIASES, FACES, PRETRAINED, Pretrained, known_word
from retrieval.errors import InputError, RunError
from retrieval.machine import keep_freed_memory, out_of_memory, require, version_of

if TYPE_CHECKING:
    from torch import Tensor, nn

# The code and the packages that decide what vector an image gets.
CODE = ("get_images.py", *(f"retrieval/{room}.py" for room in (
    "backbones/transform", "backbones/face_crop", "backbones/dlib_network", "backbones/backbone",
    "embedding/loader", "embedding/runtime", "embedding/embed", "backbones/zoo", "backbones/timm_zoo",
    "backbones/weights", "backbones/fine_tuned", "backbones/batch_norm_folding",
    "embedding/onnx_runtime")))  # fmt: skip
PACKAGES = ("torch", "torchvision", "timm", "onnxruntime", "onnxruntime-gpu", "onnx", "numpy", "pillow",
            "facenet-pytorch", "dlib-bin", "face-recognition-models")  # fmt: skip
ACCELERATORS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # Linux's files of NVIDIA's, AMD's, Windows' GPUs

log = logging.getLogger("retrieval.backbones")


@dataclass(frozen=True)
class Trained:
    """What a fine-tuned network knows of its training."""

    joined: bool  # whether the first half of its embedding is the untuned network's
    untuned: dict[str, Any]  # the untuned network's figures on validation
    history: list[dict[str, Any]]  # the loss and the figures of each epoch


@dataclass(frozen=True)
class Backbone:
    """A network and what must happen to an image before it: the two never travel apart."""

    network: nn.Module  # (images, 3, size, size) float32, normalised → (images, dimension)
    dimension: int
    prepare: Transform | FaceCrop  # uint8 RGB (height, width, 3) → Square; runs in readers
    mean: tuple[float, float, float]  # of R, G, B, as shares of white
    std: tuple[float, float, float]
    word: str = ""
    device: str = "cpu"
    trained: Trained | None = None  # None: not fine-tuned

    def embed(self, images: Tensor) -> Tensor:
        """uint8 RGB (images, 3, size, size) → float32 (images, dimension), not yet of unit length."""
        import torch

        return self.features(images.to(self.device, memory_format=torch.channels_last).float(), white=255)

    def features(self, pixels: Tensor, white: float = 1.0) -> Tensor:
        """As embed, from float32 pixels on the device, 0 to `white`."""
        import torch

        mean, std = (torch.tensor(v, device=self.device).view(3, 1, 1) for v in (self.mean, self.std))
        scale = 1 / (white * std)  # (pixels / white - mean) / std in two operations instead of three
        return self.network(pixels * scale - white * mean * scale).float()


@dataclass(frozen=True)
class Unloaded:
    """A backbone whose network is not loaded: what was embedded before needs none."""

    word: str
    prepare: Transform | FaceCrop
    device: str
    digest: bytes  # of all that decides what vector an image gets
    load: Callable[[], Backbone]
    trained: Trained | None = None


def find_backbone(
    word: str,
    device: str = "auto",
    weights: Path | None = None,
    crop: str = "auto",
    image_size: int | None = None,
    face_margin: float | None = None,
    min_face_size: float | None = None,
) -> Unloaded:
    """The pretrained backbone that `word` names, its weights downloaded if need be, not loaded.

    `weights` takes the place of its own file. `crop` is face, none, or auto: what the word is for. The other
    three take the place of what the word was trained with: the side in pixels of the square it sees, the
    share of it around a face's box, and the smallest face as a share of the photograph's longer side.

    Raises InputError for an unknown word or a device that is not there, RunError if the weights cannot be
    downloaded. Its `load` raises InputError for weights that do not fit, RunError if the device has no room.
    """
    device = choose_device(device)
    row = find_word(word)
    prepare = _choose_prepare(row, crop, image_size, face_margin, min_face_size)
    file = weights or row.weights.fetch()

    def load() -> Backbone:
        network = row.network(file)
        backbone = place(Backbone(network, row.dimension or 0, prepare, row.mean, row.std, word, device))
        if row.dimension not in (None, backbone.dimension):
            raise InputError(f"{word} gives {backbone.dimension} numbers an image instead of {row.dimension}")
        return backbone

    told = word, prepare, row.mean, row.std, hub_config(word)
    return Unloaded(word, prepare, device, digest_of(file, device, told), load)


def load_backbone(word: str, device: str = "auto", *others: Any, **more: Any) -> Backbone:
    """What find_backbone finds, in inference mode on its device. Raises as both."""
    return find_backbone(word, device, *others, **more).load()


def digest_of(file: Path | None, *told: object) -> bytes:
    """The digest of what decides a vector: a file of weights, what is told, our code, and the packages."""
    digest = hashlib.sha256(repr((told, [version_of(package) for package in PACKAGES])).encode())
    root = Path(__file__).parent.parent.parent
    for part in ([file] if file else []) + [root / code for code in CODE]:
        with open(part, "rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.digest()


def place(backbone: Backbone) -> Backbone:
    """The backbone in inference mode on its device, with the dimension that one image shows.

    Raises RunError if the device has no room for it, InputError if it gives no vector for an image.
    """
    import torch

    if backbone.device == "cpu":
        keep_freed_memory()
    # channels_last: ×1.8 on the CPU for depthwise networks, and what tensor cores want.
    try:
        backbone.network.eval().to(backbone.device, memory_format=torch.channels_last)
        numbers = _numbers_of_one_image(backbone)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise RunError(
            f"{backbone.device} has no room for {backbone.word}: free its memory, or use --device cpu"
        ) from None
    if len(numbers) != 1:
        raise InputError(f"{backbone.word} gives {numbers} numbers an image: it is no network for embeddings")
    return replace(backbone, dimension=numbers[0])


def find_word(word: str) -> Pretrained:
    """The row of a word. Raises InputError for an unknown one."""
    known_word(word)
    if word.startswith("timm:"):
        return find_timm(word.removeprefix("timm:"))
    return PRETRAINED[ALIASES.get(word, word)]


def _choose_prepare(
    row: Pretrained, crop: str, size: int | None, margin: float | None, min_face_size: float | None
) -> Transform | FaceCrop:
    size = size or row.transform.size
    if crop == "auto" and row.good_for == FACES and not row.face:
        log.warning("this is a face network, but sees whole images: --crop face cuts the faces out")
    if crop == "none" or (crop == "auto" and not row.face):
        if margin is not None or min_face_size is not None:
            log.warning("no face is cut out, so that --face_margin and --min_face_size change nothing")
        return row.transform.of_size(size)
    face = row.face or FaceCrop("mtcnn", size, margin=0.2, min_face_size=0.08)
    for package, module in DETECTORS[face.detector].packages.items():
        require(package, module)
    margin = face.margin if margin is None else margin
    return FaceCrop(face.detector, size, margin, min_face_size or face.min_face_size)


def _numbers_of_one_image(backbone: Backbone) -> tuple[int, ...]:
    """The shape of what the network gives for one image. Raises InputError if it gives nothing of use."""
    import torch

    size = backbone.prepare.size
    try:
        with torch.inference_mode():
            vectors = backbone.embed(torch.zeros(1, 3, size, size, dtype=torch.uint8))
    except (RuntimeError, AssertionError, ValueError) as error:
        if isinstance(error, RuntimeError) and out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0]
        raise InputError(f"{backbone.word} does not take images of {size} pixels ({reason})") from None
    if not vectors.isfinite().all():
        raise InputError(
            f"{backbone.word} gives no numbers for a black image of {size} pixels: its weights are broken, "
            "or --image_size is too small"
        )
    return tuple(vectors.shape[1:])


def choose_device(name: str) -> str:
    """`auto` becomes cuda, mps or cpu, the first that is there. Raises InputError for one that is not."""
    if name == "cpu" or (name == "auto" and _no_accelerator()):
        return "cpu"
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(device for device, available in there.items() if available)
    if not there[name]:
        raise InputError(f"--device {name}: torch finds no such device on this machine; use auto or cpu")
    return name


def _no_accelerator() -> bool:
    """Whether the system shows that there is none, so that torch, which takes a second, need not be asked."""
    return sys.platform == "linux" and not any(map(os.path.exists, ACCELERATORS))


# ---- the list of the words ------------------------------------------------------------------------
