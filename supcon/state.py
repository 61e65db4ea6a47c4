"""Settings, images and a network in; the state of a training, which can be saved and restored, out."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn

from retrieval.backbones.backbone import Backbone
from retrieval.backbones.fine_tuned import write_checkpoint
from retrieval.distributed import all_gather, from_rank_0, rank, rank_zero_only, world_size
from retrieval.errors import InputError, RunError
from retrieval.run import set_aside
from retrieval.settings import Form
from retrieval.tracking import Tracking, start_tracking
from supcon import heads
from supcon.batches import LoadedImages, Split, load_images
from supcon.checkpoints import FILES, LAST, check_disk_space, digest_of_names
from supcon.layers import freeze, parameter_groups
from supcon.start import Start
from supcon.validation import Validation, load_validation
from supcon.variants import VARIANTS, Choices, Variant

FEATURE_LENGTH = 16.0  # mean length of the features that a head gets, about that of EfficientNet-Lite0's
CROP_ROOM = 1.25  # the side of an image in memory / the side of a view: so a crop is not blurred


@dataclass
class Progress:
    """How far a training has come. last.pth holds these names."""

    epoch: int = 0  # completed
    step: int = 0  # completed in this epoch
    highest: dict[str, Any] | None = None  # the score and the points of each query of the best epoch
    kept: float = -1.0  # the score of the chosen embedding
    chosen: int = 0  # the number of epochs after which the embedding was chosen
    losses: list[float] = field(default_factory=list)  # of this epoch's steps; NaN: skipped
    spent: float = 0.0  # seconds in this epoch's steps
    untuned: dict[str, Any] | None = None  # the metrics before the first epoch
    history: list[dict[str, Any]] = field(default_factory=list)  # the lines of history.jsonl


@dataclass
class TrainingState:
    """Everything that a training step needs."""

    settings: Form
    choices: Choices
    variant: Variant
    files: str  # a digest of the images' names
    images: LoadedImages
    validation: Validation | None  # on rank 0
    untuned: Backbone
    folded: bool  # as in Recipe
    tuned: Backbone
    head: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: nn.Module | None  # of the weights, with --ema
    scale: float  # of the features that the head sees
    started: float
    progress: Progress = field(default_factory=Progress)
    micro_batch: int = 0  # views that go through the network at once
    bad_steps: int = 0
    tracking: Tracking = field(default_factory=Tracking)

    @property
    def current(self) -> Backbone:
        """The tuned network as it would be kept now: with --ema, the average of its weights."""
        return replace(self.tuned, network=self.average.module) if self.average else self.tuned

    @property
    def batch_size(self) -> int:
        """The images of a step, in all processes together."""
        return min(self.settings.batch_size, len(self.images.names))

    @property
    def device(self) -> str:
        return self.tuned.device

    def parts(self) -> dict[str, Any]:
        """The parts that a step changes, beside the progress; all else follows from the settings."""
        parts = {"tuned": self.tuned.network, "head": self.head, "optimizer": self.optimizer,
                 "scaler": self.scaler}  # fmt: skip
        return parts | ({"average": self.average} if self.average else {})


def begin(
    settings: Form,
    choices: Choices,
    split: Split,
    start: Start,
    saved: dict[str, Any] | None = None,
    started: float | None = None,
) -> TrainingState:
    """Load the images, build the head and the optimiser, and restore what was `saved`, if anything was.

    `started` is the time.perf_counter() from which --minutes count. The tracker runs from here on:
    `with training.tracking` ends it.
    """
    started = time.perf_counter() if started is None else started
    all_gather(None)  # no process writes into the folder before all have looked into it
    variant, (untuned, tuned, folded) = VARIANTS[settings.loss], start
    if not saved:
        check_disk_space(settings.save_dir, tuned.network)
    if untuned.transform.detects_faces and settings.augmentation is None:
        choices = choices | {"augmentation": "gentle"}  # an aligned face is never seen turned or cut
    images = _load_training_images(settings, split, tuned, variant)
    validation, scale = None, 0.0
    if rank() == 0:
        sizes = {untuned.transform.size, tuned.transform.size}
        validation = load_validation(split, untuned, sizes, choices["augmentation"], settings.seed)
        scale = _feature_scale(validation, untuned)
    scale = from_rank_0(scale)
    torch.manual_seed(settings.seed)
    head = getattr(heads, variant.head)(untuned.dimension, len(images.classes), choices).to(tuned.device)
    optimizer, scaler, average = _optimisation(settings, tuned, head)
    training = TrainingState(settings, choices, variant, digest_of_names(split), images, validation, untuned,
                             folded, tuned, head, optimizer, scaler, average, scale, started)  # fmt: skip
    of_process = -(-training.batch_size // world_size()) * variant.views
    training.micro_batch = min(settings.micro_batch or of_process, of_process)
    if saved:
        _restore(training, saved)
    _check_processes(training)
    if rank() == 0 and not saved:
        set_aside(settings.save_dir, FILES)  # only now that this training can begin
    training.tracking = start_tracking(
        settings.tracker if rank() == 0 else "none",
        settings.save_dir,
        f"{settings.model} {settings.loss}",
        settings.model_dump(mode="json") | choices,
        saved and saved.get("tracked"),  # a training of before there were trackers has none
    )
    return training


def _load_training_images(settings: Form, split: Split, tuned: Backbone, variant: Variant) -> LoadedImages:
    """Load the images to train on, larger than the network sees them. Raises InputError if too few remain."""
    side = math.ceil(CROP_ROOM * tuned.transform.size)
    images = load_images(split.train, tuned.transform.of_size(side), "training images")
    if len(images.names) < 2 or (variant.labels and len(images.classes) < 2):
        raise InputError(
            f"of {settings.train_dir}, {len(images.names)} images of {len(images.classes)} classes are "
            "left to learn from: give more that can be read, or a smaller --val_share"
        )
    return images


def _optimisation(
    settings: Form, tuned: Backbone, head: nn.Module
) -> tuple[torch.optim.Optimizer, torch.amp.GradScaler, nn.Module | None]:
    """Freeze a part of the network; return the optimiser of the rest, its scaler and the averaged weights."""
    trained = freeze(tuned.network, settings.freeze, settings.model)
    groups = parameter_groups(trained, head, settings)
    optimizer = torch.optim.AdamW(groups, fused=True)  # half of the time on a CPU
    half = tuned.device == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)
    scaler = torch.amp.GradScaler(tuned.device, enabled=half)
    average = None
    if settings.ema:
        decay = torch.optim.swa_utils.get_ema_multi_avg_fn(settings.ema)
        average = torch.optim.swa_utils.AveragedModel(tuned.network, multi_avg_fn=decay)
    return optimizer, scaler, average


def _check_processes(training: TrainingState) -> None:
    """Raise InputError if a batch has no share for a process, RunError if one has other images or weights."""
    settings, names = training.settings, training.images.names
    if training.batch_size < world_size():
        raise InputError(
            f"a batch of {training.batch_size} images has no share for each of {world_size()} processes: "
            "give a larger --batch_size, more images, or torchrun a smaller --nproc_per_node"
        )
    if names != from_rank_0(names):
        raise RunError(
            f"process {rank() + 1} could read other images of {settings.train_dir} than the first one: see "
            "which are left out, and let all processes read the same"
        )
    # A difference between weights would stay to the end.
    weights = [tensor for part in (training.tuned.network, training.head) for tensor in part.parameters()]
    length = math.sqrt(sum(tensor.detach().double().square().sum().item() for tensor in weights))
    if not math.isclose(length, from_rank_0(length), rel_tol=1e-6):  # machines round differently
        raise RunError(
            f"process {rank() + 1} has other weights of {settings.model} than the first one: let all "
            "processes read the same file, and the same --save_dir where they go on"
        )


def _feature_scale(validation: Validation, untuned: Backbone) -> float:
    """Return the factor that gives features a mean length of FEATURE_LENGTH: then one head_lr suits all.

    Raises InputError if all features are zero, or one is no number.
    """
    with torch.inference_mode():
        length = untuned.embed(validation.images[untuned.transform.size][:64]).norm(dim=1).mean().item()
    if not 0 < length < math.inf:
        raise InputError(
            f"the network gives images features of length {length:g}, from which nothing can be learnt: its "
            "weights are broken, so give other --weights, or leave them out"
        )
    return FEATURE_LENGTH / length


def _restore(training: TrainingState, saved: dict[str, Any]) -> None:
    """Restore what was saved. Raises InputError if it is not the state of such a training."""
    try:
        for name, part in training.parts().items():
            if saved[name]:  # a scaler has no state on another device
                part.load_state_dict(saved[name])
        training.progress = Progress(**saved["progress"])
    except Exception as error:  # torch raises anything on a state that was changed
        raise InputError(
            f"{training.settings.save_dir / LAST} does not fit this training ({type(error).__name__}: "
            f"{error}): start it again without --resume, in another --save_dir or with --overwrite"
        ) from None


@rank_zero_only
def save(training: TrainingState) -> None:
    """Write last.pth, from which --resume goes on."""
    state = {name: part.state_dict() for name, part in training.parts().items()}
    state |= {"settings": training.settings.model_dump(mode="json"), "images": training.files}
    state |= {"tracked": training.tracking.state, "progress": asdict(training.progress)}
    write_checkpoint(training.settings.save_dir / LAST, state)
