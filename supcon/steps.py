"""The state of a training and the rows of a batch in; the loss, and weights updated by its gradients, out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import zip_longest

import numpy as np
import torch
from torch import Tensor, nn

from retrieval.distributed import shard
from retrieval.errors import RunError
from retrieval.machine import compute_what_fits, out_of_memory
from supcon.batches import by_class, shuffled
from supcon.heads import remember
from supcon.joint_batch import agree_on_memory, gather_features, own_rows, sum_gradients
from supcon.state import TrainingState
from supcon.views import AUGMENTATIONS, augment, draw

MOST_BAD_STEPS = 10
PREFETCHING = ("cuda",)  # devices that would wait for the views; on a CPU a thread makes a step 4 % slower

Views = tuple[Tensor, Tensor]  # pixels and labels, as make_views returns them
StepInputs = tuple[np.ndarray, int, Views | None]  # rows, seed and views, as step takes them


def step(training: TrainingState, rows: np.ndarray, seed: int, views: Views | None = None) -> float:
    """Take one step on the images `rows` and return the loss; everything random follows from the seed.

    `views` are those of make_views, if they are made already. If the batch does not fit into the device's
    memory, fewer views go through the network at a time, with the same gradients. Raises RunError if not one
    fits, or if the gradients are not finite in many steps.
    """

    def _try(micro_batch: int) -> Tensor:
        nonlocal views
        training.optimizer.zero_grad(set_to_none=True)
        with agree_on_memory():
            views = views or make_views(training, rows, seed)
        torch.manual_seed(seed)  # for a head's dropout
        return _gradients(training, *views, micro_batch)

    training.head.train()
    advice = "give a smaller --image_size, --freeze all_but_last, or --device cpu"
    loss, training.micro_batch = compute_what_fits(_try, training.micro_batch, training.device, advice)
    try:
        return _update(training, loss)
    except RuntimeError as error:  # fewer views at a time would not help: their graph is gone by now
        if not out_of_memory(error):
            raise
        raise RunError(
            f"the weights and their gradients do not fit into the memory of {training.device}: "
            "start fewer processes on it, or give --freeze all_but_last"
        ) from None


# ---- the views ------------------------------------------------------------------------------------


def planned_steps(training: TrainingState) -> list[tuple[np.ndarray, int]]:
    """Return the rows and the seed of each step of this epoch: they follow from the settings' seed."""
    epoch, seed = training.progress.epoch, training.settings.seed
    images, size = training.images, training.batch_size
    random = np.random.default_rng((seed, epoch))
    if each := training.choices.get("images_per_class"):
        batches = by_class(images.labels, size, each, random)
    else:
        batches = shuffled(len(images.names), size, random)
    seeds = [np.random.SeedSequence((seed, epoch, step)) for step in range(len(batches))]
    return [(rows, int(of_step.generate_state(1)[0])) for rows, of_step in zip(batches, seeds, strict=True)]


def with_views(training: TrainingState, plan: list[tuple[np.ndarray, int]]) -> Iterator[StepInputs]:
    """Yield the inputs of each step of a plan; its views are None if the step has to make them itself.

    On a GPU a thread makes them while the caller takes the step before: otherwise the GPU waits while the
    images of each batch are copied from the CPU's memory. The thread ends with this iterator, which the
    caller has to close.
    """
    if training.device not in PREFETCHING:
        yield from ((rows, seed, None) for rows, seed in plan)
        return
    use_device = None
    if training.device == "cuda":  # whose current device each thread chooses for itself
        use_device = partial(torch.cuda.set_device, torch.cuda.current_device())
    with ThreadPoolExecutor(1, "views", use_device) as thread:
        submit = partial(thread.submit, _views_if_they_fit, training)
        coming = None
        for now, following in zip_longest(plan, plan[1:]):
            views = (coming or submit(*now)).result()
            coming = submit(*following) if following else None
            yield *now, views


def _views_if_they_fit(training: TrainingState, rows: np.ndarray, seed: int) -> Views | None:
    """Make the views; return None if the memory has no room for them beside the step before."""
    try:
        return make_views(training, rows, seed)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return None


def make_views(training: TrainingState, rows: np.ndarray, seed: int) -> Views:
    """Make the views of the images `rows` on the device; everything random follows from the seed.

    Return the pixels, float32 (views, 3, size, size), of this process's shard of the rows as a single process
    would make them, and the labels (views,) of all rows.
    """
    random, part = torch.Generator().manual_seed(seed), shard(len(rows))
    pixels = training.images.pixels[torch.from_numpy(rows[part])].to(training.device)
    kind, size = AUGMENTATIONS[training.choices["augmentation"]], training.tuned.transform.size
    drawn = [draw(kind, len(rows), random).of(part) for _ in range(training.variant.views)]
    views = [augment(pixels, size, numbers) for numbers in drawn]
    labels = training.images.labels[rows] if training.variant.labels else rows
    labels = torch.from_numpy(labels).repeat(training.variant.views).to(training.device)
    return torch.cat(views), labels


# ---- the gradients --------------------------------------------------------------------------------


def _gradients(training: TrainingState, pixels: Tensor, labels: Tensor, micro_batch: int) -> Tensor:
    """Compute the loss of a batch, and this process's part of its gradients, a micro-batch at a time.

    Several micro-batches: cached gradients (GradCache, Gao et al. 2021). The features of all images are
    computed without a graph; the loss gives its gradient in the features; and each micro-batch goes through
    the network again, to propagate its rows of that gradient. The result is the gradient of the whole batch,
    as no image's features depend on another image. Several processes do the same, each with its shard
    (supcon/joint_batch.py).
    """
    parts, views = pixels.split(micro_batch), training.variant.views
    whole = len(parts) == 1  # then the graph is kept
    with agree_on_memory(), torch.set_grad_enabled(whole):
        own = torch.cat([_features(training, part) for part in parts])
    with agree_on_memory():
        features = gather_features(own, views)
        loss = training.head(features.requires_grad_(), labels)
        training.scaler.scale(loss).backward()
        gradient = own_rows(features.grad, views)
        if whole:
            own.backward(gradient)
        else:
            for part, of_part in zip(parts, gradient.split(micro_batch), strict=True):
                _features(training, part).backward(of_part)
    return loss.detach()


def _gradients_of(module: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in module.parameters() if parameter.grad is not None]


def _features(training: TrainingState, pixels: Tensor) -> Tensor:
    """Compute the features (views, dimension), float32; on a GPU the network runs in half precision."""
    half = torch.float16 if training.scaler.is_enabled() else torch.bfloat16
    with torch.autocast(training.device, dtype=half, enabled=training.device == "cuda"):
        return training.tuned.features(pixels) * training.scale


def _update(training: TrainingState, loss: Tensor) -> float:
    """Update the weights by the clipped gradients of all processes, unless not finite; return the loss."""
    sum_gradients(*(_gradients_of(part) for part in (training.tuned.network, training.head)))
    training.scaler.unscale_(training.optimizer)
    trained = [p for group in training.optimizer.param_groups for p in group["params"] if p.grad is not None]
    length = nn.utils.get_total_norm([p.grad for p in trained])
    loss, length = torch.stack([loss.float(), length.float()]).tolist()  # the only wait for a GPU
    clip = training.settings.clip or math.inf
    if clip < length < math.inf:
        nn.utils.clip_grads_with_norm_(trained, clip, torch.tensor(length))
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
