"""A folder of labelled images in; a network fine-tuned to retrieve them better out, as a checkpoint.

    python fine_tuning.py --loss supcon --model simclr --train_dir data/intel_dataset/train \\
        --epochs 100 --batch_size 128 --save_dir checkpoints/intel

Then model_fine_tuned.py runs checkpoints/intel/fine_tuned_model.pth. Edit the settings below, or give them as
flags.
"""

from __future__ import annotations

import time
from pathlib import Path

from retrieval.backbones.zoo import ModelType
from retrieval.console import run_script
from retrieval.distributed import end_with_the_others
from retrieval.settings import (
    Amount,
    Augmentation,
    Crop,
    Device,
    File,
    Folder,
    Form,
    Freeze,
    NewFolder,
    PositiveAmount,
    PositiveInt,
    PositiveShare,
    Share,
    Side,
    Tracker,
)
from retrieval.tracking import check_tracker
from supcon.variants import Loss, choices_of


class Settings(Form):
    """Fine-tune a network on a folder with a folder a class, and keep what retrieves best."""

    loss: Loss = "ce"
    model: ModelType = "efficientnet_lite0"
    train_dir: Folder = Path("data/train")
    save_dir: NewFolder = Path("checkpoints")
    epochs: PositiveInt = 10
    batch_size: PositiveInt = 48
    weights: File | None = None  # instead of the word's own; or a fine-tuned checkpoint, to go on from
    resume: bool = False  # True: go on with the run in save_dir
    overwrite: bool = False  # True: move the run in save_dir to save_dir/earlier
    minutes: PositiveAmount | None = None  # None: until the epochs are over
    seed: int = 0
    val_share: PositiveShare = 0.2  # of the images, to validate on
    device: Device = "auto"  # or "cpu", "cuda", "mps"
    tracker: Tracker = "none"  # or "tensorboard", "wandb": follow the training there

    # What the network sees. None: what suits the images, and what the word was trained with.
    image_size: Side | None = None
    crop: Crop = "auto"
    face_margin: Share | None = None
    min_face_size: PositiveShare | None = None

    # How it learns.
    freeze: Freeze = "stem"  # or "bn", "all_but_last", "backbone"
    lr: PositiveAmount = 1e-3  # of the last stage
    layer_decay: PositiveAmount = 0.7  # of the rate, for each eighth of the depth towards the input
    head_lr: PositiveAmount = 5e-3
    weight_decay: Amount = 0.02
    warmup: Share = 0.08  # of the steps
    clip: PositiveAmount | None = 5.0  # the length of the gradient; None: as it is
    ema: PositiveShare | None = None  # such as 0.99: keep an average of the weights
    micro_batch: PositiveInt | None = None  # views in memory at once; None: the batch's

    # What concerns some losses only. None: the loss's own, in supcon/variants.py.
    augmentation: Augmentation | None = None  # "gentle", "plain", "strong"
    label_smoothing: Share | None = None
    dropout: Share | None = None
    temperature: PositiveAmount | None = None
    images_per_class: PositiveInt | None = None  # in a batch
    memory: PositiveInt | None = None  # embeddings of earlier batches to compare with
    supcon_weight: PositiveAmount | None = None
    scale: PositiveAmount | None = None
    margin: PositiveAmount | None = None


def main(settings: Settings) -> None:
    started = time.perf_counter()
    end_with_the_others()
    check_tracker(settings.tracker)
    # torch comes with these: a mistyped flag is answered without it
    from supcon.batches import find_and_split
    from supcon.checkpoints import open_folder
    from supcon.start import load_start
    from supcon.state import begin
    from supcon.training import choose, fit

    choices = choices_of(settings)  # the loss's own, and what is set above instead
    split = find_and_split(settings)
    with open_folder(settings, split) as saved:  # what --resume goes on from
        start = load_start(settings, split.train)
        training = begin(settings, choices, split, start, saved, started)
        with training.tracking:
            fit(training)
            choose(training)


if __name__ == "__main__":
    run_script(main, Settings)
