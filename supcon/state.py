"""Settings, images and a network in; all that a training step needs, to be saved and put back, out."""

from __future__ import annotations

import math
import time
import zlib
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from retrieval.backbones.backbone import Backbone
from retrieval.distributed import is_first, number, wait
from retrieval.errors import InputError, RunError
from retrieval.run import set_aside
from retrieval.settings import Form
from retrieval.tracking import Tracking, start_tracking
from supcon.batches import Split, Squares, check_shares, read_squares
from supcon.checkpoints import FILES, Progress, check_room, digest, write_last
from supcon.gather import from_the_first
from supcon.layers import freeze, parameter_groups, stages
from supcon.start import Start
from supcon.validation import Validation, read_validation
from supcon.variants import VARIANTS, Choices, Variant

LENGTH = 16.0  # of the features that a head sees, about: EfficientNet-Lite0's own
FUSED = ("cpu", "cuda")  # devices on which one kernel changes all weights: half of the time on a CPU
ROOM = 1.25  # the side of the squares in memory, of that of a view: a crop is not blurred


@dataclass
class Training:
    """All that a step needs."""

    settings: Form
    choices: Choices
    variant: Variant
    files: str  # a digest of the images' names
    squares: Squares
    validation: Validation | None  # None: of several processes, not the first
    untuned: Backbone
    folded: bool  # as a Recipe has it
    tuned: Backbone
    head: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: nn.Module | None  # of the weights, if --ema
    scale: float  # of the features that the head sees
    started: float
    progress: Progress = field(default_factory=Progress)
    micro_batch: int = 0
    bad_steps: int = 0
    tracking: Tracking = field(default_factory=Tracking)

    @property
    def judged(self) -> Backbone:
        """The tuned network as it would be kept now."""
        return replace(self.tuned, network=self.average.module) if self.average else self.tuned

    @property
    def device(self) -> str:
        return self.tuned.device


def begin(
    settings: Form,
    choices: Choices,
    split: Split,
    start: Start,
    saved: dict[str, Any] | None = None,
    started: float | None = None,
) -> Training:
    """Read the images, build the head and the optimiser, and put back what was saved, if anything was.

    `started` is when the script did, by time.perf_counter: from then on its minutes count. Its tracking has
    begun: `with training.tracking` ends it.
    """
    started = time.perf_counter() if started is None else started
    wait()  # none writes into the folder before all have looked at what it holds
    variant, (untuned, tuned, folded) = VARIANTS[settings.loss], start
    if not saved:
        check_room(settings.save_dir, tuned.network)
    if untuned.transform.detects_faces and settings.augmentation is None:
        choices = choices | {"augmentation": "gentle"}  # an aligned face is never seen turned or cut
    side = math.ceil(ROOM * tuned.transform.size)
    squares = read_squares(split.train, tuned.transform.of_size(side), "training images")
    if len(squares.names) < 2 or (variant.labels and len(squares.classes) < 2):
        raise InputError(
            f"of {settings.train_dir}, {len(squares.names)} images of {len(squares.classes)} classes are "
            "left to learn from: give more that can be read, or a smaller --val_share"
        )
    sizes = {untuned.transform.size, tuned.transform.size}
    _check_shares(settings, squares)
    seen = None
    if is_first():  # which alone validates
        seen = read_validation(split, untuned, sizes, choices["augmentation"], settings.seed)
    scale = from_the_first(_scale(seen, untuned) if seen else 0.0)
    every = len(stages(tuned.network))
    torch.manual_seed(settings.seed)
    head = variant.head(untuned.dimension, len(squares.classes), choices).to(tuned.device)
    learned = freeze(tuned.network, settings.freeze, settings.model)
    groups = parameter_groups(learned, head, every, settings)
    optimizer = torch.optim.AdamW(groups, fused=tuned.device in FUSED)
    average = None
    if settings.ema:
        decay = torch.optim.swa_utils.get_ema_multi_avg_fn(settings.ema)
        average = torch.optim.swa_utils.AveragedModel(tuned.network, multi_avg_fn=decay)
    half = tuned.device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    scaler = torch.amp.GradScaler(tuned.device, enabled=half)
    training = Training(settings, choices, variant, digest(split), squares, seen, untuned, folded, tuned,
                        head, optimizer, scaler, average, scale, started)  # fmt: skip
    training.micro_batch = settings.micro_batch or settings.batch_size * variant.views
    if saved:
        _put_back(training, saved)
    elif is_first():
        set_aside(settings.save_dir, FILES)  # only now that this training can begin
    _check_weights(training)
    if is_first():
        training.tracking = _track(training, saved or {})
    return training


def _check_shares(settings: Form, squares: Squares) -> None:
    """Raise InputError where a process has no share of a batch, RunError where it has read other images."""
    check_shares(settings.batch_size, len(squares.names))
    digest = zlib.crc32("\n".join(squares.names).encode("utf-8", "surrogateescape"))
    if digest != from_the_first(digest):
        raise RunError(
            f"process {number() + 1} could read other images of {settings.train_dir} than the first one: see "
            "which are left out, and let all processes read the same"
        )


def _check_weights(training: Training) -> None:
    """Raise RunError where a process begins with other weights: they would stay others to the end."""
    parts = [tensor for part in (training.tuned.network, training.head) for tensor in part.parameters()]
    length = math.sqrt(sum(tensor.detach().double().square().sum().item() for tensor in parts))
    if not math.isclose(length, from_the_first(length), rel_tol=1e-6):  # machines round differently
        raise RunError(
            f"process {number() + 1} has other weights of {training.settings.model} than the first one: let "
            "all processes read the same file, and the same --save_dir where they go on"
        )


def _scale(seen: Validation, untuned: Backbone) -> float:
    """What makes the untuned features of a length at which the heads' rates are right for any network."""
    with torch.inference_mode():
        lengths = untuned.embed(seen.images[untuned.transform.size].pixels[:64]).norm(dim=1)
    return LENGTH / lengths.mean().item()


def _put_back(training: Training, saved: dict[str, Any]) -> None:
    for group in saved["optimizer"]["param_groups"]:
        group["fused"] = training.optimizer.defaults["fused"]  # it may have been saved on another device
    for name, part in _parts(training).items():
        if saved[name]:  # a scaler has no state on another device
            part.load_state_dict(saved[name])
    training.progress = Progress(**saved["progress"])


def _track(training: Training, saved: dict[str, Any]) -> Tracking:
    """Begin to track this training, or go on at the step where what was saved ends."""
    settings = training.settings
    config = settings.model_dump(mode="json") | training.choices
    name = f"{settings.model} {settings.loss}"
    return start_tracking(settings.tracker, settings.save_dir, name, config, saved.get("tracked"))


def _parts(training: Training) -> dict[str, Any]:
    """What changes from step to step, but for the progress; all else follows from that and the settings."""
    parts = {"tuned": training.tuned.network, "head": training.head, "optimizer": training.optimizer,
             "scaler": training.scaler}  # fmt: skip
    return parts | ({"average": training.average} if training.average else {})


def save(training: Training) -> None:
    """last.pth, to go on from here; of several processes the first writes it."""
    if not is_first():
        return
    state = {name: part.state_dict() for name, part in _parts(training).items()}
    settings = training.settings.model_dump(mode="json")
    folder = training.settings.save_dir
    write_last(folder, training.progress, settings=settings, images=training.files,
               tracked=training.tracking.state, **state)  # fmt: skip
