"""A training in; the files from which it can be resumed, and which show how it went, out.

fine_tuned_model.pth    the best network so far, for model_fine_tuned.py
last.pth                the state that --resume needs
best.pth                the weights of the best epoch
history.jsonl           the metrics of each epoch
loss.png                the loss and the validation scores over the epochs
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from torch import nn

from retrieval.backbones.weights_file import unpickle
from retrieval.distributed import rank
from retrieval.errors import InputError, RunError
from retrieval.files import lock
from retrieval.settings import Form
from supcon.batches import Split

BEST, LAST, BEST_EPOCH = "fine_tuned_model.pth", "last.pth", "best.pth"
HISTORY, CURVE = "history.jsonl", "loss.png"
FILES = (BEST, LAST, BEST_EPOCH, HISTORY, CURVE)
SAVED = {"settings": dict, "images": str, "progress": dict}  # in LAST, beside the weights
# The settings that --resume may change: where and how long a training runs, not what it learns.
MAY_CHANGE = {"resume", "overwrite", "device", "minutes", "save_dir", "train_dir", "micro_batch", "tracker"}


@contextmanager
def open_folder(settings: Form, split: Split) -> Iterator[dict[str, Any] | None]:
    """Make and lock the folder of a training; yield the content of last.pth if --resume is given.

    Raises InputError if another run writes into the folder now, if it holds another run and neither --resume
    nor --overwrite is given, or if --resume finds no last.pth, or one with other settings or images. The
    files that --overwrite replaces move to earlier/ when the new training begins.
    """
    folder = settings.save_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"--save_dir {folder} is not a folder but a file: give another one") from None
    with lock(folder, "save_dir") if rank() == 0 else nullcontext():
        if rank() == 0:
            for unfinished in folder.glob(".*.unfinished-*"):  # of a training that was killed
                unfinished.unlink(missing_ok=True)
        yield _checkpoint_to_resume(settings, split)


def _checkpoint_to_resume(settings: Form, split: Split) -> dict[str, Any] | None:
    folder = settings.save_dir
    there = [name for name in FILES if (folder / name).exists()]
    if settings.resume and settings.overwrite:
        raise InputError("--resume goes on with a run and --overwrite replaces it: give one of them")
    if settings.resume:
        if LAST not in there:
            raise InputError(f"{folder} holds no {LAST} to go on from: run it without --resume")
        saved = unpickle(folder / LAST)
        if not isinstance(saved, dict) or not SAVED.items() <= {k: type(v) for k, v in saved.items()}.items():
            raise InputError(
                f"{folder / LAST} is no state of a training: take it away, and run without --resume, or give "
                "the --save_dir of the training to go on with"
            )
        _check_same(saved, settings, split)
        return saved
    if there and not settings.overwrite:
        raise InputError(
            f"{folder} holds another run ({', '.join(there)}): --resume goes on with it, --overwrite moves "
            "it to earlier/, and another --save_dir leaves it alone"
        )
    return None


def check_disk_space(folder: Path, network: nn.Module) -> None:
    """Raise RunError if the checkpoints of this network do not fit on the disk of the folder.

    best.pth holds the weights once, fine_tuned_model.pth twice, and last.pth four times (with AdamW's two
    averages and that of --ema). Each file is replaced only when its successor is written.
    """
    needed = 11 * sum(part.nbytes for part in network.state_dict().values())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise RunError(
            f"the checkpoints of this network take up to {needed / 1e6:.0f} MB, and the disk of {folder} has "
            f"{free / 1e6:.0f} left: make room, or give another --save_dir"
        )
    with tempfile.TemporaryFile(dir=folder):  # raises OSError now if the folder is read-only
        pass


def _check_same(saved: dict[str, Any], settings: Form, split: Split) -> None:
    """Raise InputError, with what differs, if a training is resumed with other settings or images."""
    before, now = saved["settings"], settings.model_dump(mode="json")
    differing = [name for name in now if name not in MAY_CHANGE and before.get(name) != now[name]]
    changed = [f"--{name} was {before.get(name)} and is {now[name]}" for name in differing]
    if saved["images"] != digest_of_names(split):
        changed.append(f"the images in {settings.train_dir} are others")
    if changed:
        raise InputError(
            f"--resume goes on with the run in {settings.save_dir} as it was, but {'; '.join(changed)}: "
            "give what it had, or another --save_dir"
        )


def digest_of_names(split: Split) -> str:
    """Return a digest of the names of the images."""
    names = [file.name for file in [*split.train, *split.validation]]
    return hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).hexdigest()[:16]
