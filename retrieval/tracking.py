"""The settings and metrics of a run in; the same in TensorBoard or Weights & Biases, if asked for, out.

The trackers are accelerate's. If one of them fails, a warning says so, and the run goes on without it.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from secrets import token_hex
from typing import Any

from retrieval.errors import InputError
from retrieval.machine import version_of
from retrieval.settings import Form, Tracker

PROJECT = "image-retrieval"  # at Weights & Biases, unless WANDB_PROJECT names another
LONGEST_START, LONGEST_END = 20, 60  # seconds that a run waits for wandb's network

log = logging.getLogger("retrieval.tracking")


def check_tracker(tracker: Tracker) -> None:
    """Raise InputError, before any image is read, if this tracker cannot be used: it says what to do."""
    if tracker == "none":
        return
    if not version_of(tracker):
        raise InputError(f"--tracker {tracker} needs the package {tracker}: run pip install {tracker}")
    if tracker == "wandb" and (problem := _log_in_to_wandb()):
        raise InputError(
            f"--tracker wandb cannot log in ({problem}): run `wandb login`, or set WANDB_MODE=offline"
        )


def _log_in_to_wandb() -> str:
    """Log in, unless wandb works offline; return what prevents it, or nothing.

    From now on wandb never asks for a key, never waits for long, and prints nothing.
    """
    try:
        import wandb

        settings = wandb.Settings(silent=True, console="off", init_timeout=LONGEST_START,
                                  finish_timeout=LONGEST_END, finish_timeout_raises=True)  # fmt: skip
        local = wandb.setup(settings).settings.mode in ("offline", "dryrun", "disabled")
        return "" if local or wandb.login(prompt=False, verify=False) else "there is no key"
    except Exception as error:  # of any kind: a malformed key, an unknown WANDB_MODE, an old version
        return " ".join(str(error).split())


@dataclass
class Tracking:
    """A tracked run. Leaving its `with` block ends it. If `tracker` is None, it only counts the steps."""

    run: str = ""  # its unique name in the tracker
    step: int = 0  # the latest
    tracker: Any = None  # of accelerate

    @property
    def state(self) -> dict[str, Any]:
        """What start_tracking needs to resume this run."""
        return {"run": self.run, "step": self.step}

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        """Track the numeric values at `step`, by default at the latest step."""
        self.step = self.step if step is None else step
        with self.dropped_if_it_fails():
            if self.tracker:
                self.tracker.log(numbers(values), step=self.step)

    def __enter__(self) -> Tracking:
        return self

    def __exit__(self, *_: object) -> None:
        with self.dropped_if_it_fails():
            if self.tracker:
                self.tracker.finish()
        self.tracker = None

    @contextmanager
    def dropped_if_it_fails(self) -> Iterator[None]:
        """Warn and drop the tracker if it raises, for example because its disk is full or it is offline."""
        try:
            yield
        except Exception as error:  # of any kind
            self.tracker = None
            why = str(error).partition("\n")[0] or type(error).__name__
            log.warning("tracking has failed (%s): this run goes on without it", why)


def start_tracking(
    tracker: Tracker, folder: Path, name: str, config: dict[str, Any], before: dict[str, Any] | None = None
) -> Tracking:
    """Begin to track a run in its folder, or resume the run whose state was `before`.

    A resumed run forgets the steps after that state. Only text and numbers in the config are kept.
    Raises nothing: a tracker that cannot begin is a warning. With "none" nothing is imported or written.
    """
    unique = f"{datetime.now():%Y%m%d-%H%M%S}-{re.sub('[^A-Za-z0-9_.]+', '-', name)[:60]}-{token_hex(2)}"
    tracking = Tracking(**(before or {"run": unique}))
    if tracker == "none":
        return tracking
    with tracking.dropped_if_it_fails():
        from accelerate.state import PartialState

        PartialState(cpu=True)  # the trackers ask it whether this is the main process; it touches no device
        start = _start_tensorboard if tracker == "tensorboard" else _start_wandb
        tracking.tracker = start(tracking, folder, name)
        plain = {key: value for key, value in config.items() if isinstance(value, str | int | float)}
        tracking.tracker.store_init_configuration(plain)
    return tracking


def track_run(tracker: Tracker, folder: Path, name: str, settings: Form, metrics: dict[str, Any]) -> None:
    """Track a finished run, as start_tracking does: its settings, and the numbers in its metrics."""
    with start_tracking(tracker, folder, name, settings.model_dump(mode="json")) as tracking:
        tracking.log(metrics)


def _start_tensorboard(tracking: Tracking, folder: Path, _: str) -> Any:
    from accelerate.tracking import TensorBoardTracker

    started = TensorBoardTracker(tracking.run, folder / "tensorboard", purge_step=tracking.step + 1)
    started.start()
    log.info("tracking: tensorboard --logdir %s shows this run", folder / "tensorboard")
    return started


def _start_wandb(tracking: Tracking, folder: Path, name: str) -> Any:
    from accelerate.tracking import WandBTracker

    folder.mkdir(parents=True, exist_ok=True)  # or wandb takes another folder
    project = os.environ.get("WANDB_PROJECT") or PROJECT
    started = WandBTracker(project, dir=str(folder), id=tracking.run, name=name, resume="allow")
    started.start()
    run = started.tracker
    where = f"wandb sync {Path(run.dir).parent} uploads this run" if run.offline else run.url
    log.info("tracking: %s", where)
    return started


def numbers(values: dict[str, Any], group: str = "") -> dict[str, float]:
    """Return the numbers among nested values, each under the path to it.

    >>> numbers({"k": 3, "tuned": True, "per_class": {"sea": {"top_1": 0.5, "top_1_interval": [0.2, 0.8]}}})
    {'k': 3, 'per_class/sea/top_1': 0.5}
    """
    found = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= numbers(value, f"{group}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[f"{group}{name}"] = value
    return found
