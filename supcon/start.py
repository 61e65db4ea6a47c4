"""Settings in; the network to start from, once as it is and once to be tuned, out."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from get_images import ImageFile
from retrieval.backbones.backbone import Backbone, load_backbone, place
from retrieval.backbones.batch_norm_folding import fold_batch_norms
from retrieval.backbones.fine_tuned import Mapped, Recipe, load_tuned_alone
from retrieval.backbones.weights import is_fine_tuned, unpickle
from retrieval.distributed import take_a_share
from retrieval.errors import InputError
from retrieval.settings import Form

LEAST_SIDE = 96  # pixels: the networks were trained with 224

log = logging.getLogger("retrieval.start")


class Start(NamedTuple):
    """The same network twice."""

    untuned: Backbone  # sees squares of its own size
    tuned: Backbone  # to be
    folded: bool  # whether their batch normalisations are in their convolutions


def load_start(settings: Form, files: list[ImageFile]) -> Start:
    """The network to fine-tune, with the linear map of --freeze backbone on it.

    It is that of the word, with --weights in the place of its own; those may be a fine-tuned checkpoint,
    whose tuned network is then the start. `files` say how large the images are. Raises as load_backbone.
    """
    take_a_share()
    if settings.weights and settings.weights.suffix != ".dat" and is_fine_tuned(unpickle(settings.weights)):
        given = [name for name in ("face_margin", "min_face_size") if getattr(settings, name) is not None]
        given += ["crop"] if settings.crop != "auto" else []
        if given:
            raise InputError(f"--{given[0]} changes nothing: the checkpoint {settings.weights} knows it")
        backbone, recipe = load_tuned_alone(settings.weights, settings.model, settings.device)
        _warn_of_another_split(recipe, settings)
    else:
        backbone = load_backbone(settings.model, settings.device, settings.weights, settings.crop,
                                 None, settings.face_margin, settings.min_face_size)  # fmt: skip
    network, folded = backbone.network.cpu(), True
    if not isinstance(network, Mapped):
        size = backbone.transform.size
        example = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
        try:
            network = fold_batch_norms(network, example)
        except ValueError:
            log.info("its batch normalisations cannot be folded: it learns as well, but more slowly")
            folded = False
    if settings.freeze == "backbone" and not isinstance(network, Mapped):
        network = Mapped(network, backbone.dimension)
    untuned = place(replace(backbone, network=network.requires_grad_(False)))
    tuned = _to_be_tuned(untuned, settings.image_size, files)
    log.info("loaded %s on %s; it learns from squares of %d pixels", untuned.model_name, untuned.device,
             tuned.transform.size)  # fmt: skip
    return Start(untuned, tuned, folded)


def _warn_of_another_split(recipe: Recipe, settings: Form) -> None:
    """Say where the checkpoint may have learned from the images that are validated on now."""
    before = recipe.settings or {}
    other = [name for name in ("seed", "val_share") if before.get(name) != getattr(settings, name)]
    if other:
        had = " ".join(f"--{name} {before.get(name)}" for name in other)
        log.warning("%s was trained with %s: if it was on these images, it has learned from some that are "
                    "set aside now, and validation flatters it", settings.weights, had)  # fmt: skip


def _to_be_tuned(untuned: Backbone, image_size: int | None, files: list[ImageFile]) -> Backbone:
    """A copy of the backbone that sees squares of `image_size` pixels; None: as many as suit the images."""
    size = image_size or size_for(files, untuned)
    backbone = replace(
        untuned, network=copy.deepcopy(untuned.network), transform=untuned.transform.of_size(size)
    )
    try:
        return place(backbone)
    except InputError:
        if image_size:
            raise
        log.info("%s sees squares of %d pixels only", untuned.model_name, untuned.transform.size)
        return replace(backbone, transform=untuned.transform)


def size_for(files: list[ImageFile], backbone: Backbone) -> int:
    """The side of a square that loses nothing of most images; at a network's own, small ones waste time.

    A fifth more than the median shorter side, in steps of 32 pixels, and no more than the network's own.
    A face network keeps its own: its crops are enlarged to it.
    """
    own = backbone.transform.size
    if backbone.transform.detects_faces:
        return own
    sides = [side for side in map(_shorter_side, files[:: max(1, len(files) // 200)]) if side]
    if not sides:
        return own
    return min(own, max(LEAST_SIDE, 32 * round(1.2 * float(np.median(sides)) / 32 + 0.25)))


def _shorter_side(file: ImageFile) -> int:
    """In pixels; 0 where the file cannot be read, which its reader will say."""
    try:
        with Image.open(file.path) as image:
            return min(image.size)
    except Exception:  # decoders raise anything on broken bytes
        return 0
