"""The settings of fine-tuning: each field with its default and, below it, its help."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from retrieval.backbones.zoo import ModelType
from retrieval.settings import (
    Amount,
    Device,
    File,
    Folder,
    Form,
    MeansSettings,
    NewFolder,
    PositiveAmount,
    PositiveInt,
    PositiveShare,
    RetrievalSettings,
    Share,
    Side,
    Tracker,
)
from supcon.variants import Loss

Freeze = Literal["bn", "stem", "all_but_last", "backbone"]
Augmentation = Literal["gentle", "plain", "strong"]


class TrainingSettings(Form):
    """More settings of the training."""

    refused: ClassVar = dict.fromkeys(
        [*RetrievalSettings.model_fields, *MeansSettings.model_fields],
        "it is a flag of model_not_tuned.py and model_fine_tuned.py, which rank a gallery for each query",
    ) | {"model_type": "here it is --model"}

    loss: Loss = "ce"
    """loss to train with

    [fine_tuning.md](fine_tuning.md) compares them.
    """
    model: ModelType = "efficientnet_lite0"
    """model to tune; python -m retrieval.backbones lists them"""
    train_dir: Folder = Path("data/train")
    """folder of the training images, with a folder per class"""
    epochs: PositiveInt = 10
    """passes over the training images"""
    batch_size: PositiveInt = 48
    """images in a training step"""
    save_dir: NewFolder = Path("checkpoints")
    """folder for the checkpoints, the history and the curves

    One training at a time writes into it.
    """
    weights: File | None = None
    """file of weights to start from, or a fine-tuned checkpoint to train further"""
    resume: bool = False
    """continue the training in the save folder"""
    overwrite: bool = False
    """move the training in the save folder to earlier/ and start a new one"""
    minutes: PositiveAmount | None = None
    """minutes after which the training ends, with the best epoch so far

    The learning rate falls faster, so that it is low by then.
    """
    val_share: PositiveShare = 0.2
    """share of the images (or classes, if there are many) to set aside for validation

    It is a share of the classes if twenty or more of them have several images.
    """
    image_size: Side | None = None
    """side of the network's square input in pixels (default: what suits the images)

    The tuned network gets inputs of this size later, too.
    """
    device: Device = "auto"
    """device of the network: cuda, mps, cpu, or auto, the first that is available"""
    tracker: Tracker = "none"
    """where to track the training: none, tensorboard or wandb

    Install the package first. [report.md](report.md) has an example.
    """
    seed: int = 0
    """seed of everything random"""


class OptimizerSettings(Form):
    """Settings of the optimizer."""

    freeze: Freeze = "stem"
    """layers that do not learn: bn, stem, all_but_last or backbone

    `bn` freezes the statistics of the batch normalisations only, which never learn; `stem` also the first two
    fifths of the stages; `all_but_last` all stages but the last; `backbone` everything but a linear map on
    the features.
    """
    lr: PositiveAmount = 1e-3
    """highest learning rate of the last stage"""
    layer_decay: PositiveAmount = 0.7
    """factor of the learning rate for each eighth of the depth towards the input"""
    head_lr: PositiveAmount = 5e-3
    """highest learning rate of the head on the network"""
    weight_decay: Amount = 0.02
    """weight decay of AdamW"""
    warmup: Share = 0.08
    """share of the steps in which the learning rates rise

    After them the rates fall as a cosine.
    """
    clip: PositiveAmount | None = 5.0
    """highest norm of the gradient of all weights together; unset: no limit"""
    ema: PositiveShare | None = None
    """decay of a moving average of the weights, such as 0.99 (default: no average)"""
    micro_batch: PositiveInt | None = None
    """views in memory at once, with the gradients of the whole batch (default: all)"""


class LossSettings(Form):
    """Settings of some losses only (default: the loss's own)."""

    augmentation: Augmentation | None = None
    """strength of the random changes in a view: gentle (faces), plain or strong"""
    label_smoothing: Share | None = None
    """share of a label that is spread over all classes"""
    dropout: Share | None = None
    """share of the features that are hidden from the classifier in training"""
    temperature: PositiveAmount | None = None
    """temperature of the contrastive loss"""
    images_per_class: PositiveInt | None = None
    """K, where a batch holds P classes with K images each"""
    memory: PositiveInt | None = None
    """embeddings of earlier batches to compare a batch with"""
    supcon_weight: PositiveAmount | None = None
    """weight of the contrastive loss beside cross-entropy"""
    scale: PositiveAmount | None = None
    """scale of the cosines in a margin loss"""
    margin: PositiveAmount | None = None
    """margin: radians (arcface), cosine (cosface, proxy_anchor) or distance (triplet)"""


# The flags of fine_tuning.py that the retrieval scripts refuse, and why.
OF_TRAINING = dict.fromkeys(
    [*TrainingSettings.model_fields, *OptimizerSettings.model_fields, *LossSettings.model_fields],
    "it is a flag of fine_tuning.py, which trains a network for model_fine_tuned.py --weights FILE",
)
