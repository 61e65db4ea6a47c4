"""Images with class folders, or a table of identities, in; the answer key of a competition out."""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from posixpath import basename

import numpy as np

from get_images import ImageFile, label_of
from retrieval.errors import InputError, listed
from retrieval.metrics import UNSCORED, require_labels
from retrieval.submission.protocol import NAMES_PER_QUERY


@dataclass(frozen=True)
class AnswerKey:
    """The identity of each image. Names are paths below their folder."""

    queries: dict[str, str]  # name → identity
    gallery: dict[str, str | None]  # None: of no query's identity

    @cached_property
    def aliases(self) -> tuple[dict[str, str], dict[str, str]]:
        """For the queries and the gallery: each accepted name of an image → its path."""
        return _aliases(self.queries), _aliases(self.gallery)

    @cached_property
    def ambiguous(self) -> set[str]:
        """The base names that several images of a side have: only the whole path tells which is meant."""
        return repeated(map(basename, self.queries)) | repeated(map(basename, self.gallery))

    @cached_property
    def most_bytes(self) -> int:
        """The most bytes of a body: twice those of the longest right submission, and 64 kB more."""
        longest = max(len(json.dumps(name)) for name in self.gallery)
        names = sum(len(json.dumps(query)) + NAMES_PER_QUERY * (longest + 2) + 4 for query in self.queries)
        return 2 * names + 2**16

    def public_queries(self, share: float, seed: int) -> tuple[str, ...]:
        """Draw a share of the queries, at least one, seeded."""
        names = sorted(self.queries)
        count = max(1, round(share * len(names)))
        drawn = np.random.default_rng(seed).permutation(len(names))[:count]
        return tuple(names[row] for row in np.sort(drawn))

    def digest(self, public: tuple[str, ...] | None) -> str:
        """Return 16 hex digits of the answers: a leaderboard holds scores to one digest only."""
        answers = json.dumps([self.queries, self.gallery, public], sort_keys=True)
        return hashlib.sha256(answers.encode()).hexdigest()[:16]


def _aliases(paths: Iterable[str]) -> dict[str, str]:
    """Return the path that each name means: the path itself, and a base name that no other image has."""
    ambiguous = repeated(map(basename, paths))
    bases = {basename(path): path for path in paths if basename(path) not in ambiguous}
    return bases | {path: path for path in paths}


def key_of_folders(
    queries: list[ImageFile], gallery: list[ImageFile], otherwise: str = UNSCORED
) -> AnswerKey:
    """Take the class folders as identities. Raises InputError if there are none, as require_labels does."""
    require_labels(queries, gallery, otherwise)
    return AnswerKey(*({image.name: label_of(image.name) for image in side} for side in (queries, gallery)))


def key_of_table(table: Path, queries: list[ImageFile], gallery: list[ImageFile]) -> AnswerKey:
    """Read identities from a CSV table: a line `name,identity` for each image, perhaps below these heads.

    A gallery image that is not in the table has no query's identity. Raises InputError if a query is missing,
    or if a name has two identities, belongs to no image, or to both a query and a gallery image.
    """
    names = [image.name for image in [*queries, *gallery]]
    twice = repeated(names)
    if twice:
        raise InputError(f"a line of {table} would mean a query and a gallery image: rename {min(twice)}")
    identities = _identities(table, set(names))
    missing = [image.name for image in queries if image.name not in identities]
    if missing:
        raise InputError(f"{table} lacks {listed('queries', missing)}")
    of_queries = {image.name: identities[image.name] for image in queries}
    of_gallery = {image.name: identities.get(image.name) for image in gallery}
    if not set(of_queries.values()) & set(of_gallery.values()):
        raise InputError(f"{table} gives no gallery image the identity of a query: every score would be 0")
    return AnswerKey(of_queries, of_gallery)


def _identities(table: Path, images: set[str]) -> dict[str, str]:
    identities: dict[str, str] = {}
    for where, (name, identity) in read_pairs(table, "name", "identity"):
        if name not in images:
            meant = next((f": write {image}" for image in images if name.endswith(f"/{image}")), "")
            raise InputError(f"{where}: there is no query or gallery image {name}{meant}")
        if identities.setdefault(name, identity) != identity:
            raise InputError(f"{where}: {name} is {identities[name]} on an earlier line")
    return identities


def read_pairs(table: Path, *heads: str) -> Iterator[tuple[str, list[str]]]:
    """Yield each line of a CSV table of two columns, with its place; a first line of these heads is skipped.

    Raises InputError for another table.
    """
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            rows = [(number, row) for number, row in enumerate(csv.reader(file), 1) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{table} is not a CSV table in UTF-8 ({error})") from None
    for number, row in rows:
        where, cells = f"{table}, line {number}", [cell.strip() for cell in row]
        if number == 1 and cells == [*heads]:
            continue
        if len(cells) != 2 or not all(cells):
            raise InputError(f"{where}: {','.join(row)!r} is not of the form {','.join(heads)}")
        yield where, cells


def repeated(names: Iterable[str]) -> set[str]:
    return {name for name, count in Counter(names).items() if count > 1}
