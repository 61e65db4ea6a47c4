"""Settings in; the network to fine-tune out, once as it is and once to be tuned."""

from __future__ import annotations

import copy
import io
import logging
import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from get_images import ImageFile, open_image, read_bytes
from retrieval.backbones.backbone import Backbone, load_backbone, place
from retrieval.backbones.batch_norm_folding import fold_batch_norms
from retrieval.backbones.fine_tuned import Mapped, Recipe, load_tuned_alone
from retrieval.backbones.onnx_file import SUFFIX
from retrieval.backbones.timm_zoo import size_step, with_input_size
from retrieval.backbones.weights_file import is_fine_tuned, unpickle
from retrieval.backbones.zoo import PRETRAINED
from retrieval.distributed import claim_devices
from retrieval.errors import InputError
from retrieval.settings import Form

SMALLEST_SIDE = 96  # pixels: the networks were trained with 224

log = logging.getLogger("retrieval.start")


class Start(NamedTuple):
    """The same network twice."""

    untuned: Backbone  # frozen, with inputs of the network's own size
    tuned: Backbone  # to be tuned
    folded: bool  # whether the batch norms are folded into the convolutions


def load_start(settings: Form, files: list[ImageFile]) -> Start:
    """Load the network to fine-tune; --freeze backbone puts a linear map on it.

    --weights replace the weights of the model. They may be a fine-tuned checkpoint: then its tuned network is
    the start. The images `files` decide the size of the inputs. Raises as load_backbone.
    """
    claim_devices()
    _refuse_onnx(settings)
    if settings.weights and settings.weights.suffix != ".dat" and is_fine_tuned(unpickle(settings.weights)):
        given = [name for name in ("face_margin", "min_face_size") if getattr(settings, name) is not None]
        given += [name for name in ("crop", "detector") if getattr(settings, name) != "auto"]
        if given:
            raise InputError(f"--{given[0]} changes nothing: the checkpoint {settings.weights} knows it")
        backbone, recipe = load_tuned_alone(settings.weights, settings.model, settings.device)
        _warn_of_other_split(recipe, settings)
        network, folded = backbone.network.cpu(), recipe.folded
    else:
        backbone = load_backbone(
            settings.model, settings.device, settings.weights, settings.crop,
            None, settings.face_margin, settings.min_face_size, settings.detector)  # fmt: skip
        network, folded, size = backbone.network.cpu(), True, backbone.transform.size
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
    log.info("loaded %s on %s; it learns from inputs of %d pixels", untuned.model_name, untuned.device,
             tuned.transform.size)  # fmt: skip
    return Start(untuned, tuned, folded)


def _refuse_onnx(settings: Form) -> None:
    """Raise InputError for a network in an ONNX file: ONNX Runtime computes no gradients."""
    in_onnx = settings.weights and settings.weights.suffix == SUFFIX
    row = PRETRAINED.get(
        settings.model
    )  # only rows of this table are ONNX files: a name of timm needs the hub
    if in_onnx or (row and row.network is None):
        raise InputError(
            f"{settings.weights or settings.model} is a network in an ONNX file, which cannot be fine-tuned: "
            "run it with model_not_tuned.py, or tune dlib, facenet or a network of timm"
        )


def _warn_of_other_split(recipe: Recipe, settings: Form) -> None:
    """Warn if the checkpoint may have learned from the images that validate it now."""
    before = recipe.settings
    other = [name for name in ("seed", "val_share") if before[name] != getattr(settings, name)]
    if other:
        had = " ".join(f"--{name} {before[name]}" for name in other)
        log.warning("%s was trained with %s: if it was on these images, it has learned from some that are "
                    "set aside now, and validation flatters it", settings.weights, had)  # fmt: skip


def _to_be_tuned(untuned: Backbone, image_size: int | None, files: list[ImageFile]) -> Backbone:
    """Copy the backbone with inputs of `image_size` pixels; None: of a size that suits the images."""
    size = image_size or size_for(files, untuned)
    try:
        network = with_input_size(copy.deepcopy(untuned.network), size)
        return place(replace(untuned, network=network, transform=untuned.transform.of_size(size)))
    except InputError:
        if image_size:
            raise
        log.info("%s takes inputs of %d pixels only", untuned.model_name, untuned.transform.size)
        return replace(untuned, network=copy.deepcopy(untuned.network))


def size_for(files: list[ImageFile], backbone: Backbone) -> int:
    """Return the side in pixels of the inputs to train on: smaller for small images, which saves time.

    It is about a fifth more than the median shorter side of the images, so that most keep their detail. It is
    a multiple of 32 (of a ViT's patches: for 14 pixels, of 28), at least SMALLEST_SIDE and at most the
    network's own size. A face network keeps its own size, since its face crops are enlarged to that.
    """
    own = backbone.transform.size
    if backbone.transform.detects_faces:
        return own
    sides = [side for side in map(_shorter_side, files[:: max(1, len(files) // 200)]) if side]
    if not sides:
        return own
    patch = size_step(backbone.network)
    step = max(1, 32 // patch) * patch
    least = step * math.ceil(SMALLEST_SIDE / step)
    return min(own, max(least, step * round(1.2 * float(np.median(sides)) / step + 0.25)))


def _shorter_side(file: ImageFile) -> int:
    """Return the shorter side in pixels; 0 for an unreadable file, which the loader will report."""
    try:
        with open_image(io.BytesIO(read_bytes(file.path))) as image:
            return min(image.size)
    except Exception:  # decoders raise anything on broken bytes
        return 0
