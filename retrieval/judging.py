"""The bytes of a submission and an answer key in; its score, or the sentence that says what is wrong, out."""

from __future__ import annotations

import csv
import json
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from get_images import ImageFile, label_of
from retrieval.metrics import competition_score, first_hits, require_labels
from retrieval.settings import InputError

MOST_NAMES = 10  # of gallery images, for each query
LONGEST_GROUP = 100  # characters
SHOWN = 3  # offenders
SHAPE = '{"groupname": "…", "images": {"query.jpg": ["gallery.jpg", … ten names, best first]}}'


class RefusedError(ValueError):
    """A body that cannot be scored; the sentence says why. `group` is whose it is, if that is known."""

    group: str | None = None


@dataclass(frozen=True)
class Submission:
    """A body that can be scored."""

    group: str
    ranking: dict[str, list[str]]  # of the key's own names


@dataclass(frozen=True)
class AnswerKey:
    """Who is on each image. Names are paths below their folder."""

    queries: dict[str, str]  # a name → its identity
    gallery: dict[str, str | None]  # None: nobody who is looked for
    known: dict[str, dict[str, str]] = field(init=False)  # what each may be called → its name

    def __post_init__(self) -> None:
        known = {"query": _callings(self.queries), "gallery": _callings(self.gallery)}
        object.__setattr__(self, "known", known)


def _callings(names: Iterable[str]) -> dict[str, str]:
    """Each name by itself, and by its base name where no other has that."""
    names = list(names)
    counts = Counter(name.rpartition("/")[2] for name in names)
    bases = {name.rpartition("/")[2]: name for name in names if counts[name.rpartition("/")[2]] == 1}
    return bases | {name: name for name in names}


def key_of_folders(queries: list[ImageFile], gallery: list[ImageFile]) -> AnswerKey:
    """The class folders are the identities. Raises InputError where there are none."""
    require_labels(queries, gallery)
    return AnswerKey(*({image.name: label_of(image.name) for image in side} for side in (queries, gallery)))


def key_of_table(table: Path, queries: list[ImageFile], gallery: list[ImageFile]) -> AnswerKey:
    """Identities from a CSV table, a line `name,identity` an image; a first line of these words is none.

    A gallery image that is not in the table is of nobody who is looked for. Raises InputError where a query
    is missing, a name stands twice with different identities, or is of no image.
    """
    images = {image.name for image in [*queries, *gallery]}
    identities: dict[str, str] = {}
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            rows = [(number, row) for number, row in enumerate(csv.reader(file), 1) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{table} is not a CSV table in UTF-8 ({error})") from None
    for number, row in rows:
        cells = [cell.strip() for cell in row]
        if number == 1 and cells == ["name", "identity"]:
            continue
        if len(cells) != 2 or not all(cells):
            raise InputError(f"{table}, line {number}: {','.join(row)!r} is not of the form name,identity")
        name, identity = cells
        if name not in images:
            raise InputError(f"{table}, line {number}: there is no query or gallery image {name}")
        if identities.setdefault(name, identity) != identity:
            raise InputError(f"{table}, line {number}: {name} is {identities[name]} on an earlier line")
    missing = [image.name for image in queries if image.name not in identities]
    if missing:
        raise InputError(f"{table} lacks {_told('queries', missing)}")
    of_queries = {image.name: identities[image.name] for image in queries}
    return AnswerKey(of_queries, {image.name: identities.get(image.name) for image in gallery})


# ---- check ----------------------------------------------------------------------------------------


def read_body(body: bytes, key: AnswerKey) -> Submission:
    """The submission in a body. Raises RefusedError, with a sentence that names the first offenders."""
    content = _parse(body)
    group, images = _shape(content)
    problems = _names_problems(images, key)
    if problems:
        refused = RefusedError("; ".join(problems))
        refused.group = group
        raise refused
    queries, gallery = key.known["query"], key.known["gallery"]
    return Submission(
        group, {queries[query]: [gallery[name] for name in names] for query, names in images.items()}
    )


def _parse(body: bytes) -> Any:
    try:
        return json.loads(body.decode("utf-8-sig"), object_pairs_hook=_without_repeats)
    except UnicodeDecodeError:
        raise RefusedError("the body is not UTF-8 text: send JSON") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, RefusedError):
            raise
        reason = (
            str(error).partition(": ")[0][:100] if isinstance(error, json.JSONDecodeError) else "too deep"
        )
        raise RefusedError(f"the body is not JSON ({reason}): send {SHAPE}") from None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; refused where a name stands in it twice, since only one of the two could count."""
    made = dict(pairs)
    if len(made) < len(pairs):
        raise RefusedError(_told("names that stand twice in one object", _twice(name for name, _ in pairs)))
    return made


def _shape(content: Any) -> tuple[str, dict[str, list[str]]]:
    """The group's name and the images, if the content has the right shape."""
    if isinstance(content, list):
        raise RefusedError(f"the body is a list, as an older server took it, and not a dict: send {SHAPE}")
    if not isinstance(content, dict) or not {"groupname", "images"} <= content.keys():
        raise RefusedError(f"the body has no groupname and images: send {SHAPE}")
    group, images = content["groupname"], content["images"]
    if not isinstance(group, str) or not group.strip() or len(group) > LONGEST_GROUP or not _is_text(group):
        raise RefusedError(f"groupname is not a text of 1 to {LONGEST_GROUP} characters")
    if isinstance(images, list):
        raise RefusedError(f"images is a list, as an older server took it, and not a dict: send {SHAPE}")
    if not isinstance(images, dict):
        raise RefusedError(f"images is not a dict: send {SHAPE}")
    wrong = [query for query, names in images.items()
             if not isinstance(names, list) or not all(isinstance(name, str) for name in names)]  # fmt: skip
    if wrong:
        raise RefusedError(f"{_told('queries without a list of names', wrong)}: send {SHAPE}")
    return group.strip(), images


def _is_text(word: str) -> bool:
    """Whether it holds neither control characters nor half of a letter, which UTF-8 cannot say."""
    return not any(unicodedata.category(letter) in ("Cc", "Cs") for letter in word)


def _names_problems(images: dict[str, list[str]], key: AnswerKey) -> list[str]:
    """What is wrong with the names, a sentence each."""
    queries, gallery = key.known["query"], key.known["gallery"]
    asked = {queries[query] for query in images if query in queries}
    every = {name for names in images.values() for name in names}
    found = {
        "names with \\, which is no part of a path here":
            [name for name in [*images, *sorted(every)] if "\\" in name],
        "unknown queries": [query for query in images if query not in queries],
        "missing queries": [query for query in key.queries if query not in asked],
        "queries that stand there twice": _twice(queries[query] for query in images if query in queries),
        "unknown gallery images": sorted(name for name in every if name not in gallery),
        "queries without a name": [query for query, names in images.items() if not names],
        f"queries with more than {MOST_NAMES} names":
            [query for query, names in images.items() if len(names) > MOST_NAMES],
        "queries that name a gallery image twice":
            [query for query, names in images.items() if _twice(gallery.get(name, name) for name in names)],
    }  # fmt: skip
    return [_told(what, names) for what, names in found.items() if names]


def _twice(names: Iterable[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def _told(what: str, names: list[str]) -> str:
    """What they are, how many, and the first few.

    >>> _told("unknown queries", ["a", "b", "c", "d"])
    'unknown queries: 4 (a, b, c, …)'
    """
    shown = ", ".join(name if len(name) <= 60 else f"{name[:59]}…" for name in names[:SHOWN])
    shown = shown.encode("utf-8", "backslashreplace").decode()  # half of a letter, as JSON can hold
    return f"{what}: {len(names)} ({shown}{', …' * (len(names) > SHOWN)})"


# ---- score ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """What the server says of a submission."""

    accuracy: float  # 0 to 1000, not rounded
    results: list[float]  # top-1, top-5, top-10
    right: dict[int, list[str]]  # the identities of the queries with a right image among the first 1, 5, 10
    wrong: dict[int, list[str]]


def score(submission: Submission, key: AnswerKey, queries: Iterable[str] | None = None) -> Score:
    """600 · top-1 + 300 · top-5 + 100 · top-10 over the queries, all of the key's or these of them."""
    asked = list(key.queries if queries is None else queries)
    numbers = {identity: number for number, identity in enumerate(dict.fromkeys(key.queries.values()))}
    named = {query: f"{numbers[key.queries[query]]}/{query}" for query in asked}  # labelled, as metrics wants
    first = np.array(first_hits({
        named[query]: [f"{numbers.get(key.gallery[name], -1)}/{name}" for name in submission.ranking[query]]
        for query in asked
    }))  # fmt: skip
    hits = {cut: (first > 0) & (first <= cut) for cut in (1, 5, 10)}
    identities = [key.queries[query] for query in asked]
    right = {cut: [i for i, hit in zip(identities, of, strict=True) if hit] for cut, of in hits.items()}
    wrong = {cut: [i for i, hit in zip(identities, of, strict=True) if not hit] for cut, of in hits.items()}
    counts = [int(of.sum()) for of in hits.values()]
    return Score(competition_score(*counts, len(asked)), [n / len(asked) for n in counts], right, wrong)
