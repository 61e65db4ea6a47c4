"""A training in; epochs of it, each validated, the best kept, and the choice of how to embed, out."""

from __future__ import annotations

import logging
import math
import platform
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from retrieval.fine_tuned import ALONE, JOINED, MIXED, Recipe, described, read_fine_tuned, write_fine_tuned
from retrieval.report import draw_curves
from retrieval.settings import RunError
from supcon.batches import by_class, shuffled
from supcon.checkpoints import BEST, CURVE, write_history
from supcon.layers import share_of_rate
from supcon.state import Training, save
from supcon.steps import step
from supcon.validation import COLLAPSED, best_of, candidates, mixed, validate

SAVE_EVERY = 300  # seconds
FIRST_STEPS = 3

log = logging.getLogger("retrieval.training")


def fit(training: Training) -> None:
    """Train until the epochs or the minutes are over, validate after each epoch, and keep the best.

    Raises KeyboardInterrupt after Ctrl-C, when everything is saved; RunError where it cannot learn.
    """
    progress, settings = training.progress, training.settings
    if progress.untuned is None:
        _look_before(training)
    seconds_before = progress.seconds
    budget = math.inf
    if settings.minutes:
        reserve = 8 * progress.untuned["seconds"]  # for the last validation and the choice of the embedding
        budget = seconds_before + 60 * settings.minutes - reserve
    with _stop_between_steps() as stopped:
        saved = time.perf_counter()
        while progress.epoch < settings.epochs and progress.seconds < budget:
            batches = _batches(training)
            with tqdm(total=len(batches) * len(batches[0]), initial=progress.step * len(batches[0]),
                      desc=f"epoch {progress.epoch + 1}", unit="image", leave=False) as bar:  # fmt: skip
                while progress.step < len(batches) and progress.seconds < budget:
                    _one_step(training, batches, budget)
                    bar.update(len(batches[0]))
                    bar.set_postfix(loss=f"{np.mean(progress.losses[-20:]):.3f}", refresh=False)
                    progress.seconds = seconds_before + time.perf_counter() - training.started
                    if stopped or time.perf_counter() - saved > SAVE_EVERY:
                        save(training)
                        saved = time.perf_counter()
                    if stopped:
                        _say_how_to_go_on(training)
                        raise KeyboardInterrupt
            _end_epoch(training)
            progress.seconds = seconds_before + time.perf_counter() - training.started
            save(training)


def _batches(training: Training) -> list[np.ndarray]:
    """The rows of this epoch's batches: they follow from the seed and the epoch."""
    random = np.random.default_rng((training.settings.seed, training.progress.epoch))
    squares, size = training.squares, training.settings.batch_size
    if training.variant.by_class:
        return by_class(squares.labels, size, training.choices["images_per_class"], random)
    return shuffled(len(squares.names), size, random)


def _one_step(training: Training, batches: list[np.ndarray], budget: float) -> None:
    progress, settings = training.progress, training.settings
    done = progress.epoch * len(batches) + progress.step
    share = (done + 0.5) / (settings.epochs * len(batches))  # in the middle of the step: never a rate of 0
    if budget < math.inf:
        share = max(share, progress.seconds / budget)
    for group in training.optimizer.param_groups:
        group["lr"] = group["rate"] * share_of_rate(share, settings.warmup)
    before = [p.detach().clone() for p in _learned(training)] if done < FIRST_STEPS else None
    words = np.random.SeedSequence((settings.seed, progress.epoch, progress.step)).generate_state(
        1, np.uint64
    )
    progress.losses.append(step(training, batches[progress.step], int(words[0])))
    progress.step += 1
    if before and not training.bad_steps and all(map(torch.equal, before, _learned(training))):
        raise RunError("a step has changed no weight of the network: its output does not depend on them")


def _learned(training: Training) -> list[nn.Parameter]:
    return [p for p in training.tuned.network.parameters() if p.requires_grad]


def _look_before(training: Training) -> None:
    """Validate the untuned network, and say where a loss stands that has learned nothing."""
    started = time.perf_counter()
    figures = validate(training.validation, training.untuned)
    figures["seconds"] = time.perf_counter() - started
    training.progress.untuned = figures
    views = min(training.settings.batch_size, len(training.squares.names)) * training.variant.views
    log.info("untuned: %s", sentence(figures))
    log.info("a loss that stays at about %.2f has learned nothing", training.head.chance(views))


def sentence(figures: dict[str, Any]) -> str:
    """The figures of a validation in a line."""
    low, high = figures["score_interval"]
    return (
        f"top-1 {figures['top_1']:.3f} · top-3 {figures['top_3']:.3f} · score {figures['score']:.0f} "
        f"[{low:.0f}, {high:.0f}]"
    )


def _end_epoch(training: Training) -> None:
    """Validate, keep the network if it is the best so far, and write the epoch's line."""
    progress, settings = training.progress, training.settings
    figures = validate(training.validation, training.judged)
    loss = float(np.mean(progress.losses)) if progress.losses else math.nan
    progress.epoch, progress.step, progress.losses = progress.epoch + 1, 0, []
    best = figures["score"] > progress.best
    seconds = progress.seconds - sum(line["seconds"] for line in progress.history)
    images = len(training.squares.names)
    best_so_far = " · the best so far" if best else ""
    log.info("epoch %d of %d: loss %.3f · %s · %.0f images/s%s", progress.epoch, settings.epochs, loss,
             sentence(figures), images / max(seconds, 1e-9), best_so_far)  # fmt: skip
    if figures["mean_cosine"] > COLLAPSED:
        log.warning("the embeddings have collapsed: two images have a cosine of %.3f in the mean; give a "
                    "smaller --lr", figures["mean_cosine"])  # fmt: skip
    kept = {name: value for name, value in figures.items() if name != "queries"}
    line = {"epoch": progress.epoch, "loss": loss, "seconds": seconds, "images": images} | kept
    progress.history.append(line)
    write_history(settings.save_dir, progress)
    if best:
        progress.best = figures["score"]
        recipe = recipe_of(training, {"untuned": progress.untuned, "tuned": figures, "epoch": progress.epoch})
        write_fine_tuned(settings.save_dir / BEST, recipe, training.judged.network.state_dict())


@contextmanager
def _stop_between_steps() -> Iterator[list[bool]]:
    """A list that Ctrl-C fills, so that no step is broken off; a second Ctrl-C does."""
    stopped: list[bool] = []

    def _stop(*_: Any) -> None:
        if stopped:
            raise KeyboardInterrupt
        stopped.append(True)

    handler = signal.signal(signal.SIGINT, _stop)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, handler)


def _say_how_to_go_on(training: Training) -> None:
    log.warning("stopped in epoch %d after %d steps, and saved: the same command with --resume goes on",
                training.progress.epoch + 1, training.progress.step)  # fmt: skip


# ---- the end --------------------------------------------------------------------------------------


def choose(training: Training) -> None:
    """Choose on validation how to embed with the best network, and write the checkpoint that does it.

    Says how that compares with the untuned network, and draws the curves.
    """
    progress, folder = training.progress, training.settings.save_dir
    started = time.perf_counter()
    recipe, state, _ = read_fine_tuned(folder / BEST)
    if "candidates" in recipe.metrics:
        log.info("this training had come to its end: %s holds its best", folder / BEST)
        return
    best = replace(training.tuned, network=training.judged.network)
    best.network.load_state_dict(state)
    found = candidates(training.validation, training.untuned, best)
    chosen = best_of(found)
    network = best.network.state_dict()
    if chosen.embedding == MIXED:
        network = mixed(training.untuned.network, best.network, chosen.weight).state_dict()
    metrics = recipe.metrics | {
        "tuned": chosen.metrics,
        "candidates": {str(candidate): candidate.metrics["score"] for candidate in found},
    }
    joined = training.untuned.network.state_dict() if chosen.embedding == JOINED else None
    recipe = recipe_of(training, metrics, chosen.embedding, chosen.weight)
    write_fine_tuned(folder / BEST, recipe, network, joined)
    draw_curves(progress.history, progress.untuned, folder / CURVE)
    log.info(
        "%d ways to embed compared in %.1f s: the best is %s",
        len(found),
        time.perf_counter() - started,
        chosen,
    )
    log.info("before: %s", sentence(progress.untuned))
    log.info("after:  %s", sentence(chosen.metrics))
    if chosen.metrics["score"] <= progress.untuned["score"]:
        log.warning("NO BETTER THAN UNTUNED on the validation images: submit with model_not_tuned.py, or "
                    "give other images, a smaller --lr, or another --loss")  # fmt: skip
    log.info("wrote %s", folder / BEST)


def recipe_of(
    training: Training, metrics: dict[str, Any], embedding: str = ALONE, weight: float = 1.0
) -> Recipe:
    """What the checkpoint says of itself."""
    import timm
    import torchvision

    tuned, untuned, settings = training.tuned, training.untuned, training.settings
    prepare = untuned.prepare if embedding == JOINED else tuned.prepare
    versions = {"python": platform.python_version(), "torch": str(torch.__version__),
                "torchvision": torchvision.__version__, "timm": timm.__version__}  # fmt: skip
    return Recipe(
        word=settings.model,
        prepare=described(prepare),
        mean=tuned.mean,
        std=tuned.std,
        folded=training.folded,
        mapped=settings.freeze == "backbone",
        tuned_size=tuned.prepare.size,
        embedding=embedding,
        weight=weight,
        loss=settings.loss,
        settings=settings.model_dump(mode="json") | training.choices,
        classes=training.squares.classes,
        versions=versions,
        metrics=metrics,
    )
