"""A labelled folder in; its images in memory, as a network sees them, and the batches of an epoch out."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from get_images import HIDDEN, ImageFile, find_images, label_of
from retrieval.backbones.face_crop import FaceCrop
from retrieval.backbones.transform import Transform
from retrieval.distributed import progress_bar
from retrieval.embedding.embed import warn_of_damage
from retrieval.embedding.loader import FEW, read_batches
from retrieval.errors import InputError
from retrieval.machine import local_world_size, zeros
from retrieval.settings import Form
from supcon.variants import VARIANTS

ENOUGH_IDENTITIES = 20
ENOUGH_IMAGES = 50
MOST_FOR_VALIDATION = 2000  # images: a standard error of half a point at 95 %
VALIDATION_KINDS = {
    "identity": "all of other classes",
    "image": "other images of the same classes",
    "view": "each to be found from a view of it",
}

ImagesByLabel = dict[str | None, list[ImageFile]]

log = logging.getLogger("retrieval.batches")


@dataclass(frozen=True)
class LoadedImages:
    """Images as a network sees them: row i of `pixels`, uint8 (images, 3, side, side), is names[i]."""

    names: list[str]
    pixels: Tensor

    @cached_property
    def classes(self) -> list[str]:
        """The different labels, sorted."""
        return sorted({label_of(name) or "" for name in self.names})

    @cached_property
    def labels(self) -> np.ndarray:
        """The class of each image (images,), as a row of `classes`."""
        rows = {label: row for row, label in enumerate(self.classes)}
        return np.array([rows[label_of(name) or ""] for name in self.names])


@dataclass(frozen=True)
class Split:
    """The images to train on and those to validate on."""

    train: list[ImageFile]
    validation: list[ImageFile]
    by: str  # a row of VALIDATION_KINDS


# ---- find and split -------------------------------------------------------------------------------


def find_and_split(settings: Form) -> Split:
    """Find the images of the training folder, and set some of them aside for validation.

    Raises InputError if the loss cannot learn from the folder.
    """
    labelled = VARIANTS[settings.loss].labels
    files = find_labelled(settings.train_dir) if labelled else find_images(settings.train_dir)
    chosen = split(files, settings.val_share, settings.seed, labelled)
    classes = len({label_of(file.name) for file in files})
    of = f" of {classes} classes" if labelled else ""
    if labelled and chosen.by == "view":
        log.warning("there are not two classes with three images, nor twenty with two: there is little to "
                    "learn from, and validation looks for an image from a view of it")  # fmt: skip
    log.info("found %d images%s: %d to learn from, %d to validate on (%s)", len(files), of,
             len(chosen.train), len(chosen.validation), VALIDATION_KINDS[chosen.by])  # fmt: skip
    if len(chosen.train) < 2 or not chosen.validation:
        raise InputError(
            f"{settings.train_dir} holds {len(files)} images: too few to learn from and to validate"
        )
    return chosen


def find_labelled(folder: Path) -> list[ImageFile]:
    """Find the images of a folder that has one folder per class. Raises InputError for any other layout."""
    files = find_images(folder)
    bare = [file.path for file in files if label_of(file.name) is None]
    if bare:
        raise InputError(
            f"{len(bare)} images in {folder}, such as {bare[0].name}, lie in no class folder: "
            f"lay them out as {folder}/<class>/x.jpg (--loss nt_xent needs no classes)"
        )
    classes = {label_of(file.name) for file in files}
    if classes == {"train", "test"}:
        raise InputError(
            f"{folder} holds train/ and test/, and what learns from the test images is not tested by them: "
            f"give {folder / 'train'}"
        )
    empty = [place.name for place in sorted(folder.iterdir()) if place.is_dir() and place.name not in classes]
    empty = [name for name in empty if not name.startswith(HIDDEN)]
    if empty:
        raise InputError(
            f"{folder / empty[0]} holds no image, so that its class has none: fill it or remove it"
            + (f" (so for {len(empty)} folders)" if len(empty) > 1 else "")
        )
    if len(classes) < 2:
        raise InputError(
            f"{folder} holds one class only, {classes.pop()}: there is nothing to tell apart "
            "(--loss nt_xent needs no classes)"
        )
    return files


def split(files: list[ImageFile], share: float, seed: int, labelled: bool = True) -> Split:
    """Set a seeded share of the images aside for validation, about MOST_FOR_VALIDATION at most.

    by identity     if 20 classes or more have several images: a share of these classes, so that validation
                    sees new people; more than the share, up to half, if it has fewer than 50 images else.
    by image        if two classes or more have three images: a share of each of these classes.
    by view         otherwise, or without labels: a share of the images, each to be found from a view of it.

    Images of a held-out class beyond its part of MOST_FOR_VALIDATION are not used at all. At least two
    classes are left to train on.
    """
    random = np.random.default_rng(seed)
    by_label: ImagesByLabel = {}
    for file in files:
        by_label.setdefault(label_of(file.name) if labelled else file.name, []).append(file)
    for members in by_label.values():
        members[:] = [members[row] for row in random.permutation(len(members))]
    several = [label for label, members in by_label.items() if len(members) > 1]
    rich = [label for label, members in by_label.items() if len(members) > 2]
    if len(several) >= ENOUGH_IDENTITIES:
        order = [several[row] for row in random.permutation(len(several))]
        chosen, unused = _take_whole_classes(by_label, order, share)
        by = "identity"
    elif len(rich) > 1:
        chosen, unused, by = _take_of_each_class(by_label, rich, share), [], "image"
    else:
        count = min(max(1, round(share * len(files))), MOST_FOR_VALIDATION, len(files) - 2)
        order = random.permutation(len(files))
        chosen, unused, by = [files[row] for row in order[: max(count, 0)]], [], "view"
    validation, held_out = set(chosen), {*chosen, *unused}
    train = [file for file in files if file not in held_out]
    return Split(train, [file for file in files if file in validation], by)


def _take_whole_classes(by_label: ImagesByLabel, order: list[str | None], share: float) -> tuple[list, list]:
    """Take a share of the classes, first in `order`: their images to validate on, and those left over."""
    count = min(max(2, round(share * len(order))), len(by_label) - 2)
    while count < len(order) // 2 and sum(len(by_label[label]) for label in order[:count]) < ENOUGH_IMAGES:
        count += 1
    each = max(2, MOST_FOR_VALIDATION // count)
    chosen = [file for label in order[:count] for file in by_label[label][:each]]
    return chosen, [file for label in order[:count] for file in by_label[label][each:]]


def _take_of_each_class(by_label: ImagesByLabel, rich: list[str | None], share: float) -> list[ImageFile]:
    """Take a share of each class in `rich`: two images at least, and not all."""
    most = max(2, MOST_FOR_VALIDATION // len(rich))
    chosen = []
    for members in (by_label[label] for label in rich):
        chosen += members[: min(max(2, round(share * len(members))), most, len(members) - 1)]
    return chosen


# ---- load -----------------------------------------------------------------------------------------


def load_images(files: list[ImageFile], transform: Transform | FaceCrop, kind: str) -> LoadedImages:
    """Load every image once for all epochs, as `transform` makes it. Shows a progress bar.

    An unreadable image is left out, with a warning. Raises InputError if no image can be read, RunError if
    the memory and the disk are too small, or a face detector's process was killed.
    """
    shape = (len(files), 3, transform.size, transform.size)
    pixels = torch.from_numpy(zeros(shape, np.uint8, "training images", local_world_size()))
    names: list[str] = []
    unreadable: dict[str, str] = {}
    damaged: dict[str, str] = {}
    without_face = 0
    processes = transform.detects_faces or (torch.accelerator.is_available() and len(files) > FEW)
    with progress_bar(len(files), kind, leave=False) as bar:
        for batch in read_batches(files, transform, 64, processes):
            pixels[len(names) : len(names) + len(batch.names)] = torch.from_numpy(batch.pixels)
            names += batch.names
            without_face += batch.faces.count(False)
            unreadable |= batch.unreadable
            damaged |= batch.damaged
            bar.update(len(batch.names) + len(batch.unreadable))
    for name, reason in unreadable.items():
        log.warning("%s is left out of the %s: %s", name, kind, reason)
    warn_of_damage(damaged, kind)
    if not names:
        raise InputError(f"not one of the {len(files)} {kind} can be read: see the reasons above")
    if unreadable:
        log.warning("%d of the %d %s are left out", len(unreadable), len(files), kind)
    if without_face:
        log.warning("no face was found in %d of the %d %s: a square in the centre stands in",
                    without_face, len(names), kind)  # fmt: skip
    return LoadedImages(names, pixels[: len(names)])


# ---- batches --------------------------------------------------------------------------------------


def shuffled(images: int, batch_size: int, random: np.random.Generator) -> list[np.ndarray]:
    """Return the rows of an epoch's batches: each image once, in random order, without a last partial batch.

    >>> [len(rows) for rows in shuffled(10, 4, np.random.default_rng(0))]
    [4, 4]
    """
    order = random.permutation(images)
    return [order[start : start + batch_size] for start in range(0, images - batch_size + 1, batch_size)]


def by_class(
    labels: np.ndarray, batch_size: int, images_per_class: int, random: np.random.Generator
) -> list[np.ndarray]:
    """Return the rows of an epoch's batches of P classes × K images, with P = batch_size / images_per_class.

    The classes take turns in random order, each with the next K of its images, so that all count the same
    however many images they have. A class with fewer images gives all of them (their views stand in for
    others), and the batch takes more classes. With fewer than P classes, they come again with other images.
    A batch holds no image twice. There are as many batches as the images fill.

    >>> labels = np.array([0, 0, 0, 0, 1, 1, 2])
    >>> [sorted(labels[rows].tolist()) for rows in by_class(labels, 5, 2, np.random.default_rng(0))]
    [[0, 0, 1, 1, 2]]
    """
    rows, starts = np.argsort(labels, kind="stable"), np.cumsum(np.bincount(labels))[:-1]
    members = [part for part in np.split(rows, starts) if len(part)]
    decks = [_reshuffled(part, random) for part in members]
    waiting: deque[int] = deque()
    batches = []
    for _ in range(len(labels) // batch_size):
        batch: dict[int, None] = {}  # its rows, in order
        given: Counter = Counter()  # images per class
        while len(batch) < batch_size:
            if not waiting:  # every class has had its turn: the classes of this batch come last in the next
                waiting.extend(sorted(random.permutation(len(members)).tolist(), key=given.__contains__))
            label = waiting.popleft()
            wanted = min(images_per_class, len(members[label]) - given[label], batch_size - len(batch))
            given[label] += wanted
            full = len(batch) + wanted
            while len(batch) < full:
                batch[next(decks[label])] = None  # a row that is in the batch already changes nothing
        batches.append(np.array(list(batch)))
    return batches


def _reshuffled(rows: np.ndarray, random: np.random.Generator) -> Iterator[int]:
    """Yield the rows in random order, again and again."""
    while True:
        yield from random.permutation(rows).tolist()
