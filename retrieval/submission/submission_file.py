"""A ranking in; a checked submission.json, written whole, out."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from retrieval.errors import InputError, listed
from retrieval.files import as_json, write_whole
from retrieval.records import Ranking
from retrieval.run import SUBMISSION, set_aside
from retrieval.submission.protocol import NAMES_PER_QUERY, SHAPE, is_list_of_names

log = logging.getLogger("retrieval.submission")


def write_submission(ranking: Ranking, group_name: str, output_dir: str | Path) -> Path:
    """Check a ranking, write it as submission.json, the exact body to send, and return the file's path.

    The files of an earlier run in `output_dir` move to earlier/, unless they are of the same submission and
    hold no reply. Raises InputError, before anything is written, where the server would refuse the ranking.
    """
    body, folder = as_json(make_submission(ranking, group_name)), Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SUBMISSION
    if (folder / "reply.txt").exists() or not path.exists() or path.read_bytes() != body:
        set_aside(folder)
    write_whole(path, body)
    return path


def make_submission(ranking: Ranking, group_name: str) -> dict[str, Any]:
    """Return the body that the server wants: {"groupname": …, "images": {query: its ten gallery names}}.

    A gallery of fewer than ten images gives that many names, with a warning. Raises InputError unless every
    query is there once, with different names of the gallery.
    """
    length = min(NAMES_PER_QUERY, len(ranking.gallery))
    if length < NAMES_PER_QUERY:
        log.warning("the gallery has %d images, so each query gets fewer than %d names",
                    length, NAMES_PER_QUERY)  # fmt: skip
    images = {}
    for query, rows in zip(ranking.queries, ranking.rows[:, :NAMES_PER_QUERY].tolist(), strict=False):
        if len(rows) != length or not all(0 <= row < len(ranking.gallery) for row in rows):
            raise InputError(f"the ranking of {query} is not {length} names of the gallery")
        images[query] = [ranking.gallery[row] for row in rows]
    if len(images) != len(ranking.queries):
        raise InputError(f"the ranking has {len(images)} queries, and not the {len(ranking.queries)} that "
                         "were given")  # fmt: skip
    submission = {"groupname": group_name, "images": images}
    check_submission(submission)
    return submission


def check_submission(submission: Any) -> None:
    """Raise InputError unless the server can score a body of this shape, whatever its images are."""
    match submission:
        case {"groupname": str(), "images": dict(images)} if images and len(submission) == 2:
            pass
        case _:
            raise InputError(f"a submission looks like {SHAPE}")
    length = None  # of the first list
    for query, names in images.items():
        if not is_list_of_names(names):
            raise InputError(f"the query {query} has no list of names: a submission looks like {SHAPE}")
        length = len(names) if length is None else length
        if not 1 <= len(set(names)) == len(names) == length <= NAMES_PER_QUERY:
            raise InputError(
                f"the query {query} has {len(names)} names, {len(set(names))} of them different: each query "
                f"needs the same number of different names, at most {NAMES_PER_QUERY}"
            )


def read_submission(path: Path) -> dict[str, Any]:
    """Read a saved submission and check it. Raises FileNotFoundError, or InputError for any other file."""
    submission = read_json(path)
    try:
        check_submission(submission)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return submission


def read_json(path: Path) -> Any:
    """Read a file that may hold a submission. Raises as read_submission, but does not look at its shape."""
    try:
        return json.loads(path.read_bytes(), object_pairs_hook=_without_repeats)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}): give the submission.json that a run wrote") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder: give the submission.json in it") from None


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a JSON object of its pairs. Raises InputError for a name that stands in it twice."""
    names = [name for name, _ in pairs]
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise InputError(f"{listed('names that stand twice', twice)}, and only one can count")
    return dict(pairs)


def faults_of(submission: Any, queries: Iterable[str], gallery: Iterable[str]) -> list[str]:
    """Return a sentence for each kind of fault that a submission to these images has.

    Without a fault, a server that knows the same images can score it.
    """
    match submission:
        case {"groupname": str(group), "images": dict(images)} if len(submission) == 2:
            pass
        case _:
            return [f"a submission looks like {SHAPE}"]
    queries, gallery = dict.fromkeys(queries), set(gallery)
    lists = {query: names for query, names in images.items() if is_list_of_names(names)}
    length = min(NAMES_PER_QUERY, len(gallery))
    unknown = dict.fromkeys(name for names in lists.values() for name in names if name not in gallery)
    found = {
        "missing queries": [query for query in queries if query not in images],
        "queries that are not in the query folder": [query for query in images if query not in queries],
        "queries without a list of names": [query for query in images if query not in lists],
        f"queries that do not have {length} names":
            [query for query, names in lists.items() if len(names) != length],
        "queries that name an image twice":
            [query for query, names in lists.items() if len(set(names)) < len(names)],
        "names that are not in the gallery folder": list(unknown),
    }  # fmt: skip
    nameless = [] if group.strip() else ["there is no group name: give --group_name NAME when you send it"]
    return nameless + [listed(what, names) for what, names in found.items() if names]
