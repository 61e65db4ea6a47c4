"""A fine-tuned checkpoint in; a backbone that embeds exactly as it was validated out.

The file is a dict of weights and a recipe of plain values. Nothing in it is executed.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import AfterValidator, Field, TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.nn import functional

from retrieval.backbones import batch_norm_folding
from retrieval.backbones.backbone import (
    Backbone,
    LazyBackbone,
    Trained,
    cache_key,
    choose_device,
    find_pretrained,
    network_version,
    place,
)
from retrieval.backbones.batch_norm_folding import fold_batch_norms
from retrieval.backbones.detectors import DETECTORS
from retrieval.backbones.face_crop import FaceCrop
from retrieval.backbones.filling import fill
from retrieval.backbones.onnx_file import SUFFIX
from retrieval.backbones.timm_zoo import network_of_hub_config, with_input_size
from retrieval.backbones.transform import Transform
from retrieval.backbones.weights_file import is_fine_tuned, is_weights, unpickle
from retrieval.errors import InputError, RunError, printable
from retrieval.files import write_whole

VERSION = 1  # part of the cache key: raise it when Joined, Shrunk or Mapped give other vectors
LARGEST = 4096  # side of an input in pixels
Checked = TypeVar("Checked")
ALONE, JOINED, MIXED = "tuned", "untuned + tuned", "mixed weights"


def _with_untuned(metrics: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(metrics.get("untuned"), dict):
        raise ValueError("it lacks those of the untuned network")
    return metrics


Finite = Annotated[float, Field(allow_inf_nan=False)]
Three = tuple[Finite, Finite, Finite]
Side = Annotated[int, Field(gt=0, le=LARGEST)]


@dataclass(frozen=True)
class Recipe:
    """The content of a checkpoint besides its weights. The names of the fields are those in the file."""

    word: str  # the model name
    prepare: dict[str, Any]  # the fields of the Transform or FaceCrop
    mean: Three
    std: Three
    folded: bool  # whether the batch norms are folded into the convolutions
    mapped: bool  # whether a linear map follows the network
    tuned_size: Side  # the side of the tuned network's input in pixels
    embedding: Literal[
        "tuned", "untuned + tuned", "mixed weights"
    ]  # ALONE; JOINED: both embeddings side by side; or MIXED: WiSE-FT
    weight: Finite  # JOINED: λ of the tuned embedding; MIXED: α of the tuned weights
    loss: str
    settings: dict[str, Any]
    classes: list[str]
    versions: dict[str, str]
    metrics: Annotated[dict[str, Any], AfterValidator(_with_untuned)]
    history: list[dict[str, Any]]  # an entry for each epoch
    hub_config: str | None  # the text of config.json of a network on the hub: needs no download then


class Joined(nn.Module):
    """Concatenate untuned ⊕ λ · tuned, both of unit length: cosines are (c_u + λ² c_t) / (1 + λ²)."""

    def __init__(self, untuned: nn.Module, tuned: nn.Module, weight: float, tuned_size: int) -> None:
        super().__init__()
        self.untuned, self.tuned = untuned, Shrunk(tuned, tuned_size)
        self.weight = weight

    def forward(self, pixels: Tensor) -> Tensor:
        """Map (images, 3, size, size) to (images, dimensions of both)."""
        return join(self.untuned(pixels), self.tuned(pixels), self.weight)


def join(untuned: Tensor, tuned: Tensor, weight: float) -> Tensor:
    """Concatenate two embeddings of each image, (images, d) and (images, e), to (images, d + e)."""
    untuned, tuned = functional.normalize(untuned.float()), functional.normalize(tuned.float())
    return torch.cat([untuned, weight * tuned], 1)


class Shrunk(nn.Module):
    """Resize images to `size` pixels before the network."""

    def __init__(self, network: nn.Module, size: int) -> None:
        super().__init__()
        self.network, self.size = network, size

    def forward(self, pixels: Tensor) -> Tensor:
        """Resize (images, 3, any, any) to (images, 3, size, size), and return the network's output."""
        if pixels.shape[-1] != self.size:
            shrink = _shrinking(int(pixels.shape[-1]), self.size).to(pixels)
            pixels = (shrink @ pixels @ shrink.T).contiguous(memory_format=torch.channels_last)
        return self.network(pixels)


@functools.cache
def _shrinking(side: int, size: int) -> Tensor:
    """Return the matrix (size, side) that resizes a column as antialiased bilinear interpolation does.

    As a matrix product the resizing can be exported to ONNX.
    """
    unit = torch.eye(side)[None, None]
    return functional.interpolate(unit, [size, side], mode="bilinear", antialias=True)[0, 0]


class Mapped(nn.Module):
    """A network followed by a linear map, which begins as the identity."""

    def __init__(self, network: nn.Module, dimension: int) -> None:
        super().__init__()
        self.network, self.map = network, nn.Linear(dimension, dimension, bias=False)
        nn.init.eye_(self.map.weight)

    def forward(self, pixels: Tensor) -> Tensor:
        """Map (images, 3, size, size) to (images, dimension)."""
        return self.map(self.network(pixels))


# ---- write ----------------------------------------------------------------------------------------


def write_fine_tuned(
    path: Path, recipe: Recipe, network: Mapping[str, Tensor], untuned: Mapping[str, Tensor] | None = None
) -> None:
    """Write a checkpoint, whole or not at all; `untuned` are the weights of the first half of JOINED."""
    content = {"recipe": asdict(recipe), "network": dict(network)}
    write_checkpoint(path, content | ({"untuned": dict(untuned)} if untuned else {}))


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a file of torch.save, whole or not at all."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_whole(path, buffer.getbuffer())


# ---- read -----------------------------------------------------------------------------------------


def read_fine_tuned(file: Path) -> tuple[Recipe, dict[str, Tensor], dict[str, Tensor] | None]:
    """Read the recipe, the tuned weights and, if the embedding is JOINED, the untuned weights.

    Raises InputError for a file that fine_tuning.py did not write, or a later version of it.
    """
    content = None if file.suffix == SUFFIX else unpickle(file)
    if not is_fine_tuned(content):
        raise InputError(
            f"{file} was not written by fine_tuning.py: for other weights run "
            f"`python model_not_tuned.py --model_type NAME --weights {file}`"
        )
    recipe, network, untuned = content["recipe"], content["network"], content.get("untuned")
    known, given = (
        {field.name for field in fields(Recipe)},
        set(recipe) if isinstance(recipe, dict) else set(),
    )
    if later := {name for name in given - known if isinstance(name, str)}:
        raise InputError(
            f"{file} was written by a later version of this project: its recipe has {min(later)}"
        )
    if known - given:
        raise InputError(
            f"{file} was written by an earlier version of this project, or changed: its recipe lacks "
            f"{min(known - given)}; fine-tune again"
        )
    for weights in (network, *([untuned] if recipe["embedding"] == JOINED else [])):
        if not isinstance(weights, dict) or not all(map(is_weights, weights.values())):
            raise InputError(f"{file} was changed: it lacks the weights of its recipe; fine-tune again")
    return _checked(Recipe, recipe, "recipe", file), network, untuned


def _checked(kind: type[Checked], values: dict[str, Any], what: str, file: Path) -> Checked:
    """Make a record of foreign values, by the types of its fields. Raises InputError for a wrong one."""
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        wrong = error.errors()[0]
        name = ".".join(map(str, wrong["loc"]))
        found, problem = printable(repr(wrong["input"])[:80]), wrong["msg"].removeprefix("Value error, ")
        raise InputError(
            f"{file} was changed, or written by another version of this project: {name} of its {what} is "
            f"{found}: {problem}; fine-tune again"
        ) from None


def find_fine_tuned(file: Path, device: str = "auto") -> LazyBackbone:
    """Find the backbone of a checkpoint: it embeds as the recipe in the checkpoint says.

    Raises InputError for a file that fine_tuning.py did not write; otherwise as find_backbone.
    """
    recipe, tuned, untuned = read_fine_tuned(file)
    transform, device = _transform(recipe, file), choose_device(device)
    name = f"{recipe.word} fine-tuned with {recipe.loss} ({how(recipe.embedding, recipe.weight)})"
    trained = Trained(recipe.embedding == JOINED, recipe.metrics["untuned"], recipe.history)

    def load() -> Backbone:
        network = _network(recipe, recipe.tuned_size, tuned, file)
        if recipe.embedding == JOINED:
            first = _network(recipe, transform.size, untuned, file)
            network = Joined(first, network, recipe.weight, recipe.tuned_size)
        return place(Backbone(network, 0, transform, recipe.mean, recipe.std, name, device))

    versions = network_version(recipe.word), VERSION, recipe.folded and batch_norm_folding.VERSION
    return LazyBackbone(
        name, transform, device, cache_key(transform, [file], versions, device), load, trained
    )


def load_fine_tuned(file: Path, device: str = "auto") -> Backbone:
    """Load the backbone of a checkpoint, in inference mode on its device; as find_fine_tuned."""
    return find_fine_tuned(file, device).load()


def how(embedding: str, weight: float) -> str:
    """Describe a way to embed with an untuned and a tuned network.

    >>> how(JOINED, 2.0), how(MIXED, 0.5), how(ALONE, 1.0)
    ('untuned + 2 × tuned', '0.5 of the tuned weights', 'tuned')
    """
    if embedding == ALONE:
        return "tuned"
    return f"untuned + {weight:g} × tuned" if embedding == JOINED else f"{weight:g} of the tuned weights"


def load_tuned_alone(file: Path, model_name: str, device: str = "auto") -> tuple[Backbone, Recipe]:
    """Load the tuned network of a checkpoint, without the untuned half, and its recipe, to train further.

    Raises InputError if the checkpoint is of another network than `model_name`.
    """
    recipe, tuned, _ = read_fine_tuned(file)
    if recipe.word != model_name:
        raise InputError(
            f"--weights {file} is a fine-tuned {recipe.word}: give --model {recipe.word} with it"
        )
    size = recipe.tuned_size
    network, transform = _network(recipe, size, tuned, file), _transform(recipe, file).of_size(size)
    backbone = Backbone(network, 0, transform, recipe.mean, recipe.std, model_name, choose_device(device))
    return place(backbone), recipe


def _transform(recipe: Recipe, file: Path) -> Transform | FaceCrop:
    """Return the transform of a recipe; fetch its face detector. Raises as FaceCrop.fetch, and InputError."""
    kind = FaceCrop if "detector" in recipe.prepare else Transform
    transform = _checked(kind, recipe.prepare, "transform", file)
    if not 0 < transform.size <= LARGEST:
        raise InputError(f"{file} was changed: its transform makes images of {transform.size} pixels")
    if transform.detects_faces:
        if transform.detector not in DETECTORS:
            raise InputError(f"{file} looks for faces by {transform.detector}, which this version has not")
        transform.fetch()
    return transform


def _network(recipe: Recipe, size: int, state: Mapping[str, Tensor], file: Path) -> nn.Module:
    """Build the network of a recipe for inputs of `size` pixels, with these weights."""
    try:
        if recipe.hub_config:
            network = network_of_hub_config(recipe.word, recipe.hub_config).eval()
        else:
            network = find_pretrained(recipe.word).network(None).eval()
        network = with_input_size(network, size)
        if recipe.folded:
            network = fold_batch_norms(network, torch.zeros(1, 3, size, size))
    except (InputError, RunError, OSError):
        raise
    except Exception as error:  # timm raises anything on a description that was changed
        raise InputError(
            f"{file} was changed, or needs another timm: its network cannot be built ({error})"
        ) from None
    if recipe.mapped:
        network = Mapped(network, len(state.get("map.weight", [0])))  # `fill` tells if there is none
    fill(network, state, file, f"the {recipe.word} of its recipe")
    return network.eval()
