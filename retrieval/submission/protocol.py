"""What the client and the evaluation server agree on: the shape of a submission, its limits, the header."""

from __future__ import annotations

from typing import Any

NAMES_PER_QUERY = 10  # gallery names, best first
SHAPE = '{"groupname": "…", "images": {"query.jpg": ["gallery.jpg", … ten names, best first]}}'
TOKEN = "X-Group-Token"  # the header that holds a group's token


def is_list_of_names(value: Any) -> bool:
    """Return whether this is what a query has in a submission: a list of texts."""
    return isinstance(value, list) and {str}.issuperset(map(type, value))
