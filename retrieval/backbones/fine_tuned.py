"""A fine-tuned checkpoint in; a backbone that prepares and embeds just as it was validated out.

The file is a dict of a recipe, plain values that say how, and of weights: nothing in it is executed.
"""

from __future__ import annotations

import functools
import io
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from retrieval.backbones.backbone import (
    Backbone,
    Trained,
    Unloaded,
    choose_device,
    digest_of,
    find_word,
    place,
)
from retrieval.backbones.batch_norm_folding import fold_batch_norms
from retrieval.backbones.face_crop import FaceCrop
from retrieval.backbones.timm_zoo import network_of_hub_config
from retrieval.backbones.transform import Transform
from retrieval.backbones.weights import does_not_fit, is_fine_tuned, unpickle
from retrieval.errors import InputError
from retrieval.files import write_whole

if TYPE_CHECKING:
    from collections.abc import Mapping

ALONE, JOINED, MIXED = "tuned", "untuned + tuned", "mixed weights"


@dataclass(frozen=True)
class Recipe:
    """What a checkpoint knows besides its weights."""

    word: str  # the network's
    prepare: dict[str, Any]  # the fields of the Transform or FaceCrop
    mean: tuple[float, ...]
    std: tuple[float, ...]
    folded: bool  # whether its batch normalisations are in its convolutions
    mapped: bool  # whether a linear map lies on it
    tuned_size: int  # pixels of the square that the tuned network sees
    embedding: str = ALONE  # or JOINED: both embeddings side by side; or MIXED: WiSE-FT
    weight: float = 1.0  # JOINED: λ, of the tuned embedding; MIXED: α, of the tuned weights
    loss: str = ""
    settings: dict[str, Any] | None = None
    classes: list[str] | None = None
    versions: dict[str, str] | None = None
    metrics: dict[str, Any] | None = None
    history: list[dict[str, Any]] | None = None  # a line an epoch
    hub_config: str | None = None  # what a repository of the hub says of its network: it may be out of reach


class Joined(nn.Module):
    """untuned ⊕ λ · tuned: both unit vectors side by side, so that cosines are (c_u + λ² c_t) / (1 + λ²)."""

    def __init__(self, untuned: nn.Module, tuned: nn.Module, weight: float, tuned_size: int) -> None:
        super().__init__()
        self.untuned, self.tuned = untuned, Shrunk(tuned, tuned_size)
        self.weight = weight

    def extra_repr(self) -> str:
        """What is no weight, and decides the embedding."""
        return f"weight={self.weight}"

    def forward(self, pixels: Tensor) -> Tensor:
        """(images, 3, size, size) → (images, dimensions of both)."""
        return join(self.untuned(pixels), self.tuned(pixels), self.weight)


def join(untuned: Tensor, tuned: Tensor, weight: float) -> Tensor:
    """The two embeddings of each image, (images, d) and (images, e), as one (images, d + e)."""
    untuned, tuned = functional.normalize(untuned.float()), functional.normalize(tuned.float())
    return torch.cat([untuned, weight * tuned], 1)


class Shrunk(nn.Module):
    """A network that sees what it is given at another size."""

    def __init__(self, network: nn.Module, size: int) -> None:
        super().__init__()
        self.network, self.size = network, size

    def extra_repr(self) -> str:
        """What is no weight, and decides the embedding."""
        return f"size={self.size}"

    def forward(self, pixels: Tensor) -> Tensor:
        """(images, 3, any, any) → what the network gives for (images, 3, size, size)."""
        if pixels.shape[-1] != self.size:
            shrink = _shrinking(int(pixels.shape[-1]), self.size).to(pixels)
            pixels = (shrink @ pixels @ shrink.T).contiguous(memory_format=torch.channels_last)
        return self.network(pixels)


@functools.cache
def _shrinking(side: int, size: int) -> Tensor:
    """The matrix (size, side) of the antialiased bilinear resizing of a column.

    interpolate is linear in each direction; as a matrix every engine knows it.
    """
    unit = torch.eye(side)[None, None]
    return functional.interpolate(unit, [size, side], mode="bilinear", antialias=True)[0, 0]


class Mapped(nn.Module):
    """A network and a linear map of its features, at first the identity."""

    def __init__(self, network: nn.Module, dimension: int) -> None:
        super().__init__()
        self.network, self.map = network, nn.Linear(dimension, dimension, bias=False)
        nn.init.eye_(self.map.weight)

    def forward(self, pixels: Tensor) -> Tensor:
        """(images, 3, size, size) → (images, dimension)."""
        return self.map(self.network(pixels))


# ---- write ----------------------------------------------------------------------------------------


def write_fine_tuned(
    path: Path, recipe: Recipe, network: Mapping[str, Tensor], untuned: Mapping[str, Tensor] | None = None
) -> None:
    """Write a checkpoint, whole or not at all; `untuned` are the weights of the other half of JOINED."""
    content = {"recipe": asdict(recipe), "network": dict(network)}
    write_checkpoint(path, content | ({"untuned": dict(untuned)} if untuned else {}))


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """torch.save, whole or not at all."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_whole(path, buffer.getbuffer())


# ---- read -----------------------------------------------------------------------------------------


def read_fine_tuned(file: Path) -> tuple[Recipe, dict[str, Tensor], dict[str, Tensor] | None]:
    """The recipe, the tuned weights, and the untuned ones where they are joined.

    Raises InputError for a file that is none of ours, or of a version to come.
    """
    content = unpickle(file)
    if not is_fine_tuned(content):
        raise InputError(
            f"{file} was not written by fine_tuning.py: for other weights run "
            f"`python model_not_tuned.py --model_type WORD --weights {file}`"
        )
    unknown = set(content["recipe"]) - {field.name for field in fields(Recipe)}
    if unknown:
        raise InputError(
            f"{file} was written by a later version of this project: its recipe has {unknown.pop()}"
        )
    return Recipe(**content["recipe"]), content["network"], content.get("untuned")


def find_fine_tuned(file: Path, device: str = "auto") -> Unloaded:
    """The backbone of a checkpoint, not loaded: it prepares, embeds and joins as the recipe in it says.

    Raises InputError for a file that is none of ours; otherwise as find_backbone.
    """
    recipe, tuned, untuned = read_fine_tuned(file)
    prepare, device = _prepare(recipe), choose_device(device)
    word = f"{recipe.word} fine-tuned with {recipe.loss} ({how(recipe.embedding, recipe.weight)})"
    trained = Trained(recipe.embedding == JOINED, (recipe.metrics or {}).get("untuned", {}),
                      recipe.history or [])  # fmt: skip

    def load() -> Backbone:
        network = _network(recipe, tuned, file)
        if recipe.embedding == JOINED:
            network = Joined(_network(recipe, untuned, file), network, recipe.weight, recipe.tuned_size)
        return place(Backbone(network, 0, prepare, recipe.mean, recipe.std, word, device, trained))

    return Unloaded(word, prepare, device, digest_of(file, device), load, trained)


def load_fine_tuned(file: Path, device: str = "auto") -> Backbone:
    """What find_fine_tuned finds, in inference mode on its device. Raises as both."""
    return find_fine_tuned(file, device).load()


def how(embedding: str, weight: float) -> str:
    """A way to embed with an untuned and a tuned network, in words.

    >>> how(JOINED, 2.0), how(MIXED, 0.5), how(ALONE, 1.0)
    ('untuned + 2 × tuned', '0.5 of the tuned weights', 'tuned')
    """
    if embedding == ALONE:
        return "tuned"
    return f"untuned + {weight:g} × tuned" if embedding == JOINED else f"{weight:g} of the tuned weights"


def load_tuned_alone(file: Path, word: str, device: str = "auto") -> tuple[Backbone, Recipe]:
    """The tuned network of a checkpoint without what it is joined with, to go on training from; its recipe.

    Raises InputError where the checkpoint is of another network than `word`.
    """
    recipe, tuned, _ = read_fine_tuned(file)
    if recipe.word != word:
        raise InputError(
            f"--weights {file} is a fine-tuned {recipe.word}: give --model {recipe.word} with it"
        )
    prepare = _prepare(recipe).of_size(recipe.tuned_size)
    backbone = Backbone(
        _network(recipe, tuned, file), 0, prepare, recipe.mean, recipe.std, word, choose_device(device)
    )
    return place(backbone), recipe


def _prepare(recipe: Recipe) -> Transform | FaceCrop:
    kind = FaceCrop if "detector" in recipe.prepare else Transform
    return kind(**recipe.prepare)


def _network(recipe: Recipe, state: Mapping[str, Tensor], file: Path) -> nn.Module:
    """The network of a recipe, with these weights."""
    if recipe.hub_config:
        network = network_of_hub_config(recipe.word, recipe.hub_config).eval()
    else:
        network = find_word(recipe.word).network(None).eval()
    if recipe.folded:
        network = fold_batch_norms(network, torch.zeros(1, 3, recipe.tuned_size, recipe.tuned_size))
    if recipe.mapped:
        network = Mapped(network, state["map.weight"].shape[0])
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        problems = [line.strip()[:200] for line in str(error).splitlines()[1:]]
        raise does_not_fit(file, f"the {recipe.word} of its recipe", problems) from None
    return network.eval()
