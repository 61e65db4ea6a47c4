"""The state of a training in; validated epochs, and the checkpoint of the best way to embed, out."""

from __future__ import annotations

import copy
import logging
import math
import platform
import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch

from retrieval.backbones.backbone import package_versions
from retrieval.backbones.fine_tuned import (
    ALONE,
    JOINED,
    MIXED,
    Mapped,
    Recipe,
    write_checkpoint,
    write_fine_tuned,
)
from retrieval.backbones.timm_names import hub_config
from retrieval.backbones.weights_file import unpickle
from retrieval.distributed import all_agree, from_rank_0, progress_bar, rank, rank_zero_only
from retrieval.errors import RunError
from retrieval.files import as_json, write_whole
from retrieval.metrics import compare
from retrieval.report.charts import curves
from supcon.checkpoints import BEST, BEST_EPOCH, CURVE, HISTORY
from supcon.layers import share_of_rate
from supcon.state import TrainingState, save
from supcon.steps import StepInputs, planned_steps, step, with_views
from supcon.validation import (
    COLLAPSED,
    best_of,
    candidates,
    check_written,
    enough,
    is_better,
    mixed,
    validate,
)

MANY_SKIPPED = 0.1  # share of an epoch's steps
SAVE_EVERY = 300  # seconds
FIRST_STEPS = 3  # which have to change the weights
TRACKED = ("top_1", "top_3", "score", "mean_cosine")  # metrics that a tracker gets

log = logging.getLogger("retrieval.training")


def fit(training: TrainingState) -> None:
    """Train until the epochs or the minutes are over, validate after each epoch, and keep the best one.

    Raises KeyboardInterrupt after Ctrl-C, when everything is saved; RunError as step, if a step
    changes no weight, or if the minutes are over before the first step.
    """
    progress, settings = training.progress, training.settings
    if progress.untuned is None:
        _validate_untuned(training)
    else:
        log.info("going on in epoch %d after %d steps", progress.epoch + 1, progress.step)
    clock = _Clock(training)
    with _stopping_between_steps() as interrupts:
        while progress.epoch < settings.epochs and clock.passed() < 1:
            _one_epoch(training, clock, interrupts)
            _end_epoch(training, clock)
            progress.epoch, progress.step, progress.losses, progress.spent = progress.epoch + 1, 0, [], 0.0
            save(training)
            if not all_agree(not interrupts):
                _stop(training)
    if rank() == 0 and not progress.history:
        raise RunError(
            f"--minutes {settings.minutes:g} are over before the first step: reading the images and looking "
            f"at the untuned network took {(clock.start - training.started) / 60:.1f}, and the end takes "
            f"{clock.reserve / 60:.1f} more"
        )


def _one_epoch(training: TrainingState, clock: _Clock, interrupts: list[bool]) -> None:
    """Take the remaining steps of an epoch, as far as the minutes last."""
    progress, plan = training.progress, planned_steps(training)
    size, saved = training.batch_size, time.perf_counter()
    with closing(with_views(training, plan[progress.step :])) as coming, progress_bar(
        len(plan) * size, f"epoch {progress.epoch + 1}", initial=progress.step * size, leave=False
    ) as bar:  # fmt: skip
        for inputs in coming:
            if (passed := clock.passed()) >= 1:
                break
            _one_step(training, inputs, len(plan), passed)
            bar.update(size)
            bar.set_postfix(loss=f"{torch.tensor(progress.losses[-20:]).nanmean():.3f}", refresh=False)
            if not all_agree(not interrupts):
                _stop(training)
            if time.perf_counter() - saved > SAVE_EVERY:
                save(training)
                saved = time.perf_counter()


class _Clock:
    """The time for the steps of this training, which --minutes limits."""

    def __init__(self, training: TrainingState) -> None:
        # For the last validation and the choice of the embedding: eight times the first validation.
        untuned = training.progress.untuned  # only rank 0 has validated
        self.reserve = 8 * untuned["seconds"] if untuned else 0.0
        self.start = time.perf_counter()
        self.end = training.started + 60 * (training.settings.minutes or math.inf) - self.reserve

    def passed(self) -> float:
        """Return the share of the time that has passed, by rank 0's clock; inf when it is over."""
        now = time.perf_counter()
        return from_rank_0((now - self.start) / (self.end - self.start) if now < self.end else math.inf)


def _time_left(training: TrainingState, clock: _Clock) -> str:
    """Return, in words, about how long the remaining epochs and the choice of the embedding will take."""
    progress = training.progress
    epochs = training.settings.epochs - progress.epoch - 1
    if not epochs:
        return ""
    steps = epochs * (progress.spent + progress.untuned["seconds"])
    seconds = max(0.0, min(steps, clock.end - time.perf_counter())) + clock.reserve
    return f" · about {seconds:.0f} s left" if seconds < 90 else f" · about {seconds / 60:.0f} min left"


def _one_step(training: TrainingState, inputs: StepInputs, steps: int, passed: float) -> None:
    """Take one of the epoch's steps at its learning rate, which has come down when the minutes are over.

    Raises RunError if one of the first steps changes no weight of the network.
    """
    progress, settings = training.progress, training.settings
    started = time.perf_counter()
    done = progress.epoch * steps + progress.step
    share = (done + 0.5) / (settings.epochs * steps)  # the middle of the step: the rate is never 0
    rate = share_of_rate(max(share, passed), settings.warmup)
    for group in training.optimizer.param_groups:
        group["lr"] = group["rate"] * rate
    before = [p.detach().clone() for p in _trained_weights(training)] if done < FIRST_STEPS else None
    loss = step(training, *inputs)
    progress.losses.append(loss if math.isfinite(loss) else math.nan)
    progress.step += 1
    training.tracking.log({"train/loss": loss, "train/learning_rate": settings.lr * rate}, done + 1)
    progress.spent += time.perf_counter() - started
    if before and not training.bad_steps and all(map(torch.equal, before, _trained_weights(training))):
        raise RunError("a step has changed no weight of the network: its output does not depend on them")


def _trained_weights(training: TrainingState) -> list[torch.nn.Parameter]:
    return [p for p in training.tuned.network.parameters() if p.requires_grad]


@rank_zero_only
def _validate_untuned(training: TrainingState) -> None:
    """Validate the untuned network, and log its metrics."""
    started = time.perf_counter()
    metrics = validate(training.validation, training.untuned)
    metrics["seconds"] = time.perf_counter() - started
    training.progress.untuned = metrics
    log.info("untuned: %s", in_words(metrics))
    training.tracking.log({"validation": _tracked(metrics)}, 0)
    save(training)


def without_points(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return the metrics without the points of each query."""
    return {name: value for name, value in metrics.items() if name != "points"}


def _tracked(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: metrics[name] for name in TRACKED}


def in_words(metrics: dict[str, Any]) -> str:
    """Return the metrics of a validation in a line."""
    low, high = metrics["score_interval"]
    return (
        f"top-1 {metrics['top_1']:.3f} · top-3 {metrics['top_3']:.3f} · score {metrics['score']:.0f} "
        f"[{low:.0f}, {high:.0f}]"
    )


@rank_zero_only
def _end_epoch(training: TrainingState, clock: _Clock) -> None:
    """Validate, keep the network unless an earlier one is shown to be better, and write the epoch's line.

    Among epochs that validation cannot tell apart, the latest is kept: its learning rate is the lowest, and
    the highest of several scores is high by chance too.
    """
    progress, folder = training.progress, training.settings.save_dir
    metrics = validate(training.validation, training.current)
    loss = torch.tensor(progress.losses, dtype=torch.float64).nanmean().item()  # NaN: skipped
    images = len(progress.losses) * training.batch_size
    skipped = sum(map(math.isnan, progress.losses))
    line = {"epoch": progress.epoch + 1, "loss": loss if math.isfinite(loss) else None,
            "skipped_steps": skipped, "images": images,
            "seconds": progress.spent} | without_points(metrics)  # fmt: skip
    kept = not progress.highest or not is_better(progress.highest, metrics)
    lower = progress.highest and metrics["score"] < progress.highest["score"]
    word = "" if not kept else " · kept: not told apart from the best" if lower else " · kept"
    left_out = (
        f" · {skipped} of {len(progress.losses)} steps skipped, without a finite loss" if skipped else ""
    )
    log.info("epoch %d of %d: loss %.3f%s · %s · %.0f images/s%s%s", line["epoch"], training.settings.epochs,
             loss, left_out, in_words(metrics), images / max(progress.spent, 1e-9),
             _time_left(training, clock), word)  # fmt: skip
    if skipped > MANY_SKIPPED * len(progress.losses):
        log.warning("%d of %d steps had no finite loss, and nothing was learnt from them: give a smaller "
                    "--lr", skipped, len(progress.losses))  # fmt: skip
    if metrics["mean_cosine"] > COLLAPSED:
        log.warning("the embeddings have collapsed: two images have a cosine of %.3f in the mean; give a "
                    "smaller --lr", metrics["mean_cosine"])  # fmt: skip
    train = {"epoch": line["epoch"], "epoch_loss": loss, "skipped_steps": line["skipped_steps"],
             "images_per_second": images / max(progress.spent, 1e-9)}  # fmt: skip
    training.tracking.log({"train": train, "validation": _tracked(metrics)})
    progress.history.append(line)
    # Anew, so that a resumed training leaves no line of a later epoch.
    write_whole(folder / HISTORY, b"".join(as_json(line) + b"\n" for line in progress.history))
    if kept:
        both = {"untuned": without_points(progress.untuned), "tuned": without_points(metrics)}
        both["epoch"] = line["epoch"]
        state = training.current.network.state_dict()
        write_checkpoint(folder / BEST_EPOCH, {"tuned": state, "metrics": both})
        if metrics["score"] > progress.kept:  # better than an earlier choice, if there was one
            write_fine_tuned(folder / BEST, recipe_of(training, both), state)
    if not progress.highest or metrics["score"] > progress.highest["score"]:
        progress.highest = {name: metrics[name] for name in ("score", "points")}


@contextmanager
def _stopping_between_steps() -> Iterator[list[bool]]:
    """Yield a list to which Ctrl-C adds an entry, so that no step is cut off; a second Ctrl-C raises."""
    interrupts: list[bool] = []

    def _interrupt(*_: Any) -> None:
        if interrupts:
            raise KeyboardInterrupt
        interrupts.append(True)

    handler = signal.signal(signal.SIGINT, _interrupt)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, handler)


def _stop(training: TrainingState) -> None:
    """Save, log how to resume, and raise KeyboardInterrupt."""
    save(training)
    log.warning("stopped in epoch %d after %d steps, and saved: the same command with --resume goes on",
                training.progress.epoch + 1, training.progress.step)  # fmt: skip
    raise KeyboardInterrupt


# ---- the end --------------------------------------------------------------------------------------


@rank_zero_only
def choose(training: TrainingState) -> None:
    """Choose on validation how to embed with the best network, and write the checkpoint that embeds so.

    Logs how it compares with the untuned network, and draws the curves.
    """
    progress, folder = training.progress, training.settings.save_dir
    if progress.chosen == progress.epoch:
        log.info("this training had come to its end: %s holds its result", folder / BEST)
        return
    started = time.perf_counter()
    kept = unpickle(folder / BEST_EPOCH)
    # A copy: last.pth keeps the weights that belong to its optimiser.
    best = replace(training.tuned, network=copy.deepcopy(training.current.network))
    best.network.load_state_dict(kept["tuned"])
    found = candidates(training.validation, training.untuned, best)
    chosen, reason = best_of(found, progress.untuned, by_view=bool(training.validation.views))
    log.info("%d ways to embed compared in %.1f s: %s is chosen", len(found),
             time.perf_counter() - started, chosen)  # fmt: skip
    log.info("epoch %d scored %.0f with the tuned network alone; %s scores %.0f, and is chosen since %s",
             kept["metrics"]["epoch"], found[0].metrics["score"], chosen, chosen.metrics["score"],
             reason)  # fmt: skip
    network = best.network.state_dict()
    if chosen.embedding == MIXED:
        network = mixed(training.untuned, best, chosen.weight).network.state_dict()
    joined = training.untuned.network.state_dict() if chosen.embedding == JOINED else None
    metrics = kept["metrics"] | {
        "tuned": without_points(chosen.metrics),
        "candidates": {str(candidate): candidate.metrics["score"] for candidate in found},
    }
    recipe = recipe_of(training, metrics, chosen.embedding, chosen.weight)
    write_fine_tuned(folder / BEST, recipe, network, joined)
    check_written(folder / BEST, chosen, training.validation, training.device)
    progress.chosen, progress.kept = progress.epoch, chosen.metrics["score"]
    save(training)
    training.tracking.log({"chosen": _tracked(chosen.metrics)})
    try:
        write_whole(folder / CURVE, curves(progress.history, progress.untuned).png)
    except OSError as error:  # the checkpoint is written, and its training must still be told
        log.warning("%s could not be written (%s): make room", error.filename, error.strerror)
    _log_before_and_after(progress.untuned, chosen.metrics)
    log.info("wrote %s", folder / BEST)


def _log_before_and_after(untuned: dict[str, Any], tuned: dict[str, Any]) -> None:
    gain, (low, high) = compare(tuned["points"], untuned["points"])
    log.info("before: %s", in_words(untuned))
    log.info("after:  %s", in_words(tuned))
    if low <= 0:
        images = len(tuned["points"])
        more = f"about {enough(gain, low, images)} would tell if it stays so" if gain >= 1 else "no gain"
        log.warning("NOT SHOWN TO BE BETTER THAN UNTUNED: %+.0f points [%+.0f, %+.0f] of 1000 on %d "
                    "validation images; %s. The result stays near the untuned network, which "
                    "model_not_tuned.py runs as it is; more images or a smaller --lr may show more",
                    gain, low, high, images, more)  # fmt: skip


def recipe_of(
    training: TrainingState, metrics: dict[str, Any], embedding: str = ALONE, weight: float = 1.0
) -> Recipe:
    """Return the recipe that a checkpoint carries."""
    tuned, untuned, settings = training.tuned, training.untuned, training.settings
    prepare = untuned.transform if embedding == JOINED else tuned.transform
    # From the installed packages' metadata: importing timm and torchvision would take seconds.
    versions = {"python": platform.python_version()} | package_versions()
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
        classes=training.images.classes,
        versions=versions,
        metrics=metrics,
        history=training.progress.history,
        hub_config=hub_config(settings.model),
    )
