"""Average the weights of fine-tuned checkpoints of one ancestor and one recipe: a model soup.

python -m supcon.soup checkpoints/a/fine_tuned_model.pth checkpoints/b/fine_tuned_model.pth --out soup.pth
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from retrieval.console import run_script  # first, since it checks that the packages are installed

# isort: split
from pydantic_settings import CliPositionalArg

from retrieval.errors import InputError
from retrieval.forms import Form
from retrieval.settings import File, NewFile

if TYPE_CHECKING:
    from torch import Tensor

    from retrieval.backbones.fine_tuned import Recipe

# What the fields of a recipe must have in common, so that the mean of two tensors means something.
SAME = {
    "word": "the network",
    "hub_config": "the network's configuration",
    "mapped": "the linear map on the network",
    "folded": "the folding of batch norms",
    "prepare": "the transform of the images",
    "mean": "the normalisation of pixels",
    "std": "the normalisation of pixels",
    "tuned_size": "the size of the tuned network's input",
    "embedding": "the way to embed",
    "weight": "the weight of the way to embed",
    "loss": "the loss",
    "classes": "the classes of the training images",
}
ANCESTOR = "weights"  # the setting that names the file that a training started from

log = logging.getLogger("retrieval.soup")


class Settings(Form):
    """Average the weights of fine-tuned checkpoints of one ancestor and one recipe."""

    checkpoints: CliPositionalArg[list[File]]
    """checkpoints of fine_tuning.py, such as those of several seeds or learning rates"""
    out: NewFile = Path("checkpoints/soup.pth")
    """file to write, for model_fine_tuned.py"""


def main(settings: Settings) -> None:
    from retrieval.backbones.fine_tuned import write_fine_tuned

    if len(settings.checkpoints) < 2:
        raise InputError("give two checkpoints or more: one is its own mean")
    if settings.out.exists():
        raise InputError(f"--out {settings.out} exists: give the name of a new file")
    recipe, network, untuned = soup(settings.checkpoints)
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    write_fine_tuned(settings.out, recipe, network, untuned)
    log.info("wrote %s, the mean of %d checkpoints, which nobody has measured yet: compare it with them on "
             "labelled images by\n    python model_fine_tuned.py --weights %s --custom_dataset --query_dir … "
             "--gallery_dir …", settings.out, len(settings.checkpoints), settings.out)  # fmt: skip


def soup(files: list[Path]) -> tuple[Recipe, dict[str, Tensor], dict[str, Tensor] | None]:
    """Return the recipe, the mean weights and the untuned weights of several checkpoints.

    The mean of networks that were tuned from the same weights lies in the same valley of the loss, and often
    generalises better than each: Wortsman et al., Model soups, 2022 (a uniform soup). Seeds, learning rates,
    epochs and augmentations may differ. One checkpoint is in memory at a time, besides the sum in float64.
    Raises InputError if the checkpoints differ in what SAME lists, in the file that a training started from,
    in their untuned weights, or in the statistics of batch norms, which fine_tuning.py never changes.
    """
    from retrieval.backbones.fine_tuned import read_fine_tuned

    recipe, first, untuned = read_fine_tuned(files[0])
    total = {name: tensor.double() for name, tensor in first.items()}
    for file in files[1:]:
        other, network, other_untuned = read_fine_tuned(file)
        _check_recipes(files[0], recipe, file, other)
        _check_tensors(files[0], untuned or {}, file, other_untuned or {}, "untuned weights")
        _check_tensors(files[0], _fixed(first), file, _fixed(network), "batch-norm statistics")
        for name in total:
            total[name] += network[name].double()
    mean = {name: (tensor / len(files)).to(first[name].dtype) for name, tensor in total.items()}
    return _recipe_of_soup(recipe, files), mean, untuned


def _check_recipes(first: Path, recipe: Recipe, file: Path, other: Recipe) -> None:
    """Raise InputError if two recipes differ in what a soup needs to be the same."""
    for name, what in SAME.items():
        ours, theirs = getattr(recipe, name), getattr(other, name)
        if ours != theirs:
            shown = "" if name in ("classes", "hub_config") else f" ({ours} and {theirs})"
            raise InputError(
                f"{first} and {file} differ in {what}{shown}: a soup needs checkpoints of the same recipe"
            )
    starts = recipe.settings.get(ANCESTOR), other.settings.get(ANCESTOR)
    if starts[0] != starts[1]:
        raise InputError(
            f"{first} was tuned from {starts[0] or 'the pretrained weights'} and {file} from "
            f"{starts[1] or 'the pretrained weights'}: a soup needs checkpoints of one ancestor"
        )


def _check_tensors(
    first: Path, ours: dict[str, Tensor], file: Path, theirs: dict[str, Tensor], what: str
) -> None:
    """Raise InputError unless all tensors are equal."""
    if ours.keys() != theirs.keys() or not all(ours[name].equal(theirs[name]) for name in ours):
        raise InputError(
            f"{first} and {file} differ in their {what}: a soup needs checkpoints that were tuned from "
            "the same weights"
        )


def _fixed(network: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors that no training step changes: the statistics of batch norms, and integers."""
    return {name: tensor for name, tensor in network.items()
            if "running_" in name or not tensor.is_floating_point()}  # fmt: skip


def _recipe_of_soup(recipe: Recipe, files: list[Path]) -> Recipe:
    """Return the recipe of a soup: which files it is made of, and no metrics, since none was measured."""
    return replace(
        recipe,
        loss=f"{recipe.loss}, a soup of {len(files)}",
        settings=recipe.settings | {"soup": [str(file) for file in files]},
        metrics={"untuned": {}},
        history=[],
    )


if __name__ == "__main__":
    run_script(main, Settings)
