"""A labelled folder in; queries and galleries that look like those of the day, drawn several times, out."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from get_images import ImageFile, find_images, find_query_and_gallery, label_of
from retrieval.choosing.settings import ChoosingSettings
from retrieval.errors import InputError
from retrieval.metrics import FEW_IDENTITIES, require_labels
from retrieval.ranking.projections import check_classes
from retrieval.records import Embeddings, chunks, readable_rows
from retrieval.settings import LOCAL

ENOUGH_IDENTITIES = 20  # with two images: then a day shows other people than those that a fit has seen
MOST = 2000  # images of a day
MATCHES = 2  # images of an identity in a hidden day's gallery, unless --matches says otherwise
HALVES = 10  # ways to leave a half for a fit, which takes long
DAYS = 10  # that are drawn from the labelled images, by class: each has many queries

log = logging.getLogger("retrieval.choosing")


@dataclass(frozen=True)
class Images:
    """The images of all folders."""

    queries: list[ImageFile]
    gallery: list[ImageFile]
    train: list[ImageFile]  # labelled

    @property
    def share(self) -> float:
        """Return the share of the queries among the images of the day."""
        return len(self.queries) / (len(self.queries) + len(self.gallery))

    def __len__(self) -> int:
        return len(self.queries) + len(self.gallery) + len(self.train)


class Day(NamedTuple):
    """Rows of the labelled images: of the queries and the gallery of a day, and of those left for a fit."""

    queries: np.ndarray
    gallery: np.ndarray
    fit: np.ndarray
    half: int = 0  # days of one number have the same fit


def by_identity(names: list[str]) -> bool:
    """Return whether the folder shows many identities, as of people, and not a few classes, as of scenes."""
    _, counts = np.unique([label_of(name) for name in names], return_counts=True)
    return int((counts > 1).sum()) >= ENOUGH_IDENTITIES


def draw_days(names: list[str], matches: int, share: float, count: int, seed: int = 0) -> list[Day]:
    """Draw `count` days from labelled images. In up to HALVES ways a half of them is left for a fit.

    by identity    a day shows half of the identities with two images or more: one image of each is a query,
                   and up to `matches` others are in the gallery. So are all identities with a single image,
                   whom nobody looks for. The images of the other half are left for a fit.
    by class       if fewer than ENOUGH_IDENTITIES have two images: a day shows half of the images of each
                   class, of which `share` are queries and the others the gallery.

    Raises InputError if no class has two images, or there is just one class.
    """
    labels = np.array([label_of(name) for name in names])
    rows_of = {label: np.flatnonzero(labels == label) for label in np.unique(labels)}
    if len(rows_of) < 2 or max(map(len, rows_of.values())) < 2:
        raise InputError(
            f"--train_dir holds {len(names)} images of {len(rows_of)} classes: to choose by them takes two "
            "classes or more, with two images or more in some of them"
        )
    of_people, halves, days = by_identity(names), min(HALVES, count), []
    for number in range(count):
        half = number * halves // count  # days of one half follow one another
        randoms = np.random.default_rng((seed, half)), np.random.default_rng((seed, half, number))
        draw = (
            _day_by_identity(rows_of, matches, *randoms)
            if of_people
            else _day_by_class(rows_of, share, *randoms)
        )
        days.append(draw._replace(half=half))
    return days


def owners_of(names: list[str], days: list[Day]) -> list[str]:
    """Return who each query belongs to, day after day: a person, or an image where there are few classes.

    An owner's queries of several days are right or wrong together, so the bootstrap draws owners.
    """
    of_name = label_of if by_identity(names) else str
    return [of_name(names[row]) for day in days for row in day.queries]


def check_days(names: list[str], days: list[Day]) -> None:
    """Raise InputError if the queries of all days have fewer than FEW_IDENTITIES owners."""
    count = len(set(owners_of(names, days)))
    if count < FEW_IDENTITIES:
        raise InputError(
            f"days drawn from {len(names)} images of --train_dir have only {count} different queries, and "
            f"fewer than {FEW_IDENTITIES} show nothing: give more labelled images, or run "
            "model_not_tuned.py, which chooses nothing"
        )


def _day_by_identity(
    rows_of: dict[str, np.ndarray], matches: int, halve: np.random.Generator, random: np.random.Generator
) -> Day:
    several = [label for label, rows in rows_of.items() if len(rows) > 1]
    several = [several[row] for row in halve.permutation(len(several))]
    seen, others = several[: (len(several) + 1) // 2], several[(len(several) + 1) // 2 :]
    shuffled = [random.permutation(rows_of[label]) for label in seen][: MOST // (1 + matches)]
    alone = [rows for rows in rows_of.values() if len(rows) == 1]
    return Day(
        np.array([rows[0] for rows in shuffled]),
        np.concatenate([*(rows[1 : 1 + matches] for rows in shuffled), *alone]),
        np.concatenate([rows_of[label] for label in others]),
    )


def _day_by_class(
    rows_of: dict[str, np.ndarray], share: float, halve: np.random.Generator, random: np.random.Generator
) -> Day:
    queries, gallery, fit = [], [], []
    for rows in map(halve.permutation, rows_of.values()):
        seen = max(2, len(rows) // 2)
        fit.append(rows[seen:])
        rows = random.permutation(rows[:seen])[: max(2, MOST // len(rows_of))]
        of_queries = min(max(1, round(share * len(rows))), len(rows) - 1)
        queries.append(rows[:of_queries])
        gallery.append(rows[of_queries:])
    return Day(*map(np.concatenate, (queries, gallery, fit)))


def rows_to_learn_from(names: list[str], share: float = 0.7, seed: int = 0) -> np.ndarray:
    """Return the rows of a share of the labelled images, ascending; days can be drawn from the others.

    With many identities these are a share of those with two images or more, and all with one; with few
    classes a share of the images of each.
    """
    labels, random = np.array([label_of(name) for name in names]), np.random.default_rng(seed)
    rows_of = [random.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
    if by_identity(names):
        several = [rows for rows in rows_of if len(rows) > 1]
        several = [several[row] for row in random.permutation(len(several))]
        parts = several[: round(share * len(several))] + [rows for rows in rows_of if len(rows) == 1]
    else:
        parts = [rows[: round(share * len(rows))] for rows in rows_of]
    return np.sort(np.concatenate(parts))


def matches_in(gallery: Embeddings, labelled: Embeddings) -> int:
    """Return how many images an identity seems to have in a gallery, by the look of it.

    Two images count as one identity's if they are more similar than nearly all images of different labelled
    identities are to their nearest: than 95 % of them. The mean is taken over the images with such a partner;
    it is 1 if fewer than a fifth of the images have one, which chance may give.
    """
    labels = np.array([label_of(name) for name in labelled.names])
    random = np.random.default_rng(0)
    rows = random.permutation(readable_rows(labelled.vectors))[:MOST]
    cosines = labelled.vectors[rows] @ labelled.vectors[rows].T
    cosines[labels[rows, None] == labels[rows]] = -1
    limit = np.quantile(cosines.max(1), 0.95)
    rows = random.permutation(readable_rows(gallery.vectors))[:MOST]
    partners = -np.ones(len(rows))  # an image is no partner of itself
    for _, chunk in chunks(gallery.vectors, MOST):
        partners += (gallery.vectors[rows] @ chunk.T > limit).sum(1)
    return 1 + round(float(partners[partners > 0].mean())) if (partners > 0).mean() > 0.2 else 1


# ---- the folders


def find_all(settings: ChoosingSettings) -> Images:
    """Return the images of all folders; in a rehearsal, those of a hidden day and the other labelled ones.

    Raises InputError where a folder cannot be used.
    """
    for flag, folder in {"--query_dir": settings.query_dir, "--gallery_dir": settings.gallery_dir}.items():
        if folder.resolve().is_relative_to(settings.train_dir.resolve()):
            raise InputError(f"--train_dir {settings.train_dir} holds {flag} {folder}, whose images have no "
                             "labels: give the folder above the class folders")  # fmt: skip
    queries, gallery = find_query_and_gallery(settings.query_dir, settings.gallery_dir)
    images = Images(queries, gallery, find_images(settings.train_dir))
    names = [file.name for file in images.train]
    if len(set(map(label_of, names))) < len(names):  # otherwise each class has one image
        check_classes(names)
    if settings.rehearse:
        log.info("a rehearsal: a day of the labelled images is hidden from the search")
        images = hide_a_day(images, settings.matches, settings.seed)
    elif settings.custom_dataset or settings.server_url == LOCAL:
        require_labels(queries, gallery)
    log.info("found %d query, %d gallery and %d labelled images", len(images.queries), len(images.gallery),
             len(images.train))  # fmt: skip
    return _with_usable_labels(images, settings)


def _with_usable_labels(images: Images, settings: ChoosingSettings) -> Images:
    """Return the images, without the labelled ones if too few days can be drawn from them, as a warning says.

    The first network then makes the submission. A rehearsal would have nothing to do: InputError.
    """
    names = [file.name for file in images.train]
    try:
        check_days(names, draw_days(names, settings.matches or MATCHES, images.share, DAYS, settings.seed))
    except InputError as error:
        if settings.rehearse:
            raise
        log.warning("nothing can be compared, so the first network of --models that runs is the choice: %s",
                    error)  # fmt: skip
        return replace(images, train=[])
    return images


# ---- a rehearsal


def hide_a_day(images: Images, matches: int | None, seed: int) -> Images:
    """Take a day out of the labelled images: flat folders with names that tell nothing, as in a competition.

    The others are what the search may learn from. Half of the identities with a single image are on the day.
    """
    files = images.train
    day = draw_days([file.name for file in files], matches or MATCHES, images.share, 1, seed + 1)[0]
    alone = _alone(files)
    kept = np.random.default_rng(seed).permutation(alone)[: len(alone) // 2]
    gallery = np.setdiff1d(day.gallery, kept)
    learnt = [files[row] for row in np.union1d(day.fit, kept)]
    hidden = [[ImageFile(hidden_name(files[row]), files[row].path) for row in np.sort(rows)]
              for rows in (day.queries, gallery)]  # fmt: skip
    return Images(*(sorted(side, key=lambda file: file.name) for side in hidden), learnt)


def _alone(files: list[ImageFile]) -> np.ndarray:
    """Return the rows of the images whose identity has no other one."""
    _, owners, counts = np.unique(
        [label_of(file.name) for file in files], return_inverse=True, return_counts=True
    )
    return np.flatnonzero(counts[owners] == 1)


def hidden_name(file: ImageFile) -> str:
    return hashlib.md5(file.name.encode(), usedforsecurity=False).hexdigest() + file.path.suffix
