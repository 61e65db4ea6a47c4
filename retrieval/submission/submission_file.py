"""A ranking in; a checked submission.json, written whole, out.

    python -m retrieval.submission results/submission.json

As a script it sends a saved submission (again).
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from get_images import ImageFile
from retrieval.errors import InputError
from retrieval.files import as_json, write_whole
from retrieval.run import SUBMISSION, set_aside
from retrieval.submission.protocol import NAMES_PER_QUERY, SHAPE

log = logging.getLogger("retrieval.submission")


# ---- make and check -------------------------------------------------------------------------------


def make_submission(
    ranking: dict[str, list[str]], queries: list[ImageFile], gallery: list[ImageFile], group_name: str
) -> dict[str, Any]:
    """The body that the server wants: {"groupname": …, "images": {query name: its first ten gallery names}}.

    A gallery of fewer than ten images gives that many names, with a warning. Raises InputError unless every
    query is there once, with different names of the gallery.
    """
    length = min(NAMES_PER_QUERY, len(gallery))
    if length < NAMES_PER_QUERY:
        log.warning("the gallery has %d images, so each query gets so many names and not %d",
                    length, NAMES_PER_QUERY)  # fmt: skip
    images = {query: names[:NAMES_PER_QUERY] for query, names in ranking.items()}
    submission = {"groupname": group_name, "images": images}
    check_submission(submission)
    if sorted(images) != sorted(query.name for query in queries):
        raise InputError(f"the ranking has {len(images)} queries, and not the {len(queries)} that were given")
    known = {image.name for image in gallery}
    for query, names in images.items():
        if len(names) != length or not known.issuperset(names):
            raise InputError(f"the ranking of {query} is not {length} names of the gallery")
    return submission


def check_submission(submission: Any) -> None:
    """Raise InputError unless this is a body that the server can score, whatever its images are."""
    match submission:
        case {"groupname": str(), "images": dict(images)} if images and len(submission) == 2:
            pass
        case _:
            raise InputError(f"a submission looks like {SHAPE}")
    length = None
    for query, names in images.items():
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise InputError(f"the query {query} has no list of names: a submission looks like {SHAPE}")
        length = len(names) if length is None else length
        if len(set(names)) < len(names) or not 1 <= len(names) <= NAMES_PER_QUERY or len(names) != length:
            raise InputError(
                f"the query {query} has {len(names)} names, {len(set(names))} of them different: each query "
                f"needs the same number of different names, at most {NAMES_PER_QUERY}"
            )


def read_submission(path: Path) -> dict[str, Any]:
    """A saved submission, checked. Raises FileNotFoundError, or InputError for anything that is none."""
    try:
        submission = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}): give the submission.json that a run wrote") from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder: give the submission.json in it") from None
    try:
        check_submission(submission)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return submission


def save_submission(submission: dict[str, Any], folder: Path) -> Path:
    """Write submission.json, the exact body to send, and return its path.

    The files of an earlier run move to earlier/, unless they are of the same submission and hold no reply.
    """
    path, body = folder / SUBMISSION, as_json(submission)
    if (folder / "reply.txt").exists() or not path.exists() or path.read_bytes() != body:
        set_aside(folder)
    write_whole(path, body)
    return path
