"""The bytes of a submission and an answer key in; its score, or the sentence that says what is wrong, out."""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from retrieval.errors import listed
from retrieval.metrics import POINTS, competition_score, first_hit
from retrieval.server.answer_key import AnswerKey, repeated
from retrieval.server.group_names import folded
from retrieval.submission.protocol import NAMES_PER_QUERY, SHAPE, is_list_of_names

LONGEST_GROUP = 100  # characters


class RefusedError(Exception):
    """A submission that is not scored: the sentence and the HTTP status of the answer."""

    def __init__(self, sentence: str, status: int = 422, headers: dict[str, str] | None = None) -> None:
        super().__init__(sentence)
        self.status, self.headers = status, headers or {}


@dataclass(frozen=True)
class Submission:
    """A body of the right shape, whose names may still be wrong."""

    group: str
    images: dict[str, list[str]]


# ---- parse ----------------------------------------------------------------------------------------


def parse(body: bytes) -> Submission:
    """Read the submission in a body. Raises RefusedError if it does not have the right shape."""
    try:
        content = json.loads(body, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise RefusedError(f"the body is not JSON ({error}): send {SHAPE}") from None
    return _check_shape(content)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object of its pairs; refuse a name that stands in it twice, since only one could count."""
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = repeated(name for name, _ in pairs)
        raise RefusedError(listed("names that stand twice in one object", sorted(twice)))
    return made


def _check_shape(content: Any) -> Submission:
    """Return the content as a submission, if it has the right shape."""
    if not isinstance(content, dict) or not {"groupname", "images"} <= content.keys():
        raise RefusedError(f"the body has no groupname and images: send {SHAPE}")
    group, images = content["groupname"], content["images"]
    if not isinstance(group, str) or len(group) > LONGEST_GROUP or not _is_readable(group):
        raise RefusedError(f"groupname is not a text of 1 to {LONGEST_GROUP} characters that can be read")
    if not isinstance(images, dict):
        raise RefusedError(f"images is not a dict: send {SHAPE}")
    wrong = [query for query, names in images.items() if not is_list_of_names(names)]
    if wrong:
        raise RefusedError(f"{listed('queries without a list of names', wrong)}: send {SHAPE}")
    return Submission(group.strip(), images)


def _is_readable(text: str) -> bool:
    """Return whether a text shows something, without control characters and halves of surrogate pairs."""
    kinds = {unicodedata.category(letter) for letter in text}
    return not kinds & {"Cc", "Cs"} and any(kind[0] not in "CZ" for kind in kinds) and bool(folded(text))


# ---- judge ----------------------------------------------------------------------------------------


def judge(submission: Submission, key: AnswerKey) -> dict[str, int]:
    """Return the rank of each query's first right image, from 1; 0 if none is right.

    The queries are in the key's order. Raises RefusedError, which names the first offenders, unless each
    query of the key has 1 to NAMES_PER_QUERY different gallery images.
    """
    sent, asked = len(submission.images), len(key.queries)
    if sent > 2 * asked:  # so many names are not looked at
        raise RefusedError(f"{sent} queries, and the competition has {asked}: send each of them once")
    problems = _problems(submission.images, key)
    if problems:
        raise RefusedError("; ".join(problems))
    queries, gallery = key.aliases
    ranked = {queries[query]: [key.gallery[gallery[name]] for name in names]
              for query, names in submission.images.items()}  # fmt: skip
    return {query: first_hit(identity, ranked[query]) for query, identity in key.queries.items()}


def _problems(images: dict[str, list[str]], key: AnswerKey) -> list[str]:
    """Return a sentence for each kind of wrong name in a submission."""
    queries, gallery = key.aliases
    asked = Counter(queries[query] for query in images if query in queries)
    unknown = [query for query in images if query not in queries]
    unknown_images = sorted(set().union(*images.values()) - gallery.keys())
    both = list(dict.fromkeys([*unknown, *unknown_images]))
    paths = [name for name in both if "\\" in name]
    ambiguous = [name for name in both if name in key.ambiguous]
    explained = {*paths, *ambiguous}
    found = {
        "names with \\ in place of /": paths,
        "names that several images have, so that only their paths below the folder tell which": ambiguous,
        "unknown queries": [name for name in unknown if name not in explained],
        "missing queries": [query for query in key.queries if query not in asked],
        "queries given twice, by path and by base name":
            [query for query, count in asked.items() if count > 1],
        "unknown gallery images": [name for name in unknown_images if name not in explained],
        "queries without a name": [query for query, names in images.items() if not names],
        f"queries with more than {NAMES_PER_QUERY} names":
            [query for query, names in images.items() if len(names) > NAMES_PER_QUERY],
        "queries that name a gallery image twice":
            [query for query, names in images.items() if len({*map(gallery.get, names, names)}) < len(names)],
    }  # fmt: skip
    return [listed(what, names) for what, names in found.items() if names]


# ---- score ----------------------------------------------------------------------------------------


def score(
    first: dict[str, int], key: AnswerKey, queries: Iterable[str] | None = None
) -> tuple[float, dict[str, list]]:
    """Score the first hits that judge returns, over these queries or over all of the key.

    Return 600 · top-1 + 300 · top-5 + 100 · top-10, not rounded, and what stands beside it in the reply: the
    identities of the queries with a right image among the first 1, 5 and 10 (right1 …) and of the others
    (wrong1 …), and the three accuracies (results).
    """
    asked = list(key.queries if queries is None else queries)
    lists: dict[str, list] = {}
    for cut in POINTS:
        lists[f"right{cut}"] = [key.queries[query] for query in asked if 0 < first[query] <= cut]
        lists[f"wrong{cut}"] = [key.queries[query] for query in asked if not 0 < first[query] <= cut]
    counts = [len(lists[f"right{cut}"]) for cut in POINTS]
    return competition_score(*counts, len(asked)), lists | {"results": [n / len(asked) for n in counts]}
