"""A training and the rows of a batch in; the loss, and weights changed by its gradients, out."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from retrieval.distributed import several
from retrieval.errors import RunError
from retrieval.machine import out_of_memory
from supcon.gather import NoRoomError, add_up, gather, most_of_a_share, own_part, share, together
from supcon.heads import remember
from supcon.state import Training
from supcon.views import AUGMENTATIONS, augment, draw

MOST_BAD_STEPS = 10
# Where a thread makes the views of a batch while the step before is at work. On a CPU they are 3 % of its
# work (48 or 96 views of 128 px, EfficientNet-Lite0), all cores have theirs, and a thread makes a step 4 %
# slower (two cores, median of 7 pairs, −2 to 7 %).
AHEAD = ("cuda",)

log = logging.getLogger("retrieval.steps")


def step(training: Training, rows: np.ndarray, seed: int, views: Views | None = None) -> float:
    """One step on the images `rows` of the squares; the loss. All that is random follows from the seed.

    `views` are those of these rows and this seed, where they are made already. Where the batch does not fit
    into the device's memory, fewer views go through it at once.
    """
    training.head.train()
    while True:
        training.optimizer.zero_grad(set_to_none=True)
        try:
            with together():
                views = views or make_views(training, rows, seed)
            torch.manual_seed(seed)  # what a head does at random
            return _update(training, _gradients(training, *views))
        except RuntimeError as error:
            if isinstance(error, RunError) or not out_of_memory(error):
                raise
            if several() and not isinstance(error, NoRoomError):  # the other processes have gone on
                raise RunError(
                    f"the weights and their gradients do not fit into the memory of {training.device}: "
                    "start fewer processes on it, or give --freeze all_but_last"
                ) from None
        at_once = min(training.micro_batch, most_of_a_share(len(rows)) * training.variant.views)
        if at_once == 1:
            raise RunError(
                f"not one image fits into the memory of {training.device}: give a smaller --image_size, "
                "--freeze all_but_last, or --device cpu"
            )
        training.micro_batch = at_once // 2
        log.warning("the batch does not fit into the memory of %s: %d views at once, with the same gradients",
                    training.device, training.micro_batch)  # fmt: skip
        torch.accelerator.empty_cache()


# ---- the views ------------------------------------------------------------------------------------


class Views(NamedTuple):
    """What the network sees of a batch."""

    pixels: Tensor  # float32 (views, 3, size, size), on the device: of this process's share of the rows
    labels: Tensor  # (views,) there too: of all rows


class Prepared(NamedTuple):
    """A step to come."""

    rows: np.ndarray  # of the squares
    seed: int
    views: Views | None  # None: the step makes them itself


def prepared(training: Training, batches: list[np.ndarray]) -> Iterator[Prepared]:
    """The steps that are left of this epoch's batches, each when it is asked for.

    On the devices of AHEAD a thread makes the views of the next step while the caller does the one before;
    it ends with this iterator, which is to be closed.
    """
    epoch, seed = training.progress.epoch, training.settings.seed
    steps = range(training.progress.step, len(batches))
    seeds = [int(np.random.SeedSequence((seed, epoch, step)).generate_state(1)[0]) for step in steps]
    plan = list(zip((batches[step] for step in steps), seeds, strict=True))
    if training.device not in AHEAD:
        yield from (Prepared(*this, None) for this in plan)
        return
    device = torch.accelerator.current_device_index() if training.device == "cuda" else None
    with ThreadPoolExecutor(1, "views", _work_on, [device]) as thread:
        coming = [thread.submit(_views_or_none, training, *this) for this in plan[:1]]
        for this, following in zip(plan, [*plan[1:], None], strict=True):
            views = coming.pop().result()
            if following:
                coming.append(thread.submit(_views_or_none, training, *following))
            yield Prepared(*this, views)


def _work_on(device: int | None) -> None:
    """Let this thread use the device of the thread that began it: CUDA has one for each."""
    if device is not None:
        torch.accelerator.set_device_index(device)


def _views_or_none(training: Training, rows: np.ndarray, seed: int) -> Views | None:
    """The views; None where there is no room for them beside the step before."""
    try:
        return make_views(training, rows, seed)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return None


def make_views(training: Training, rows: np.ndarray, seed: int) -> Views:
    """The views of the images `rows`, and their labels; what is random in them follows from the seed.

    Of several processes each makes those of its share, as one alone would make them.
    """
    random, part = torch.Generator().manual_seed(seed), share(len(rows))
    squares = training.squares.pixels[torch.from_numpy(rows[part])].to(training.device)
    kind, size = AUGMENTATIONS[training.choices["augmentation"]], training.tuned.transform.size
    drawn = [draw(kind, len(rows), random).of(part) for _ in range(training.variant.views)]
    views = [augment(squares, size, numbers) for numbers in drawn]
    labels = training.squares.labels[rows] if training.variant.labels else rows
    labels = torch.from_numpy(labels).repeat(training.variant.views).to(training.device)
    return Views(torch.cat(views), labels)


# ---- the gradients --------------------------------------------------------------------------------


def _gradients(training: Training, pixels: Tensor, labels: Tensor) -> Tensor:
    """The loss of a batch, and its gradients in every weight, a micro-batch at a time if need be.

    With several: cached gradients (GradCache, Gao et al. 2021). The features of all are computed without a
    graph, the loss gives the gradient in them, and each micro-batch is then sent through again with its part
    of that. Nothing in the network depends on the other images, so the gradients are those of one batch. With
    several processes each does so with its share (supcon/gather.py).
    """
    parts = pixels.split(training.micro_batch)
    if len(parts) == 1 and not several():
        loss = training.head(_features(training, pixels), labels)
        training.scaler.scale(loss).backward()
        return loss.detach()
    views, rows = training.variant.views, len(labels) // training.variant.views
    whole = len(parts) == 1  # then its graph is kept
    with together(), torch.set_grad_enabled(whole):
        own = torch.cat([_features(training, part) for part in parts])
    features = own.detach() if not several() else gather(own.detach(), views, rows)
    with together():
        loss = training.head(features.requires_grad_(), labels)
        training.scaler.scale(loss).backward()
        gradient = own_part(features.grad, views, rows)
        if whole:
            own.backward(gradient)
        else:
            for part, of_part in zip(parts, gradient.split(training.micro_batch), strict=True):
                _features(training, part).backward(of_part)
    if several():
        add_up(*(_gradients_of(part) for part in (training.tuned.network, training.head)))
    return loss.detach()


def _gradients_of(module: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in module.parameters() if parameter.grad is not None]


def _features(training: Training, pixels: Tensor) -> Tensor:
    """float32 (views, dimension); on a GPU in half precision inside."""
    half = torch.float16 if training.scaler.is_enabled() else torch.bfloat16
    with torch.autocast(training.device, dtype=half, enabled=training.device == "cuda"):
        return training.tuned.features(pixels) * training.scale


def _update(training: Training, loss: Tensor) -> float:
    """Change the weights by their gradients, clipped, unless those are not finite; the loss as a number."""
    training.scaler.unscale_(training.optimizer)
    learned = [p for group in training.optimizer.param_groups for p in group["params"] if p.grad is not None]
    length = nn.utils.get_total_norm([p.grad for p in learned])
    loss, length = torch.stack([loss.float(), length.float()]).tolist()  # the only wait for a GPU
    clip = training.settings.clip or math.inf
    if clip < length < math.inf:
        nn.utils.clip_grads_with_norm_(learned, clip, torch.tensor(length))
    if math.isfinite(length):
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
    return loss
