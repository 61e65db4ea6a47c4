"""A training in; epochs of it, each validated, the best kept, and the choice of how to embed, out."""

from __future__ import annotations

import copy
import logging
import math
import platform
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from retrieval.backbones.fine_tuned import (
    ALONE,
    JOINED,
    MIXED,
    Mapped,
    Recipe,
    load_fine_tuned,
    write_checkpoint,
    write_fine_tuned,
)
from retrieval.backbones.timm_zoo import hub_config
from retrieval.backbones.weights import unpickle
from retrieval.distributed import all_say, is_first
from retrieval.errors import RunError
from retrieval.machine import version_of
from retrieval.metrics import compare
from retrieval.report.charts import draw_curves
from supcon.batches import by_class, shuffled
from supcon.checkpoints import BEST, BEST_EPOCH, CURVE, write_history
from supcon.gather import from_the_first
from supcon.layers import share_of_rate
from supcon.state import Training, save
from supcon.steps import Prepared, prepared, step
from supcon.validation import COLLAPSED, Candidate, best_of, candidates, is_better, mixed, validate

PACKAGES = ("torch", "torchvision", "timm")  # whose versions a checkpoint names
SAVE_EVERY = 300  # seconds
FIRST_STEPS = 3
FOLLOWED = ("top_1", "top_3", "score", "mean_cosine")  # by a tracker
SAME_SCORE = 5.0  # points: a GPU need not give the same bits twice

log = logging.getLogger("retrieval.training")


def fit(training: Training) -> None:
    """Train until the epochs or the minutes are over, validate after each epoch, and keep the best.

    Raises KeyboardInterrupt after Ctrl-C, when everything is saved; RunError where it cannot learn.
    """
    progress, settings = training.progress, training.settings
    if progress.untuned is None and is_first():
        _look_before(training)
    elif progress.untuned:
        log.info("going on in epoch %d after %d steps", progress.epoch + 1, progress.step)
    clock = _Clock(training)
    with _stop_between_steps() as stopped:
        while progress.epoch < settings.epochs and not clock.over():
            batches = _batches(training)
            with closing(prepared(training, batches)) as coming, tqdm(
                total=len(batches) * len(batches[0]), initial=progress.step * len(batches[0]),
                desc=f"epoch {progress.epoch + 1}", unit="image", leave=False,
                disable=not is_first()) as bar:  # fmt: skip
                while progress.step < len(batches) and not clock.over():
                    _one_step(training, coming, len(batches), clock)
                    bar.update(len(batches[0]))
                    bar.set_postfix(loss=f"{_mean(progress.losses[-20:]):.3f}", refresh=False)
                    leaving = not all_say(not stopped)
                    if leaving or clock.time_to_save():
                        save(training)
                    if leaving:
                        _leave(training)
            if is_first():
                _end_epoch(training, clock)
            progress.epoch, progress.step, progress.losses, progress.spent = progress.epoch + 1, 0, [], 0.0
            clock.tick()
            save(training)
            if not all_say(not stopped):
                _leave(training)
    if is_first() and not progress.history:
        raise RunError(
            f"--minutes {settings.minutes:g} are over before the first step: reading the images and looking "
            f"at the untuned network took {progress.seconds / 60:.1f}, and the end takes "
            f"{clock.reserve / 60:.1f} more"
        )


class _Clock:
    """How long a training has taken, and may still take: of several processes, by the first one's clock."""

    def __init__(self, training: Training) -> None:
        self.training, self.before, self.saved = training, training.progress.seconds, time.perf_counter()
        # For the last validation and the choice of the embedding: eight times what the first one took.
        self.reserve = 8 * training.progress.untuned["seconds"] if is_first() else 0.0
        minutes = training.settings.minutes
        self.budget = self.before + 60 * minutes - self.reserve if minutes else math.inf
        self.tick()
        self.start = training.progress.seconds

    def tick(self) -> float:
        """The seconds so far, in this run and those that it goes on from."""
        self.training.progress.seconds = self.before + time.perf_counter() - self.training.started
        return self.training.progress.seconds

    def over(self) -> bool:
        """Whether the minutes are over."""
        return bool(from_the_first(self.tick() >= self.budget))

    def share(self) -> float:
        """The share of the time for steps that has passed; 0 where there is no end."""
        passed, whole = self.tick() - self.start, self.budget - self.start
        return from_the_first(passed / whole) if whole < math.inf else 0.0

    def left(self) -> str:
        """At the end of an epoch, in words: about how long the others will take, like it, and the choice."""
        progress, settings = self.training.progress, self.training.settings
        epochs = settings.epochs - progress.epoch - 1
        steps = epochs * (progress.spent + progress.untuned["seconds"])
        seconds = max(0.0, min(steps, self.budget - self.tick())) + self.reserve
        if not epochs:
            return ""
        return f" · about {seconds:.0f} s left" if seconds < 90 else f" · about {seconds / 60:.0f} min left"

    def time_to_save(self) -> bool:
        """Whether the last time was long ago."""
        if time.perf_counter() - self.saved < SAVE_EVERY:
            return False
        self.saved = time.perf_counter()
        return True


def _batches(training: Training) -> list[np.ndarray]:
    """The rows of this epoch's batches: they follow from the seed and the epoch."""
    random = np.random.default_rng((training.settings.seed, training.progress.epoch))
    squares, size = training.squares, training.settings.batch_size
    if training.variant.by_class:
        return by_class(squares.labels, size, training.choices["images_per_class"], random)
    return shuffled(len(squares.names), size, random)


def _one_step(training: Training, coming: Iterator[Prepared], steps: int, clock: _Clock) -> None:
    """The next of the epoch's so many steps."""
    progress, settings = training.progress, training.settings
    started = time.perf_counter()
    done = progress.epoch * steps + progress.step
    share = (done + 0.5) / (settings.epochs * steps)  # in the middle of the step: never a rate of 0
    rate = share_of_rate(max(share, clock.share()), settings.warmup)
    for group in training.optimizer.param_groups:
        group["lr"] = group["rate"] * rate
    before = [p.detach().clone() for p in _learned(training)] if done < FIRST_STEPS else None
    loss = step(training, *next(coming))
    progress.losses.append(loss if math.isfinite(loss) else math.nan)
    progress.step += 1
    training.tracking.log({"train/loss": loss, "train/learning_rate": settings.lr * rate}, done + 1)
    progress.spent += time.perf_counter() - started
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
    training.tracking.log({"validation": _followed(figures)}, 0)
    log.info(
        "chance level of the loss: %.2f, where it stays if nothing is learned", training.head.chance(views)
    )
    save(training)


def told(figures: dict[str, Any]) -> dict[str, Any]:
    """The figures without what each query earns."""
    return {name: value for name, value in figures.items() if name != "points"}


def _followed(figures: dict[str, Any]) -> dict[str, float]:
    return {name: figures[name] for name in FOLLOWED}


def sentence(figures: dict[str, Any]) -> str:
    """The figures of a validation in a line."""
    low, high = figures["score_interval"]
    return (
        f"top-1 {figures['top_1']:.3f} · top-3 {figures['top_3']:.3f} · score {figures['score']:.0f} "
        f"[{low:.0f}, {high:.0f}]"
    )


def _end_epoch(training: Training, clock: _Clock) -> None:
    """Validate, keep the network unless an earlier one is shown to be better, and write the epoch's line.

    Of those that validation cannot tell apart the latest is kept: its learning rate is the lowest, and the
    highest of several scores is high by chance too.
    """
    progress, folder = training.progress, training.settings.save_dir
    figures = validate(training.validation, training.judged)
    loss = _mean(progress.losses)
    images = len(progress.losses) * min(training.settings.batch_size, len(training.squares.names))
    line = {"epoch": progress.epoch + 1, "loss": loss if math.isfinite(loss) else None,
            "skipped_steps": sum(map(math.isnan, progress.losses)), "images": images,
            "seconds": progress.spent} | told(figures)  # fmt: skip
    kept = not progress.highest or not is_better(progress.highest, figures)
    lower = progress.highest and figures["score"] < progress.highest["score"]
    word = "" if not kept else " · kept: not told apart from the best" if lower else " · kept"
    log.info("epoch %d of %d: loss %.3f · %s · %.0f images/s%s%s", line["epoch"], training.settings.epochs,
             loss, sentence(figures), images / max(progress.spent, 1e-9),
             clock.left(), word)  # fmt: skip
    if figures["mean_cosine"] > COLLAPSED:
        log.warning("the embeddings have collapsed: two images have a cosine of %.3f in the mean; give a "
                    "smaller --lr", figures["mean_cosine"])  # fmt: skip
    train = {"epoch": line["epoch"], "epoch_loss": loss, "skipped_steps": line["skipped_steps"],
             "images_per_second": images / max(progress.spent, 1e-9)}  # fmt: skip
    training.tracking.log({"train": train, "validation": _followed(figures)})
    progress.history.append(line)
    write_history(folder, progress)
    if kept:
        metrics = {"untuned": told(progress.untuned), "tuned": told(figures), "epoch": line["epoch"]}
        state = training.judged.network.state_dict()
        write_checkpoint(folder / BEST_EPOCH, {"tuned": state, "metrics": metrics})
        if not progress.chosen or figures["score"] > progress.kept:  # than what an end before chose
            write_fine_tuned(folder / BEST, recipe_of(training, metrics), state)
    if not progress.highest or figures["score"] > progress.highest["score"]:
        progress.highest = {name: figures[name] for name in ("score", "points")}


def _mean(losses: list[float]) -> float:
    """Of those that are finite; NaN of none."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    return sum(finite) / len(finite) if finite else math.nan


@contextmanager
def _stop_between_steps() -> Iterator[list[bool]]:
    """A list that Ctrl-C fills, so that no step is broken off; a second Ctrl-C does."""
    stopped: list[bool] = []

    def _stop(*_: Any) -> None:
        if stopped:
            raise KeyboardInterrupt
        stopped.append(True)

    if threading.current_thread() is not threading.main_thread():  # Python handles signals there only
        yield stopped
        return
    handler = signal.signal(signal.SIGINT, _stop)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, handler)


def _leave(training: Training) -> None:
    """Say how to go on, and do as Ctrl-C does."""
    log.warning("stopped in epoch %d after %d steps, and saved: the same command with --resume goes on",
                training.progress.epoch + 1, training.progress.step)  # fmt: skip
    raise KeyboardInterrupt


# ---- the end --------------------------------------------------------------------------------------


def choose(training: Training) -> None:
    """Choose on validation how to embed with the best network, and write the checkpoint that does it.

    Says how that compares with the untuned network, and draws the curves. Only the first process does it.
    """
    progress, folder = training.progress, training.settings.save_dir
    if not is_first():
        return
    if progress.chosen == progress.epoch:
        log.info("this training had come to its end: %s holds its result", folder / BEST)
        return
    started = time.perf_counter()
    kept = unpickle(folder / BEST_EPOCH)
    # A copy: last.pth keeps the weights that its optimiser has come to.
    best = replace(training.tuned, network=copy.deepcopy(training.judged.network))
    best.network.load_state_dict(kept["tuned"])
    found = candidates(training.validation, training.untuned, best)
    chosen = best_of(found, progress.untuned, by_view=training.validation.views is not None)
    log.info("%d ways to embed compared in %.1f s: %s is chosen", len(found),
             time.perf_counter() - started, chosen)  # fmt: skip
    network = best.network.state_dict()
    if chosen.embedding == MIXED:
        network = mixed(training.untuned.network, best.network, chosen.weight).state_dict()
    joined = training.untuned.network.state_dict() if chosen.embedding == JOINED else None
    metrics = kept["metrics"] | {
        "tuned": told(chosen.metrics),
        "candidates": {str(candidate): candidate.metrics["score"] for candidate in found},
    }
    recipe = recipe_of(training, metrics, chosen.embedding, chosen.weight)
    write_fine_tuned(folder / BEST, recipe, network, joined)
    _check(training, chosen)
    progress.chosen, progress.kept = progress.epoch, chosen.metrics["score"]
    save(training)
    training.tracking.log({"chosen": _followed(chosen.metrics)})
    draw_curves(progress.history, progress.untuned, folder / CURVE)
    _say_before_and_after(progress.untuned, chosen.metrics)
    log.info("wrote %s", folder / BEST)


def _check(training: Training, chosen: Candidate) -> None:
    """Raise RunError unless the file that was written retrieves as well as what was chosen."""
    file = training.settings.save_dir / BEST
    score = validate(training.validation, load_fine_tuned(file, training.device))["score"]
    if abs(score - chosen.metrics["score"]) > SAME_SCORE:
        raise RunError(
            f"{file} scores {score:.0f} on the validation images where {chosen} scored "
            f"{chosen.metrics['score']:.0f}: do not use it, and report this"
        )


def _say_before_and_after(untuned: dict[str, Any], tuned: dict[str, Any]) -> None:
    gain, (low, high) = compare(tuned["points"], untuned["points"])
    log.info("before: %s", sentence(untuned))
    log.info("after:  %s", sentence(tuned))
    if low <= 0:
        log.warning("NOT SHOWN TO BE BETTER THAN UNTUNED: %+.0f points [%+.0f, %+.0f] of 1000 on %d "
                    "validation images. The result stays near the untuned network, which model_not_tuned.py "
                    "runs as it is; more images or a smaller --lr may show more",
                    gain, low, high, len(tuned["points"]))  # fmt: skip


def recipe_of(
    training: Training, metrics: dict[str, Any], embedding: str = ALONE, weight: float = 1.0
) -> Recipe:
    """What the checkpoint says of itself."""
    tuned, untuned, settings = training.tuned, training.untuned, training.settings
    prepare = untuned.transform if embedding == JOINED else tuned.transform
    # Of what is installed: to import timm and torchvision for them would take seconds.
    versions = {"python": platform.python_version()} | {name: version_of(name) for name in PACKAGES}
    return Recipe(
        word=settings.model,
        prepare=asdict(prepare),
        mean=tuned.mean,
        std=tuned.std,
        folded=training.folded,
        mapped=isinstance(tuned.network, Mapped),
        tuned_size=tuned.transform.size,
        embedding=embedding,
        weight=weight,
        loss=settings.loss,
        settings=settings.model_dump(mode="json") | training.choices,
        classes=training.squares.classes,
        versions=versions,
        metrics=metrics,
        history=training.progress.history,
        hub_config=hub_config(settings.model),
    )
