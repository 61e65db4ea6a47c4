"""A labelled folder in; squares of its images in memory, and the batches that an epoch is made of, out."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm import tqdm

from get_images import HIDDEN, ImageFile, find_images, label_of
from retrieval.distributed import count, is_first
from retrieval.embedding.loader import read_batches
from retrieval.errors import InputError
from retrieval.machine import on_this_machine, zeros
from retrieval.settings import Form
from supcon.variants import VARIANTS

if TYPE_CHECKING:
    from torch import Tensor

    from retrieval.backbones.face_crop import FaceCrop
    from retrieval.backbones.transform import Transform

ENOUGH_IDENTITIES = 20
ENOUGH_IMAGES = 50
MOST_FOR_VALIDATION = 2000  # images: a standard error of half a point at 95 %
WHAT_IS_NEW = {
    "identity": "all of other classes",
    "image": "other images of the same classes",
    "view": "each to be found from a view of it",
}

Classes = dict[str | None, list[ImageFile]]  # the images of each

log = logging.getLogger("retrieval.batches")


@dataclass(frozen=True)
class Squares:
    """Images as a network sees them: row i of `pixels`, uint8 (images, 3, side, side), is names[i]."""

    names: list[str]
    pixels: Tensor

    @cached_property
    def classes(self) -> list[str]:
        """The labels, each once, sorted."""
        return sorted({label_of(name) or "" for name in self.names})

    @cached_property
    def labels(self) -> np.ndarray:
        """(images,) the row of each image's label in `classes`."""
        rows = {label: row for row, label in enumerate(self.classes)}
        return np.array([rows[label_of(name) or ""] for name in self.names])


@dataclass(frozen=True)
class Split:
    """The images to learn from, and those to validate on."""

    train: list[ImageFile]
    validation: list[ImageFile]
    by: str  # identity (of classes that are not learned), image (of classes that are), view (of other images)


# ---- find and split -------------------------------------------------------------------------------


def find_and_split(settings: Form) -> Split:
    """The images of the training folder, a part of them set aside for validation.

    Raises InputError for a folder that the loss cannot learn from, or a batch too small for all processes.
    """
    labelled = VARIANTS[settings.loss].labels
    files = find_labelled(settings.train_dir) if labelled else find_images(settings.train_dir)
    found = split(files, settings.val_share, settings.seed, labelled)
    classes = len({label_of(file.name) for file in files})
    of = f" of {classes} classes" if labelled else ""
    if labelled and found.by == "view":
        log.warning("there are not two classes with three images, nor twenty with two: there is little to "
                    "learn from, and validation looks for an image from a view of it")  # fmt: skip
    log.info("found %d images%s: %d to learn from, %d to validate on (%s)", len(files), of,
             len(found.train), len(found.validation), WHAT_IS_NEW[found.by])  # fmt: skip
    if len(found.train) < 2 or not found.validation:
        raise InputError(
            f"{settings.train_dir} holds {len(files)} images: too few to learn from and to validate"
        )
    check_shares(settings.batch_size, len(found.train))
    return found


def check_shares(batch_size: int, images: int) -> None:
    """Raise InputError where a batch of so many images has no share for each process of the run."""
    least = min(batch_size, images)
    if least < count():
        raise InputError(
            f"a batch of {least} images has no share for each of {count()} processes: give a larger "
            "--batch_size, more images, or torchrun a smaller --nproc_per_node"
        )


def find_labelled(folder: Path) -> list[ImageFile]:
    """The images of a folder with a folder a class. Raises InputError where it is laid out otherwise."""
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
    """Set a seeded share of the images aside for validation.

    Of 20 classes or more that have several images, a share of these classes, so that validation is of people
    never seen: more than the share, up to half, where it would be of fewer than 50 images. Else a share of
    each class with three images or more, if there are two such. Else, or without labels, a share of the
    images, each to be found from a view of it. About MOST_FOR_VALIDATION at most: of a class that is set
    aside, what is beyond its part is not used at all. Two classes at least are left to learn from.
    """
    random = np.random.default_rng(seed)
    of_class: Classes = {}
    for file in files:
        of_class.setdefault(label_of(file.name) if labelled else file.name, []).append(file)
    for members in of_class.values():
        members[:] = [members[row] for row in random.permutation(len(members))]
    several = [label for label, members in of_class.items() if len(members) > 1]
    rich = [label for label, members in of_class.items() if len(members) > 2]
    if len(several) >= ENOUGH_IDENTITIES:
        order = [several[row] for row in random.permutation(len(several))]
        chosen, unused = _of_whole_classes(of_class, order, share)
        by = "identity"
    elif len(rich) > 1:
        chosen, unused, by = _of_each_class(of_class, rich, share), [], "image"
    else:
        count = min(max(1, round(share * len(files))), MOST_FOR_VALIDATION, len(files) - 2)
        order = random.permutation(len(files))
        chosen, unused, by = [files[row] for row in order[: max(count, 0)]], [], "view"
    validation, held_out = set(chosen), {*chosen, *unused}
    train = [file for file in files if file not in held_out]
    return Split(train, [file for file in files if file in validation], by)


def _of_whole_classes(of_class: Classes, order: list[str | None], share: float) -> tuple[list, list]:
    """Images of the first classes of `order`, a share of them, and the images of these that are too many."""
    count = min(max(2, round(share * len(order))), len(of_class) - 2)
    while count < len(order) // 2 and sum(len(of_class[label]) for label in order[:count]) < ENOUGH_IMAGES:
        count += 1
    each = max(2, MOST_FOR_VALIDATION // count)
    chosen = [file for label in order[:count] for file in of_class[label][:each]]
    return chosen, [file for label in order[:count] for file in of_class[label][each:]]


def _of_each_class(of_class: Classes, rich: list[str | None], share: float) -> list[ImageFile]:
    """A share of each rich class: two images at least, and not all."""
    most = max(2, MOST_FOR_VALIDATION // len(rich))
    chosen = []
    for members in (of_class[label] for label in rich):
        chosen += members[: min(max(2, round(share * len(members))), most, len(members) - 1)]
    return chosen


# ---- read -----------------------------------------------------------------------------------------


def read_squares(files: list[ImageFile], prepare: Transform | FaceCrop, kind: str) -> Squares:
    """What `prepare` makes of each image, read once for all epochs. Shows a progress bar.

    An unreadable image is left out, named and counted. Raises InputError if not one can be read, RunError
    where there is no room for them, or a process that looks for faces was killed.
    """
    shape = (len(files), 3, prepare.size, prepare.size)
    pixels = torch.from_numpy(zeros(shape, np.uint8, "training images", on_this_machine()))
    names: list[str] = []
    unreadable: dict[str, str] = {}
    without_face = 0
    with tqdm(total=len(files), desc=kind, unit="image", leave=False, disable=not is_first()) as bar:
        for batch in read_batches(files, prepare, 64, processes=prepare.detects_faces):
            for name, square in zip(batch.names, batch.images, strict=True):
                pixels[len(names)] = torch.from_numpy(square.pixels)
                names.append(name)
                without_face += square.face is False
            unreadable |= batch.unreadable
            bar.update(len(batch.names) + len(batch.unreadable))
    for name, reason in unreadable.items():
        log.warning("%s is left out of the %s: %s", name, kind, reason)
    if not names:
        raise InputError(f"not one of the {len(files)} {kind} can be read: see the reasons above")
    if unreadable:
        log.warning("%d of the %d %s are left out", len(unreadable), len(files), kind)
    if without_face:
        log.warning("no face was found in %d of the %d %s: a square in the centre stands in",
                    without_face, len(names), kind)  # fmt: skip
    return Squares(names, pixels[: len(names)])


# ---- batches --------------------------------------------------------------------------------------


def shuffled(images: int, batch_size: int, random: np.random.Generator) -> list[np.ndarray]:
    """The rows of an epoch's batches: each image once, in random order; a ragged end waits for another epoch.

    >>> [len(rows) for rows in shuffled(10, 4, np.random.default_rng(0))]
    [4, 4]
    """
    order = random.permutation(images)
    size = min(batch_size, images)
    return [order[start : start + size] for start in range(0, images - size + 1, size)]


def by_class(
    labels: np.ndarray, batch_size: int, images_per_class: int, random: np.random.Generator
) -> list[np.ndarray]:
    """The rows of an epoch's batches of P classes × K images, where P is batch_size / images_per_class.

    The classes come in turn, in random order, each with the next K of its images, so that all count the same
    however many images they have. A class with fewer gives those it has (its views stand in for others), and
    the batch takes more classes; where there are fewer than P, they come again with other images. A batch
    holds no image twice. There are as many batches as the images fill.

    >>> labels = np.array([0, 0, 0, 0, 1, 1, 2])
    >>> [sorted(labels[rows].tolist()) for rows in by_class(labels, 5, 2, np.random.default_rng(0))]
    [[0, 0, 1, 1, 2]]
    """
    size = min(batch_size, len(labels))
    rows, starts = np.argsort(labels, kind="stable"), np.cumsum(np.bincount(labels))[:-1]
    members = [part for part in np.split(rows, starts) if len(part)]
    decks = [_endless(part, random) for part in members]
    waiting: deque[int] = deque()
    batches = []
    for _ in range(len(labels) // size):
        batch: dict[int, None] = {}  # its rows, in order
        given: Counter = Counter()
        while len(batch) < size:
            if not waiting:  # every class has had its turn: those of this batch come last in the next
                waiting.extend(sorted(random.permutation(len(members)).tolist(), key=given.__contains__))
            label = waiting.popleft()
            wanted = min(images_per_class, len(members[label]) - given[label], size - len(batch))
            given[label] += wanted
            full = len(batch) + wanted
            while len(batch) < full:
                batch[next(decks[label])] = None  # one that is in it already changes nothing
        batches.append(np.array(list(batch)))
    return batches


def _endless(rows: np.ndarray, random: np.random.Generator) -> Iterator[int]:
    """The rows in random order, again and again."""
    while True:
        yield from random.permutation(rows).tolist()
