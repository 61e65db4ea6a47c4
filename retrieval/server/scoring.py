"""The bytes of a submission and an answer key in; its score, or the sentence that says what is wrong, out."""

from __future__ import annotations

import csv
import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from get_images import ImageFile, label_of
from retrieval.errors import InputError
from retrieval.metrics import POINTS, competition_score, first_hit, require_labels
from retrieval.submission.protocol import NAMES_PER_QUERY, SHAPE, can_be_scored, is_list_of_names

LONGEST_GROUP = 100  # characters
SHOWN = 3  # offenders


class RefusedError(ValueError):
    """A body that cannot be scored; the sentence says why."""


@dataclass(frozen=True)
class Rules:
    """How a competition is run."""

    closes_at: datetime | None = None
    public: tuple[str, ...] | None = None  # the queries that count until it closes; None: all
    hide_scores: bool = False
    tokens: dict[str, str] | None = None  # a group → its token; None: anybody
    per_minute: int = 60  # submissions of a group
    per_address: int | None = None
    now: Callable[[], datetime] = lambda: datetime.now(UTC)

    @property
    def closed(self) -> bool:
        """Whether the competition is over."""
        return self.closes_at is not None and self.now() >= self.closes_at

    @property
    def partly(self) -> bool:
        """Whether only the public queries count now."""
        return self.public is not None and not self.closed


# ---- the answers ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class AnswerKey:
    """Who is on each image. Names are paths below their folder."""

    queries: dict[str, str]  # a name → its identity
    gallery: dict[str, str | None]  # None: nobody who is looked for

    @cached_property
    def known(self) -> dict[str, dict[str, str]]:
        """What each image may be called → its label and row, such as 7/41: metrics reads labels in names."""
        numbers = {identity: number for number, identity in enumerate(dict.fromkeys(self.queries.values()))}
        known = {}
        for side, identities in (("query", self.queries), ("gallery", self.gallery)):
            rows = enumerate(identities.items())
            known[side] = _callings({name: f"{numbers.get(who, -1)}/{row}" for row, (name, who) in rows})
        return known

    @cached_property
    def shared(self) -> set[str]:
        """The base names that several images of a side have, so that only the path tells which is meant."""
        counts = [Counter(name.rpartition("/")[2] for name in side) for side in (self.queries, self.gallery)]
        return {base for of in counts for base, count in of.items() if count > 1}


def _callings(short: dict[str, str]) -> dict[str, str]:
    """Each by its name, and by its base name where no other has that."""
    counts = Counter(name.rpartition("/")[2] for name in short)
    bases = {name.rpartition("/")[2]: of for name, of in short.items()}
    return {base: of for base, of in bases.items() if counts[base] == 1} | short


def key_of_folders(queries: list[ImageFile], gallery: list[ImageFile]) -> AnswerKey:
    """The class folders are the identities. Raises InputError where there are none."""
    require_labels(queries, gallery)
    return AnswerKey(*({image.name: label_of(image.name) for image in side} for side in (queries, gallery)))


def key_of_table(table: Path, queries: list[ImageFile], gallery: list[ImageFile]) -> AnswerKey:
    """Identities from a CSV table, a line `name,identity` an image; a first line of these words is none.

    A gallery image that is not in the table is of nobody who is looked for. Raises InputError where a query
    is missing, a name stands twice with different identities, or is of no image, or of two.
    """
    names = [image.name for image in [*queries, *gallery]]
    twice = _twice(names)
    if twice:
        raise InputError(f"a line of {table} would mean a query and a gallery image: rename {twice[0]}")
    identities = _identities(table, set(names))
    missing = [image.name for image in queries if image.name not in identities]
    if missing:
        raise InputError(f"{table} lacks {_told('queries', missing)}")
    of_queries = {image.name: identities[image.name] for image in queries}
    of_gallery = {image.name: identities.get(image.name) for image in gallery}
    if not set(of_queries.values()) & set(of_gallery.values()):
        raise InputError(f"{table} gives no gallery image the identity of a query: every score would be 0")
    return AnswerKey(of_queries, of_gallery)


def _identities(table: Path, images: set[str]) -> dict[str, str]:
    identities: dict[str, str] = {}
    for where, (name, identity) in read_pairs(table, "name", "identity"):
        if name not in images:
            raise InputError(f"{where}: there is no query or gallery image {name}")
        if identities.setdefault(name, identity) != identity:
            raise InputError(f"{where}: {name} is {identities[name]} on an earlier line")
    return identities


def read_pairs(table: Path, *columns: str) -> Iterator[tuple[str, list[str]]]:
    """The lines of a CSV table with two columns, and where each stands; a first line of their names is none.

    Raises InputError for another table.
    """
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            rows = [(number, row) for number, row in enumerate(csv.reader(file), 1) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{table} is not a CSV table in UTF-8 ({error})") from None
    for number, row in rows:
        where, cells = f"{table}, line {number}", [cell.strip() for cell in row]
        if number == 1 and cells == [*columns]:
            continue
        if len(cells) != 2 or not all(cells):
            raise InputError(f"{where}: {','.join(row)!r} is not of the form {','.join(columns)}")
        yield where, cells


# ---- check ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Submission:
    """A body of the right shape, whose names may still be wrong."""

    group: str
    images: dict[str, list[str]]


def read_body(body: bytes) -> Submission:
    """The submission in a body. Raises RefusedError where it has not the right shape."""
    try:
        content = json.loads(body.decode("utf-8-sig"), object_pairs_hook=_without_repeats)
    except RefusedError:
        raise
    except UnicodeDecodeError:
        raise RefusedError("the body is not UTF-8 text: send JSON") from None
    except json.JSONDecodeError as error:
        where = f"{error.msg.partition(':')[0]}, line {error.lineno}, column {error.colno}"
        raise RefusedError(f"the body is not JSON ({where}): send {SHAPE}") from None
    except ValueError:  # of thousands of digits
        raise RefusedError(f"the body holds a number that is too long: send {SHAPE}") from None
    except RecursionError:
        raise RefusedError(f"the body is nested too deeply: send {SHAPE}") from None
    return _shape(content)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; refused where a name stands in it twice, since only one of the two could count."""
    made = dict(pairs)
    if len(made) < len(pairs):
        raise RefusedError(_told("names that stand twice in one object", _twice(name for name, _ in pairs)))
    return made


def _shape(content: Any) -> Submission:
    """The content as a submission, if it has the right shape."""
    if isinstance(content, list):
        raise RefusedError(f"the body is a list, as an older server took it, and not a dict: send {SHAPE}")
    if not isinstance(content, dict) or not {"groupname", "images"} <= content.keys():
        raise RefusedError(f"the body has no groupname and images: send {SHAPE}")
    group, images = content["groupname"], content["images"]
    if not isinstance(group, str) or len(group) > LONGEST_GROUP or not _can_be_read(group):
        raise RefusedError(f"groupname is not a text of 1 to {LONGEST_GROUP} characters that can be read")
    if isinstance(images, list):
        raise RefusedError(f"images is a list, as an older server took it, and not a dict: send {SHAPE}")
    if not isinstance(images, dict):
        raise RefusedError(f"images is not a dict: send {SHAPE}")
    wrong = [query for query, names in images.items() if not is_list_of_names(names)]
    if wrong:
        raise RefusedError(f"{_told('queries without a list of names', wrong)}: send {SHAPE}")
    return Submission(group.strip(), images)


def _can_be_read(text: str) -> bool:
    """Whether it shows something, and has neither control characters nor half a letter, which UTF-8 lacks."""
    kinds = {unicodedata.category(letter) for letter in text}
    return not kinds & {"Cc", "Cs"} and any(kind[0] not in "CZ" for kind in kinds)


def _problems(images: dict[str, list[str]], key: AnswerKey) -> list[str]:
    """What is wrong with the names, a sentence each."""
    queries, gallery = key.known["query"], key.known["gallery"]
    asked = {queries[query] for query in images if query in queries}
    every = {name for names in images.values() for name in names}
    unknown = [query for query in images if query not in queries]
    unknown_images = sorted(name for name in every if name not in gallery)
    both = list(dict.fromkeys([*unknown, *unknown_images]))
    paths, shared = [name for name in both if "\\" in name], [name for name in both if name in key.shared]
    said = {*paths, *shared}
    found = {
        "names with \\, which is no part of a path here": paths,
        "names that several images have, so that only their paths below the folder tell which": shared,
        "unknown queries": [name for name in unknown if name not in said],
        "missing queries": [query for query in key.queries if queries[query] not in asked],
        "queries that stand there twice, by two names": _again(images, queries),
        "unknown gallery images": [name for name in unknown_images if name not in said],
        "queries without a name": [query for query, names in images.items() if not names],
        f"queries with more than {NAMES_PER_QUERY} names":
            [query for query, names in images.items() if len(names) > NAMES_PER_QUERY],
        "queries that name a gallery image twice":
            [query for query, names in images.items() if _twice(gallery.get(name, name) for name in names)],
    }  # fmt: skip
    return [_told(what, names) for what, names in found.items() if names]


def _again(images: Iterable[str], known: dict[str, str]) -> list[str]:
    """The names of those that stood there before by another name."""
    seen: set[str] = set()
    return [name for name in images if name in known and (known[name] in seen or seen.add(known[name]))]


def _twice(names: Iterable[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def _told(what: str, names: list[str]) -> str:
    """What they are, how many, and the first few.

    >>> _told("unknown queries", ["a", "b", "c", "d"])
    'unknown queries: 4 (a, b, c, …)'
    """
    shown = ", ".join(_printable(name if len(name) <= 60 else f"{name[:59]}…") for name in names[:SHOWN])
    return f"{what}: {len(names)} ({shown}{', …' * (len(names) > SHOWN)})"


def _printable(text: str) -> str:
    """Without what moves a terminal's cursor, turns the writing round, or is half a letter."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


# ---- score ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """What the server says of a submission."""

    accuracy: float  # 0 to 1000, not rounded
    results: list[float]  # top-1, top-5, top-10
    right: dict[int, list[str]]  # the identities of the queries with a right image among the first 1, 5, 10
    wrong: dict[int, list[str]]


def judge(submission: Submission, key: AnswerKey) -> dict[str, int]:
    """For each query, in the key's order, the rank of its first right image, from 1; 0 where none is right.

    Raises RefusedError, with a sentence that names the first offenders, unless each query of the key has one
    to NAMES_PER_QUERY different gallery images.
    """
    queries, gallery = key.known["query"], key.known["gallery"]
    try:
        ranking = {queries[query]: [gallery[name] for name in names]
                   for query, names in submission.images.items()}  # fmt: skip
    except KeyError:
        ranking = {}
    whole = len(ranking) == len(submission.images) == len(key.queries)
    if not whole or not all(map(can_be_scored, ranking.values())):
        raise RefusedError("; ".join(_problems(submission.images, key)))
    first = {query: first_hit(label_of(query), map(label_of, names)) for query, names in ranking.items()}
    return {query: first[queries[query]] for query in key.queries}


def score(first: dict[str, int], key: AnswerKey, queries: Iterable[str] | None = None) -> Score:
    """600 · top-1 + 300 · top-5 + 100 · top-10 over the queries, all of the key's or these of them."""
    asked = list(key.queries if queries is None else queries)
    right = {cut: [key.queries[query] for query in asked if 0 < first[query] <= cut] for cut in POINTS}
    wrong = {cut: [key.queries[query] for query in asked if not 0 < first[query] <= cut] for cut in POINTS}
    counts = [len(right[cut]) for cut in POINTS]
    return Score(competition_score(*counts, len(asked)), [n / len(asked) for n in counts], right, wrong)
