"""A --loss in; its variant of fine-tuning out: how many views, which sampler, which head with its loss.

To add a variant, write its head in supcon/heads.py and give it a row in VARIANTS.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, Field

from retrieval.errors import InputError, did_you_mean
from retrieval.settings import Form

if TYPE_CHECKING:
    from torch import nn

Choices = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """A row of the table."""

    head: Callable[[int, int, Choices], nn.Module]  # (the features' dimension, classes, choices) → the head
    views: int  # per image of a batch
    by_class: bool  # batches of P classes × K images; else shuffled
    choices: Choices  # the settings that apply to this variant, with its defaults
    labels: bool = True  # False: each image is a class of its own


def _classifier(dimension: int, classes: int, choices: Choices) -> nn.Module:
    from supcon.heads import Classifier

    return Classifier(dimension, classes, choices["label_smoothing"], choices["dropout"])


def _projection(dimension: int, classes: int, choices: Choices) -> nn.Module:
    from supcon.heads import Projection

    return Projection(dimension, choices["temperature"], choices["memory"])


def _both(dimension: int, classes: int, choices: Choices) -> nn.Module:
    from supcon.heads import Sum

    heads = [part(dimension, classes, choices) for part in (_classifier, _projection)]
    return Sum(heads, [1.0, choices["supcon_weight"]])


def _arcface(dimension: int, classes: int, choices: Choices) -> nn.Module:
    """Deng et al. 2019: the margin is added to the angle, in radians."""
    from pytorch_metric_learning.losses import ArcFaceLoss

    from supcon.heads import MetricLearning

    margin, scale = choices["margin"], choices["scale"]
    loss = ArcFaceLoss(classes, dimension, margin=math.degrees(margin), scale=scale)
    return MetricLearning(loss, lambda views: _chance_of_margin(scale * math.sin(margin), classes))


def _cosface(dimension: int, classes: int, choices: Choices) -> nn.Module:
    """Wang et al. 2018: the margin is subtracted from the cosine."""
    from pytorch_metric_learning.losses import CosFaceLoss

    from supcon.heads import MetricLearning

    margin, scale = choices["margin"], choices["scale"]
    loss = CosFaceLoss(classes, dimension, margin=margin, scale=scale)
    return MetricLearning(loss, lambda views: _chance_of_margin(scale * margin, classes))


def _chance_of_margin(lead: float, classes: int) -> float:
    """Return the cross-entropy if every other class leads the right one by `lead`.

    >>> round(_chance_of_margin(0, 6) - math.log(6), 6)
    0.0
    """
    return lead + math.log(classes - 1 + math.exp(-lead))


def _proxy_anchor(dimension: int, classes: int, choices: Choices) -> nn.Module:
    """Kim et al. 2020."""
    from pytorch_metric_learning.losses import ProxyAnchorLoss

    from supcon.heads import MetricLearning

    margin, scale = choices["margin"], choices["scale"]

    def chance(views: int) -> float:
        """Return the loss of equally many views per class, all orthogonal to every proxy."""
        own, far = views / classes, math.exp(scale * margin)
        return math.log1p(own * far) + math.log1p((views - own) * far)

    return MetricLearning(ProxyAnchorLoss(classes, dimension, margin, scale), chance)


def _triplet(dimension: int, classes: int, choices: Choices) -> nn.Module:
    """Hermans et al. 2017: for each anchor the farthest positive and the nearest negative of the batch."""
    from pytorch_metric_learning.losses import TripletMarginLoss
    from pytorch_metric_learning.miners import BatchHardMiner

    from supcon.heads import MetricLearning

    margin = choices["margin"]
    return MetricLearning(TripletMarginLoss(margin), lambda views: margin, BatchHardMiner())


CLASSIFIER = {"label_smoothing": 0.1, "dropout": 0.2}
CONTRASTIVE = {"temperature": 0.1, "memory": 0}

VARIANTS = {
    "ce": Variant(_classifier, 1, False, CLASSIFIER | {"augmentation": "plain"}),
    "supcon": Variant(
        _projection, 2, True, CONTRASTIVE | {"images_per_class": 4, "augmentation": "plain"}
    ),
    "nt_xent": Variant(_projection, 2, False, CONTRASTIVE | {"augmentation": "strong"}, labels=False),
    "arcface": Variant(_arcface, 1, False, {"scale": 16.0, "margin": 0.3, "augmentation": "plain"}),
    "cosface": Variant(_cosface, 1, False, {"scale": 16.0, "margin": 0.2, "augmentation": "plain"}),
    "proxy_anchor": Variant(_proxy_anchor, 1, False, {"scale": 32.0, "margin": 0.1, "augmentation": "plain"}),
    "triplet": Variant(
        _triplet, 2, True, {"margin": 0.2, "images_per_class": 4, "augmentation": "plain"}
    ),
    "ce+supcon": Variant(
        _both, 2, True,
        CLASSIFIER | CONTRASTIVE | {"supcon_weight": 0.5, "images_per_class": 4, "augmentation": "plain"},
    ),
}  # fmt: skip
CHOICES = sorted({name for variant in VARIANTS.values() for name in variant.choices})


def choices_of(settings: Form) -> Choices:
    """Return the settings of the variant: its defaults, or the values that the user set instead.

    Raises InputError for a setting that does not apply to this variant, and for batches of one class.
    """
    variant = VARIANTS[settings.loss]
    given = {name: getattr(settings, name) for name in CHOICES if getattr(settings, name) is not None}
    for name in given:
        if name not in variant.choices:
            users = ", ".join(word for word, row in VARIANTS.items() if name in row.choices)
            raise InputError(f"--{name} changes nothing for --loss {settings.loss}: it is for {users}")
    choices = variant.choices | given
    if settings.batch_size < 2:
        raise InputError(
            "--batch_size 1 holds one image, and there is nothing to compare it with: give 2 or more"
        )
    if variant.by_class and choices["images_per_class"] >= settings.batch_size:
        raise InputError(
            f"--batch_size {settings.batch_size} holds one class of --images_per_class "
            f"{choices['images_per_class']} images: give a larger batch, or fewer of a class"
        )
    return choices


def known_loss(word: str) -> str:
    """The word itself, if it is a row of the table; otherwise InputError with the nearest one."""
    if word not in VARIANTS:
        hint = did_you_mean(word.lower(), VARIANTS) or ";"
        raise InputError(f"there is no such loss{hint} the words are {', '.join(VARIANTS)}")
    return word


Loss = Annotated[str, AfterValidator(known_loss), Field(examples=list(VARIANTS))]
