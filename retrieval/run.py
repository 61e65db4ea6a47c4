"""The settings of a run in; its seconds, its files and its line in the ledger runs.jsonl out."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from get_images import ImageFile
from retrieval.distributed import rank_zero_only
from retrieval.errors import InputError, RunError, StopError
from retrieval.files import as_json, lock, naming, write_through, write_whole
from retrieval.machine import program
from retrieval.records import Embeddings
from retrieval.settings import Form

# The files that the next run replaces.
SUBMISSION, EMBEDDINGS = "submission.json", "embeddings.npz"
PER_RUN = (SUBMISSION, "metrics.json", "reply.txt", "without_face.json", "report.html", "similar_images.png",
           "tsne.png", "per_class.png", "confusion.png", "similarities.png", "loss.png",
           EMBEDDINGS)  # fmt: skip
LEDGER = "runs.jsonl"
EARLIER = "earlier"  # the folder that the next run moves them to

log = logging.getLogger("retrieval.ledger")


@dataclass(frozen=True)
class Outcome:
    """The outcome of a submission, as a word and as a sentence for the user."""

    word: str  # scored, answered (without a score), saved (not sent), failed or interrupted
    sentence: str
    accuracy: float | None = None  # the server's score, 0 to 1000
    status: int | None = None  # the HTTP status of the server's answer

    @property
    def metrics(self) -> dict[str, float]:
        """Return the server's score as a metric of the run, if there is one."""
        return {} if self.accuracy is None else {"server_score": self.accuracy}

    @property
    def failed(self) -> bool:
        """Return whether the submission should have got a score and did not."""
        return self.word in ("failed", "interrupted")


@dataclass
class Run:
    """One run of a script: its settings, the folder of its files, and the seconds of each step.

    Inside a `with` block it locks the output folder, from check_output_dir on.
    """

    settings: Form
    seconds: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)
    held: ExitStack = field(default_factory=ExitStack, init=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.held.close()

    @property
    def folder(self) -> Path:
        return self.settings.output_dir

    @rank_zero_only
    def check_output_dir(self, queries: list[ImageFile], gallery: list[ImageFile], *folders: Path) -> None:
        """Create the output folders, and write as many bytes into them as a submission of these images takes.

        A full disk or a read-only folder is thus noticed before the images are embedded. Raises InputError if
        a folder is a file, if another run writes into it, or if the next run would find this run's pictures
        among the images, which may also lie in other `folders`; raises RunError if it cannot be written.
        """
        crops = getattr(self.settings, "save_crops", None)  # choose.py saves none
        written = {"output_dir": self.folder, "save_crops": crops}
        for images in (self.settings.query_dir, self.settings.gallery_dir, *folders):
            for flag, folder in written.items():
                if folder and Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(images)):
                    raise InputError(
                        f"--{flag} {folder} lies in the images' folder {images}: give another one"
                    )
        longest = max(len(json.dumps(image.name)) for image in gallery)
        needed = sum(len(json.dumps(image.name)) + 10 * (longest + 2) + 4 for image in queries)
        needed += sum(len(json.dumps(image.name)) + 3 for image in [*queries, *gallery])
        needed += 2**22  # metrics.json, the ledger's line
        if crops:
            _try_to_write(crops, needed, "save_crops")
        self.open_output_dir(needed)

    def open_output_dir(self, needed: int) -> None:
        """Create and lock the output folder, and write `needed` bytes into it; raise as check_output_dir."""
        _try_to_write(self.folder, needed, "output_dir")
        self.held.enter_context(lock(self.folder, "output_dir"))

    def done(self, step: str, what: str = "") -> None:
        """End a step, or a part of it: add to its seconds, and log `what` was done."""
        spent = time.perf_counter() - self.started - sum(self.seconds.values())
        self.seconds[step] = self.seconds.get(step, 0) + spent
        if what:
            log.info("%s in %.1f s", what, spent)

    def write_metrics(self, metrics: dict[str, Any]) -> None:
        """Write metrics.json: the metrics, and the seconds of each step so far."""
        seconds = {"seconds": self.rounded_seconds()}
        write_whole(self.folder / "metrics.json", as_json(metrics | seconds, indent=2))

    def rounded_seconds(self) -> dict[str, float]:
        """Return the seconds of each step, and `total`."""
        seconds = {name: round(spent, 3) for name, spent in self.seconds.items()}
        return seconds | {"total": round(sum(self.seconds.values()), 3)}

    def write_without_face(self, queries: Embeddings, gallery: Embeddings) -> None:
        """Write without_face.json, the names of the images without a face, if faces were looked for."""
        if queries.without_face is not None:
            names = {"queries": queries.without_face, "gallery_images": gallery.without_face}
            write_whole(self.folder / "without_face.json", as_json(names, indent=2))

    def write_names(self, queries: list[str], gallery: list[str]) -> str:
        """Write names-DIGEST.json, which all runs on these images share, and return its digest."""
        names = as_json({"queries": queries, "gallery_images": gallery}, indent=1)
        digest = hashlib.sha256(names).hexdigest()[:16]
        path = self.folder / f"names-{digest}.json"
        if not path.exists():
            write_whole(path, names)
        return digest

    def conclude(self, metrics: dict[str, Any], outcome: Outcome, **more: Any) -> None:
        """Log the outcome, and add it to metrics.json and, with `more`, to the ledger, with the same time."""
        log_outcome(outcome)
        more |= {"time": datetime.now().astimezone().isoformat()}
        self.write_metrics(metrics | outcome.metrics | {"time": more["time"]})
        kept = {name: value for name, value in metrics.items() if name != "per_class"} | outcome.metrics
        append_line(self.folder, self.settings, outcome, metrics=kept, seconds=self.rounded_seconds(), **more)


def log_outcome(outcome: Outcome) -> None:
    """Log the outcome of the submission, before anything is written: a full disk cannot hide it."""
    log.log(logging.ERROR if outcome.failed else logging.INFO, "%s", outcome.sentence)


def stop_if_failed(outcome: Outcome) -> None:
    """End the command with status 1, or 130 after Ctrl-C, if the submission did not go through."""
    if outcome.failed:
        raise StopError(130 if outcome.word == "interrupted" else 1)


def _try_to_write(folder: Path, size: int, flag: str) -> None:
    """Create the folder that a flag names, and write `size` bytes into it, as Run.check_output_dir says."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as trial:
            write_through(trial, bytes(size))
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"--{flag} {folder} is not a folder but a file: give another one") from None
    except OSError as error:
        raise RunError(
            f"{size / 1e6:.0f} MB cannot be written to {folder} ({error.strerror.lower()}): "
            f"make room, or give another --{flag}"
        ) from None


# ---- files ----------------------------------------------------------------------------------------


def set_aside(folder: Path, names: tuple[str, ...] = PER_RUN) -> None:
    """Move the files of the last run to earlier/<its time>/, so that no run overwrites a submission."""
    files = [folder / name for name in names if (folder / name).exists()]
    if files:
        when = datetime.fromtimestamp(files[0].stat().st_mtime).strftime("%Y%m%d-%H%M%S")
        taken = len(list((folder / EARLIER).glob(f"{when}*")))
        earlier = folder / EARLIER / (f"{when}-{taken + 1}" if taken else when)
        earlier.mkdir(parents=True)
        for path in files:
            os.replace(path, earlier / path.name)


def append_line(folder: Path, settings: Form, outcome: Outcome, **more: Any) -> None:
    """Append the line of a run to the ledger, runs.jsonl, and flush it to the disk."""
    path = folder / LEDGER
    record = {
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "script": program(),
    }
    record |= {"settings": settings.model_dump(mode="json"), "outcome": asdict(outcome)} | more
    line = as_json(record) + b"\n"
    with naming(path), open(path, "a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # a line that a crash cut off must not spoil this one
                line = b"\n" + line
        write_through(file, line)
