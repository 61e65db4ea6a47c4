"""A training and the rows of a batch in; the loss, and weights changed by its gradients, out."""

from __future__ import annotations

import logging
import math

import numpy as np
import torch
from torch import Tensor, nn

from retrieval.backbones import out_of_memory
from retrieval.settings import RunError
from supcon.heads import remember
from supcon.state import Training
from supcon.views import AUGMENTATIONS, augment, draw

MOST_BAD_STEPS = 10

log = logging.getLogger("retrieval.steps")


def step(training: Training, rows: np.ndarray, seed: int) -> float:
    """One step on the images `rows` of the squares; the loss. All that is random follows from the seed.

    Where the batch does not fit into the device's memory, fewer views go through it at once.
    """
    training.head.train()
    while True:
        training.optimizer.zero_grad(set_to_none=True)
        try:
            loss = _gradients(training, *_views(training, rows, seed))
            _update(training)
            return loss
        except RuntimeError as error:
            if isinstance(error, RunError) or not out_of_memory(error):
                raise
        views = min(training.micro_batch, len(rows) * training.variant.views)
        if views == 1:
            raise RunError(
                f"not one image fits into the memory of {training.device}: give a smaller --image_size, "
                "--freeze all_but_last, or --device cpu"
            )
        training.micro_batch = views // 2
        log.warning("the batch does not fit into the memory of %s: %d views at once, with the same gradients",
                    training.device, training.micro_batch)  # fmt: skip
        torch.accelerator.empty_cache()


def _views(training: Training, rows: np.ndarray, seed: int) -> tuple[Tensor, Tensor]:
    """The views of the images, float32 (views, 3, size, size), and their labels (views,)."""
    torch.manual_seed(seed)  # what a head does at random
    random = torch.Generator().manual_seed(seed)
    squares = training.squares.pixels[torch.from_numpy(rows)].to(training.device)
    kind, size = AUGMENTATIONS[training.choices["augmentation"]], training.tuned.prepare.size
    views = [augment(squares, size, draw(kind, len(rows), random)) for _ in range(training.variant.views)]
    labels = training.squares.labels[rows] if training.variant.labels else rows
    return torch.cat(views), torch.from_numpy(labels).repeat(training.variant.views).to(training.device)


def _gradients(training: Training, pixels: Tensor, labels: Tensor) -> float:
    """The loss of a batch, and its gradients in every weight, a micro-batch at a time if need be.

    With several: cached gradients (GradCache, Gao et al. 2021). The features of all are computed without a
    graph, the loss gives the gradient in them, and each micro-batch is then sent through again with its part
    of that. Nothing in the network depends on the other images, so the gradients are those of one batch.
    """
    parts = pixels.split(training.micro_batch)
    if len(parts) == 1:
        loss = training.head(_features(training, pixels), labels)
        training.scaler.scale(loss).backward()
        return loss.item()
    with torch.no_grad():
        features = torch.cat([_features(training, part) for part in parts])
    loss = training.head(features.requires_grad_(), labels)
    training.scaler.scale(loss).backward()
    for part, gradient in zip(parts, features.grad.split(training.micro_batch), strict=True):
        _features(training, part).backward(gradient)
    return loss.item()


def _features(training: Training, pixels: Tensor) -> Tensor:
    """float32 (views, dimension); on a GPU in half precision inside."""
    half = torch.float16 if training.scaler.is_enabled() else torch.bfloat16
    with torch.autocast(training.device, dtype=half, enabled=training.device == "cuda"):
        return training.tuned.features(pixels) * training.scale


def _update(training: Training) -> None:
    """Change the weights by their gradients, clipped, unless those are not finite."""
    training.scaler.unscale_(training.optimizer)
    learned = [p for group in training.optimizer.param_groups for p in group["params"] if p.grad is not None]
    length = nn.utils.clip_grad_norm_(learned, training.settings.clip or math.inf)
    if length.isfinite():
        training.bad_steps = 0
        training.scaler.step(training.optimizer)
        remember(training.head)
        if training.average:
            training.average.update_parameters(training.tuned.network)
    else:
        training.bad_steps += 1
    training.scaler.update()
    if training.bad_steps == MOST_BAD_STEPS:
        raise RunError(
            f"the gradients of {MOST_BAD_STEPS} steps in a row were not finite, and nothing was learned from "
            f"them: give a smaller --lr than {training.settings.lr:g} or a smaller --clip"
        )
