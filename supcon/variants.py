"""A --loss in; its variant of fine-tuning out: how many views, which sampler, which head with its loss.

To add a variant, write its head in supcon/heads.py and give it a row in VARIANTS. Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from retrieval.errors import InputError, did_you_mean
from retrieval.settings import Form

Choices = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """A row of the table."""

    head: str  # in supcon/heads.py: (the features' dimension, classes, choices) → the head
    views: int  # per image of a batch
    choices: Choices  # its settings, with defaults; with images_per_class K: batches of P classes × K images
    labels: bool = True  # False: each image is a class of its own


CLASSIFIER = {"label_smoothing": 0.1, "dropout": 0.2}
CONTRASTIVE = {"temperature": 0.1, "memory": 0}

VARIANTS = {
    "ce": Variant("Classifier", 1, CLASSIFIER | {"augmentation": "plain"}),
    "supcon": Variant("Projection", 2, CONTRASTIVE | {"images_per_class": 4, "augmentation": "plain"}),
    "nt_xent": Variant("Projection", 2, CONTRASTIVE | {"augmentation": "strong"}, labels=False),
    "arcface": Variant("arcface", 1, {"scale": 16.0, "margin": 0.3, "augmentation": "plain"}),
    "cosface": Variant("cosface", 1, {"scale": 16.0, "margin": 0.2, "augmentation": "plain"}),
    "proxy_anchor": Variant("proxy_anchor", 1, {"scale": 32.0, "margin": 0.1, "augmentation": "plain"}),
    "triplet": Variant("triplet", 2, {"margin": 0.2, "images_per_class": 4, "augmentation": "plain"}),
    "ce+supcon": Variant(
        "Both",
        2,
        CLASSIFIER | CONTRASTIVE | {"supcon_weight": 0.5, "images_per_class": 4, "augmentation": "plain"},
    ),
}
CHOICES = sorted({name for variant in VARIANTS.values() for name in variant.choices})


def choices_of(settings: Form) -> Choices:
    """Return the settings of the variant: its defaults, or the values that the user set instead.

    Raises InputError for a setting that does not apply to this variant, and if a batch would hold a single
    image or a single class.
    """
    variant = VARIANTS[settings.loss]
    given = {name: getattr(settings, name) for name in CHOICES if getattr(settings, name) is not None}
    for name in given:
        if name not in variant.choices:
            users = ", ".join(loss for loss, row in VARIANTS.items() if name in row.choices)
            raise InputError(f"--{name} changes nothing for --loss {settings.loss}: it is for {users}")
    choices = variant.choices | given
    if settings.batch_size < 2:
        raise InputError(
            "--batch_size 1 holds one image, and there is nothing to compare it with: give 2 or more"
        )
    if choices.get("images_per_class", 0) >= settings.batch_size:
        raise InputError(
            f"--batch_size {settings.batch_size} holds one class of --images_per_class "
            f"{choices['images_per_class']} images: give a larger batch, or fewer of a class"
        )
    return choices


def known_loss(name: str) -> str:
    """Return the name of a loss. Raises InputError, with the most similar name, if it is unknown."""
    if name not in VARIANTS:
        hint = did_you_mean(name.lower(), VARIANTS) or ";"
        raise InputError(f"there is no such loss{hint} the losses are {', '.join(VARIANTS)}")
    return name


Loss = Annotated[str, AfterValidator(known_loss), Field(examples=list(VARIANTS))]
