"""The settings and figures of a run in; the same in TensorBoard or Weights & Biases, where asked for, out.

The trackers are accelerate's. Whatever one of them raises costs the tracking, never the run.
"""

from __future__ import annotations

import logging
import math
import os
import re
import secrets
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from retrieval.errors import InputError
from retrieval.settings import Form, Tracker

PROJECT = "image-retrieval"  # at Weights & Biases, unless WANDB_PROJECT names another
LONGEST_START, LONGEST_END = 20, 60  # seconds that a run waits for wandb's network

log = logging.getLogger("retrieval.tracking")


def check_tracker(tracker: Tracker) -> None:
    """Raise InputError, with what to do, where this tracker cannot be used: before any image is read."""
    if tracker == "none":
        return
    found = find_spec(tracker)
    if not found or not found.origin:  # a folder of that name is not the package
        raise InputError(f"--tracker {tracker} needs the package {tracker}: run pip install {tracker}")
    if tracker == "wandb":
        _check_login()


def _check_login() -> None:
    """Raise InputError unless wandb has a key, or works offline. It is never let ask for one: a run waits."""
    try:
        wandb = _silent_wandb()
        local = wandb.setup().settings.mode in ("offline", "dryrun", "disabled")
        problem = "" if local or wandb.login(prompt=False, verify=False) else "there is no key"
    except Exception as error:  # of any kind: a broken key, an unknown WANDB_MODE, a version of long ago
        problem = " ".join(str(error).split())
    if problem:
        raise InputError(
            f"--tracker wandb cannot log in ({problem}): run `wandb login`, or set WANDB_MODE=offline"
        )


def _silent_wandb() -> ModuleType:
    """The package, which prints nothing from now on, leaves the console alone, and never waits for long."""
    import wandb

    wandb.setup(
        wandb.Settings(
            silent=True,
            console="off",
            init_timeout=LONGEST_START,
            finish_timeout=LONGEST_END,
            finish_timeout_raises=True,
        )
    )
    return wandb


# ---- a run ----------------------------------------------------------------------------------------


@dataclass
class Tracking:
    """A run that is tracked, until the end of a `with`; without a tracker, one that only counts its steps."""

    run: str = ""  # its name there, which no other run has
    step: int = 0  # the last
    tracker: Any = None  # accelerate's

    @property
    def state(self) -> dict[str, Any]:
        """What start_tracking needs to go on with this run."""
        return {"run": self.run, "step": self.step}

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        """Track the numbers among these values at a step; None: at the last one."""
        self.step = self.step if step is None else step
        if self.tracker:
            self.attempt(lambda: self.tracker.log(numbers(values), step=self.step))

    def end(self) -> None:
        """Write or upload what is left."""
        if self.tracker:
            self.attempt(self.tracker.finish)
        self.tracker = None

    def __enter__(self) -> Tracking:
        return self

    def __exit__(self, *_: Any) -> None:
        self.end()

    def attempt(self, act: Callable[[], Any]) -> None:
        """Do what a tracker may fail in, with its disk or its network; if so warn, and track no more."""
        try:
            act()
        except Exception as error:  # of any kind
            self.tracker = None
            why = str(error).partition("\n")[0] or type(error).__name__
            log.warning("tracking has failed (%s): this run goes on without it", why)
            if "wandb" in sys.modules:
                with suppress(Exception):  # a wandb that has died would say so at exit, in a traceback
                    sys.modules["wandb"].teardown()


def start_tracking(
    tracker: Tracker,
    folder: Path,
    name: str,
    config: dict[str, Any],
    before: dict[str, Any] | None = None,
) -> Tracking:
    """Begin to track a run, below its folder; or go on with one, of which `before` was the state.

    What was tracked after that state is forgotten. The config is kept as far as it is words and numbers.
    Raises nothing: a tracker that cannot begin is warned of. With "none" nothing is imported or written.
    """
    tracking = Tracking(**(before or {"run": _unique(name)}))
    if tracker != "none":
        plain = {word: value for word, value in config.items() if isinstance(value, str | int | float)}
        tracking.attempt(lambda: _begin(tracking, tracker, folder, name, plain))
    return tracking


def track_run(tracker: Tracker, folder: Path, name: str, settings: Form, figures: dict[str, Any]) -> None:
    """Track a run that is over, as start_tracking does: its settings, and the numbers in its figures."""
    with start_tracking(tracker, folder, name, settings.model_dump(mode="json")) as tracking:
        tracking.log(figures)


def numbers(values: dict[str, Any], group: str = "") -> dict[str, float]:
    """The finite numbers among nested values, each named by the path to it.

    >>> numbers({"k": 3, "tuned": True, "per_class": {"sea": {"top_1": 0.5, "top_1_interval": [0.2, 0.8]}}})
    {'k': 3, 'per_class/sea/top_1': 0.5}
    """
    found = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= numbers(value, f"{group}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            found[f"{group}{name}"] = value
    return found


def _unique(name: str) -> str:
    """When, what and four digits of chance: a name for a folder, and at Weights & Biases."""
    what = re.sub(r"[^A-Za-z0-9_.]+", "-", name)[:60]
    return f"{datetime.now():%Y%m%d-%H%M%S}-{what}-{secrets.token_hex(2)}"


# ---- accelerate's trackers ------------------------------------------------------------------------


def _begin(tracking: Tracking, tracker: Tracker, folder: Path, name: str, config: dict[str, Any]) -> None:
    from accelerate.state import PartialState

    PartialState(cpu=True)  # which the trackers ask whether this is the main process; it touches no device
    made = _tensorboard(tracking, folder) if tracker == "tensorboard" else _wandb(tracking, folder, name)
    made.start()
    tracking.tracker = made
    made.store_init_configuration(config)
    log.info("tracking: %s", _where(tracker, made.tracker, folder))


def _tensorboard(tracking: Tracking, folder: Path) -> Any:
    from accelerate.tracking import TensorBoardTracker

    return TensorBoardTracker(tracking.run, folder / "tensorboard", purge_step=tracking.step + 1)


def _wandb(tracking: Tracking, folder: Path, name: str) -> Any:
    from accelerate.tracking import WandBTracker

    _silent_wandb()
    folder.mkdir(parents=True, exist_ok=True)  # or wandb takes another one
    project = os.environ.get("WANDB_PROJECT") or PROJECT
    return WandBTracker(project, dir=str(folder), id=tracking.run, name=name, resume="allow")


def _where(tracker: Tracker, run: Any, folder: Path) -> str:
    """How to see a run that has begun."""
    if tracker == "tensorboard":
        return f"tensorboard --logdir {folder / 'tensorboard'} shows this run"
    if run.disabled:
        return "WANDB_MODE=disabled keeps nothing of this run"
    if run.offline:
        return f"wandb sync {Path(run.dir).parent} uploads this run"
    return f"this run is at {run.url}"
