"""A labelled folder in; squares of its images in memory, and the batches that an epoch is made of, out."""

from __future__ import annotations

import logging
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from tqdm import tqdm

from get_images import ImageFile, find_images, label_of
from retrieval.faces import FaceCrop
from retrieval.readers import read_batches
from retrieval.settings import Form, InputError
from supcon.variants import VARIANTS

if TYPE_CHECKING:
    from torch import Tensor

    from retrieval.transforms import Transform

IN_MEMORY = 4 * 2**30  # bytes of squares; more lie in a file that the system keeps in memory as it can
ENOUGH_IDENTITIES = 20
MOST_FOR_VALIDATION = 2000  # images: a standard error of half a point at 95 %
WHAT_IS_NEW = {
    "identity": "all of other classes",
    "image": "other images of the same classes",
    "view": "each to be found from a view of it",
}

log = logging.getLogger("retrieval.batches")


@dataclass(frozen=True)
class Squares:
    """Images as a network sees them: row i of `pixels`, uint8 (images, 3, side, side), is names[i]."""

    names: list[str]
    pixels: Tensor

    @property
    def classes(self) -> list[str]:
        """The labels, each once, sorted."""
        return sorted({label_of(name) or "" for name in self.names})

    @property
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

    Raises InputError for a folder that the loss cannot learn from.
    """
    labelled = VARIANTS[settings.loss].labels
    files = find_labelled(settings.train_dir) if labelled else find_images(settings.train_dir)
    found = split(files, settings.val_share, settings.seed, labelled)
    classes = len({label_of(file.name) for file in files})
    of = f" of {classes} classes" if labelled else ""
    if labelled and classes == len(files):
        log.warning("each class has one image only: there is little to learn from, and validation looks for "
                    "an image from a view of it")  # fmt: skip
    log.info("found %d images%s: %d to learn from, %d to validate on (%s)", len(files), of,
             len(found.train), len(found.validation), WHAT_IS_NEW[found.by])  # fmt: skip
    if len(found.train) < 2 or not found.validation:
        raise InputError(
            f"{settings.train_dir} holds {len(files)} images: too few to learn from and to validate"
        )
    return found


def find_labelled(folder: Path, least: int = 2) -> list[ImageFile]:
    """The images of a folder with a folder a class. Raises InputError where it is laid out otherwise."""
    files = find_images(folder)
    bare = [file.path for file in files if label_of(file.name) is None]
    if bare:
        raise InputError(
            f"{len(bare)} images in {folder}, such as {bare[0].name}, lie in no class folder: "
            f"lay them out as {folder}/<class>/x.jpg (--loss nt_xent needs no classes)"
        )
    classes = {label_of(file.name) for file in files}
    empty = [place.name for place in sorted(folder.iterdir()) if place.is_dir() and place.name not in classes]
    empty = [name for name in empty if not name.startswith((".", "__MACOSX"))]
    if empty:
        raise InputError(
            f"{folder / empty[0]} holds no image, so that its class has none: fill it or remove it"
            + (f" (so for {len(empty)} folders)" if len(empty) > 1 else "")
        )
    if len(classes) < least:
        raise InputError(
            f"{folder} holds one class only, {classes.pop()}: there is nothing to tell apart "
            "(--loss nt_xent needs no classes)"
        )
    return files


def split(files: list[ImageFile], share: float, seed: int, labelled: bool = True) -> Split:
    """Set a seeded share of the images aside for validation.

    Of 20 classes or more that have several images, a share of these classes, so that validation is of people
    never seen; else a share of each class with three images or more. Where no class has, or there are no
    labels, a share of the images, each to be found from a view of it. Never more than MOST_FOR_VALIDATION.
    """
    random = np.random.default_rng(seed)
    of_class: dict[str | None, list[ImageFile]] = {}
    for file in files:
        of_class.setdefault(label_of(file.name) if labelled else file.name, []).append(file)
    several = [label for label, members in of_class.items() if len(members) > 1]
    if len(several) >= ENOUGH_IDENTITIES:
        by, taken = "identity", [of_class[several[row]] for row in random.permutation(len(several))]
        chosen = _up_to(taken, max(2, round(share * len(several))))
    elif any(len(of_class[label]) > 2 for label in several):
        by, most = "image", MOST_FOR_VALIDATION // len(several)
        chosen = []
        for label in several:
            members = [of_class[label][row] for row in random.permutation(len(of_class[label]))]
            if len(members) > 2:
                chosen += members[: max(2, min(round(share * len(members)), most))]
    else:
        by, taken = "view", [list(files[row : row + 1]) for row in random.permutation(len(files))]
        chosen = _up_to(taken, max(1, round(share * len(files))))
    held_out = {file.name for file in chosen}
    train = [file for file in files if file.name not in held_out]
    return Split(train, [file for file in files if file.name in held_out], by)


def _up_to(groups: list[list[ImageFile]], count: int) -> list[ImageFile]:
    """The images of the first `count` groups, as long as they are not too many."""
    chosen: list[ImageFile] = []
    for group in groups[:count]:
        if chosen and len(chosen) + len(group) > MOST_FOR_VALIDATION:
            break
        chosen += group
    return chosen


# ---- read -----------------------------------------------------------------------------------------


def read_squares(files: list[ImageFile], prepare: Transform | FaceCrop, kind: str) -> Squares:
    """What `prepare` makes of each image, read once for all epochs. Shows a progress bar.

    An unreadable image is left out, named and counted. Raises InputError if not one can be read.
    """
    pixels = _room_for(len(files), prepare.size)
    names: list[str] = []
    unreadable: dict[str, str] = {}
    without_face = 0
    with tqdm(total=len(files), desc=kind, unit="image", leave=False) as bar:
        for batch in read_batches(files, prepare, 64, processes=isinstance(prepare, FaceCrop)):
            for name, square in zip(batch.names, batch.images, strict=True):
                pixels[len(names)] = square.pixels
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


def _room_for(images: int, side: int) -> Tensor:
    shape = (images, 3, side, side)
    size = images * 3 * side * side
    if size <= IN_MEMORY:
        return torch.empty(shape, dtype=torch.uint8)
    with tempfile.NamedTemporaryFile(prefix="training-images-") as file:  # unlinked, and there while mapped
        log.info("%.1f GB of training images lie in %s while this runs", size / 1e9, tempfile.gettempdir())
        return torch.from_file(file.name, shared=True, size=size, dtype=torch.uint8).view(shape)


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

    Each batch takes the classes that were taken least, each with the next K of its images in random order, so
    that all classes count the same however many images they have. A class with fewer gives those it has (its
    views stand in for others), and the batch takes more classes; where there are fewer than P, they come
    again with other images. A batch holds no image twice. There are as many batches as the images fill.

    >>> labels = np.array([0, 0, 0, 0, 1, 1, 2])
    >>> [sorted(labels[rows].tolist()) for rows in by_class(labels, 5, 2, np.random.default_rng(0))]
    [[0, 0, 1, 1, 2]]
    """
    size = min(batch_size, len(labels))
    members = {label: np.flatnonzero(labels == label) for label in np.unique(labels)}
    decks = {label: _endless(rows, random) for label, rows in members.items()}
    given: Counter = Counter()
    batches = []
    for _ in range(len(labels) // size):
        batch: dict[int, None] = {}  # its rows, in order
        left = {label: len(rows) for label, rows in members.items()}
        for label in cycle(sorted(members, key=lambda label: (given[label], random.random()))):
            wanted = min(images_per_class, left[label], size - len(batch))
            left[label] -= wanted
            given[label] += wanted > 0
            full = len(batch) + wanted
            while len(batch) < full:
                batch[next(decks[label])] = None  # one that is in it already changes nothing
            if full == size:
                break
        batches.append(np.array(list(batch)))
    return batches


def _endless(rows: np.ndarray, random: np.random.Generator) -> Iterator[int]:
    """The rows in random order, again and again."""
    while True:
        yield from random.permutation(rows).tolist()
