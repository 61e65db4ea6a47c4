"""A recipe of choose.py in; how it was chosen, for the report, out."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from pydantic import BaseModel, ValidationError

Interval = tuple[float, float]  # 95 %

log = logging.getLogger("retrieval.report")


class Try(BaseModel):
    """A recipe beside the one that it would replace."""

    recipe: str
    score: float  # 0 to 1000
    gain: float
    interval: Interval


class Step(BaseModel):
    """What was tried at once, and the gain of the best on held-out images."""

    before: str
    score: float
    score_interval: Interval
    best: str
    taken: bool
    gain_held_out: float
    gain_held_out_interval: Interval
    tries: list[Try]


class Choice(BaseModel):
    """The steps of a search, as `Search` in retrieval/choosing/search.py writes them into recipe.json."""

    recipe: str
    steps: list[Step]
    passed_over: dict[str, str]  # networks, and why
    score_on_drawn_days: float
    score_interval: Interval
    days: int
    matches: int
    tests: int


def read_choice(path: Path | None) -> Choice | None:
    """Return how a recipe was chosen, or None without a recipe, or for one that was written by hand.

    Warns if the file has "steps" that are not as choose.py writes them. Raises OSError if it is gone.
    """
    recipe = json.loads(path.read_bytes()) if path else {}
    if not recipe.get("steps"):
        return None
    try:
        return Choice.model_validate(recipe)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        log.warning('the report does not show how %s was chosen: its "%s" is not as choose.py writes it',
                    path, where)  # fmt: skip
        return None
