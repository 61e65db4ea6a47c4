"""A training in; the files that let it go on after any stop, and say how it went, out.

fine_tuned_model.pth    the best so far, for model_fine_tuned.py
last.pth                everything that the next step needs
best.pth                the weights of the epoch that is kept
history.jsonl           a line an epoch
loss.png                the loss and the validation over the epochs
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrieval.backbones.fine_tuned import write_checkpoint
from retrieval.backbones.weights import unpickle
from retrieval.distributed import is_first
from retrieval.errors import InputError, RunError
from retrieval.files import as_json, lock, write_whole
from retrieval.settings import Form
from supcon.batches import Split

if TYPE_CHECKING:
    from torch import nn

BEST, LAST, BEST_EPOCH = "fine_tuned_model.pth", "last.pth", "best.pth"
HISTORY, CURVE = "history.jsonl", "loss.png"
FILES = (BEST, LAST, BEST_EPOCH, HISTORY, CURVE)
# What may differ when a training goes on: where and how long, not what is learned.
FREE = {"resume", "overwrite", "device", "minutes", "save_dir", "train_dir", "micro_batch", "tracker"}


@dataclass
class Progress:
    """How far a training is."""

    epoch: int = 0  # whole ones
    step: int = 0  # in the epoch
    seconds: float = 0.0
    highest: dict[str, Any] | None = None  # of all epochs' scores, and what each query earned
    kept: float = -1.0  # the score of the embedding that was chosen
    chosen: int = 0  # after how many epochs its embedding was chosen
    losses: list[float] = field(default_factory=list)  # of this epoch's steps; NaN: skipped
    spent: float = 0.0  # seconds in this epoch's steps
    untuned: dict[str, Any] | None = None  # the figures before the first epoch
    history: list[dict[str, Any]] = field(default_factory=list)


@contextmanager
def open_folder(settings: Form, split: Split) -> Iterator[dict[str, Any] | None]:
    """Make the folder of a training; what lies in it to go on from, if that is asked for.

    `with` it, no other training writes into the folder meanwhile.

    Raises InputError where another run writes into it now, where it holds another run and neither --resume
    nor --overwrite is given, where --resume finds nothing to go on from, or other settings or images than it
    had. What --overwrite replaces is moved to earlier/ when the new training begins.
    """
    folder = settings.save_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"--save_dir {folder} is not a folder but a file: give another one") from None
    with ExitStack() as held:
        if is_first():
            held.enter_context(lock(folder, "save_dir"))
            for name in FILES:
                for unfinished in folder.glob(f".{name}.unfinished-*"):  # by a training that was killed
                    unfinished.unlink(missing_ok=True)
        yield _what_lies_there(settings, split)


def _what_lies_there(settings: Form, split: Split) -> dict[str, Any] | None:
    folder = settings.save_dir
    there = [name for name in FILES if (folder / name).exists()]
    if settings.resume and settings.overwrite:
        raise InputError("--resume goes on with a run and --overwrite replaces it: give one of them")
    if settings.resume:
        if LAST not in there:
            raise InputError(f"{folder} holds no {LAST} to go on from: run it without --resume")
        saved = unpickle(folder / LAST)
        _check_same(saved, settings, split)
        return saved
    if there and not settings.overwrite:
        raise InputError(
            f"{folder} holds another run ({', '.join(there)}): --resume goes on with it, --overwrite moves "
            "it to earlier/, and another --save_dir leaves it alone"
        )
    return None


def check_room(folder: Path, network: nn.Module) -> None:
    """Raise RunError where what a training of this network writes does not fit on the disk of its folder.

    That is the weights once in best.pth, twice in fine_tuned_model.pth and four times in last.pth (with
    AdamW's two averages and that of --ema), and what is being written stands beside what it replaces.
    """
    needed = 11 * sum(part.nbytes for part in network.state_dict().values())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise RunError(
            f"the checkpoints of this network take up to {needed / 1e6:.0f} MB, and the disk of {folder} has "
            f"{free / 1e6:.0f} left: make room, or give another --save_dir"
        )
    with tempfile.TemporaryFile(dir=folder):  # a folder that cannot be written raises its OSError now
        pass


def _check_same(saved: dict[str, Any], settings: Form, split: Split) -> None:
    """Raise InputError, with what differs, unless a training goes on with the settings and images it had."""
    before, now = saved["settings"], settings.model_dump(mode="json")
    differing = [name for name in now if name not in FREE and before.get(name) != now[name]]
    changed = [f"--{name} was {before.get(name)} and is {now[name]}" for name in differing]
    if saved["images"] != digest(split):
        changed.append(f"the images in {settings.train_dir} are others")
    if changed:
        raise InputError(
            f"--resume goes on with the run in {settings.save_dir} as it was, but {'; '.join(changed)}: "
            "give what it had, or another --save_dir"
        )


def digest(split: Split) -> str:
    """One short word for the names of the images."""
    names = [file.name for file in [*split.train, *split.validation]]
    return hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def write_history(folder: Path, progress: Progress) -> None:
    """history.jsonl, whole: a training that goes on from an earlier step leaves no line of a later one."""
    write_whole(folder / HISTORY, b"".join(as_json(line) + b"\n" for line in progress.history))


def write_last(folder: Path, progress: Progress, **state: Any) -> None:
    """last.pth, whole or not at all."""
    write_checkpoint(folder / LAST, state | {"progress": asdict(progress)})
