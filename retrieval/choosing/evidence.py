"""Labelled vectors and recipes in; the scores on the drawn days, and whether a step pays, out."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from get_images import label_of
from retrieval.choosing.days import Day, by_identity
from retrieval.choosing.recipes import Recipe, Source
from retrieval.errors import InputError
from retrieval.metrics import compare_identities, first_hits, points_of
from retrieval.ranking.means import Means, rank_fused, rank_with, refined
from retrieval.ranking.mixing import held_out_gain
from retrieval.records import Embeddings, Ranking

log = logging.getLogger("retrieval.choosing")

Member = tuple[Embeddings, Embeddings, Embeddings]  # queries, gallery and labelled images of one network


class Try(NamedTuple):
    """A recipe beside the one that it would replace, on the same queries."""

    recipe: Recipe
    score: float
    gain: float
    interval: list[float]  # of the gain, at 95 %: it does not count the other tries


class Step(NamedTuple):
    """What was tried at once, the best of it, and its gain on queries that had no say in that choice."""

    before: Recipe
    tries: list[Try]
    best: Recipe
    gain: float
    interval: list[float]  # corrected for the number of all steps

    @property
    def pays(self) -> bool:
        return self.interval[0] > 0


@dataclass
class Evidence:
    """The labelled vectors of each network, and the points that recipes earn with them on each day."""

    names: list[str]
    days: list[Day]
    device: str = "cpu"  # that ranks
    vectors: dict[Source, Embeddings] = field(default_factory=dict)
    _last: tuple[Any, list[list[Member]]] = field(default=(None, []), init=False)
    _points: dict[Recipe, np.ndarray] = field(default_factory=dict, init=False)

    @property
    def owners(self) -> list[str]:
        """Return who each query belongs to, day after day: identities, or images where classes are few.

        What belongs together is right or wrong together, and is drawn together by the bootstrap.
        """
        of_name = label_of if by_identity(self.names) else str
        return [of_name(self.names[row]) for day in self.days for row in day.queries]

    def points(self, recipe: Recipe) -> np.ndarray:
        """Return the points of each query of all days, 0 to 1000, by the competition's rule."""
        if recipe not in self._points:
            with quiet("retrieval.ranking"):  # which would tell of each fit
                first = [first_hits(self._rank(recipe, day)) for day in self._projected(recipe)]
            self._points[recipe] = points_of(np.concatenate(first))
        return self._points[recipe]

    def _projected(self, recipe: Recipe) -> list[list[Member]]:
        """Return the members of each day as the recipe's projection maps them.

        The last ones are kept, since most recipes of a step share the projection, whose fit takes long.
        """
        key = recipe.sources, recipe.means.projection
        if self._last[0] != key:
            projection = Means(projection=recipe.means.projection, cover=True)  # so that `fit` is mapped, too
            members = [[refined(projection, *(self.vectors[source].some(rows) for rows in day), self.device)
                        for source in recipe.sources] for day in self.days]  # fmt: skip
            self._last = key, members
        return self._last[1]

    def _rank(self, recipe: Recipe, members: list[Member]) -> Ranking:
        others = replace(recipe, means=replace(recipe.means, projection=None))
        return rank_recipe(others, members, self.device)

    def score(self, recipe: Recipe) -> tuple[float, list[float]]:
        """Return the score of a recipe, 0 to 1000, and its 95 % interval over the owners of the queries."""
        points = self.points(recipe)
        return compare_identities(points, np.zeros(len(points)), self.owners)

    def step(self, recipe: Recipe, others: list[Recipe], tests: int, until: float, seed: int = 0) -> Step:
        """Compare recipes with the one that the best of them would replace.

        `tests` are all steps that the search may ask about: the interval of the gain is corrected for them.
        Recipes that cannot rank these images, or are not reached until the time `until` (as of
        time.perf_counter), are left out.
        """
        own = self.points(recipe)
        reached = [other for other in others if self._can(other, until)]
        points = np.array([own, *map(self.points, reached)])
        gain, interval = held_out_gain(points, self.owners, tests, seed)
        tries = [Try(other, float(of_other.mean()), *compare_identities(of_other, own, self.owners))
                 for other, of_other in zip(reached, points[1:], strict=True)]  # fmt: skip
        best = [recipe, *reached][int(points.mean(1).argmax())]
        return Step(recipe, tries, best, gain, interval)

    def _can(self, recipe: Recipe, until: float) -> bool:
        if time.perf_counter() > until:
            return False
        try:
            self.points(recipe)
        except (InputError, np.linalg.LinAlgError) as error:  # as of too few images for a fit
            log.info("  %s cannot be tried: %s", recipe, error)
            return False
        return True


@contextmanager
def quiet(name: str) -> Iterator[None]:
    """Let a logger tell of errors only, inside a `with` block."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def rank_recipe(recipe: Recipe, members: list[tuple], device: str, k: int = 10) -> Ranking:
    """Rank by a recipe; each of its networks has a member, (queries, gallery, train)."""
    if recipe.second:
        return rank_fused(recipe.means, members, [1 - recipe.share, recipe.share], k, device)
    return rank_with(recipe.means, *members[0], k, device)
