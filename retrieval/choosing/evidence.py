"""Labelled vectors and recipes in; the scores on the drawn days, and whether a step pays, out."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from retrieval.choosing.days import Day, owners_of
from retrieval.choosing.recipes import Recipe, Source
from retrieval.distributed import progress_bar
from retrieval.errors import InputError
from retrieval.metrics import compare_identities, first_hits, points_of
from retrieval.ranking.means import PROJECTIONS, Member, rank_fused, rank_with
from retrieval.ranking.mixing import held_out_gain
from retrieval.ranking.projections import Projection, project
from retrieval.records import Embeddings, Ranking

log = logging.getLogger("retrieval.choosing")


class Try(NamedTuple):
    """A recipe beside the one that it would replace, on the same queries."""

    recipe: Recipe
    score: float
    gain: float
    interval: list[float]  # of the gain, at 95 %: it does not count the other tries


class Step(NamedTuple):
    """What was tried at once, the best of it, and its gain on queries that had no say in that choice."""

    before: Recipe
    score: float  # of the recipe before, 0 to 1000
    score_interval: list[float]
    tries: list[Try]
    best: Recipe
    gain: float
    interval: list[float]  # corrected for the number of all steps

    @property
    def pays(self) -> bool:
        return self.interval[0] > 0

    def as_dict(self) -> dict[str, Any]:
        """Return the step as recipe.json holds it, and as retrieval/report/choice.py reads it."""
        return {
            "before": str(self.before),
            "score": self.score,
            "score_interval": self.score_interval,
            "best": str(self.best),
            "taken": self.pays,
            "gain_held_out": self.gain,
            "gain_held_out_interval": self.interval,
            "tries": [tried._asdict() | {"recipe": str(tried.recipe)} for tried in self.tries],
        }


@dataclass
class Evidence:
    """The labelled vectors of each network, and the points that recipes earn with them on each day."""

    names: list[str]
    days: list[Day]
    device: str = "cpu"  # that ranks
    vectors: dict[Source, Embeddings] = field(default_factory=dict)
    _fitted: Any = field(default=None, init=False)  # the networks and the projection of these fits:
    _fits: dict[int, list[Projection | None]] = field(default_factory=dict, init=False)  # by half
    _projected_half: Any = field(default=None, init=False)  # the same, and the half, of these vectors:
    _vectors: list[Embeddings] = field(default_factory=list, init=False)
    _points: dict[tuple[Recipe, int], np.ndarray] = field(default_factory=dict, init=False)  # of a day

    def owners(self, every: int = 1) -> list[str]:
        """Return who each query of each `every`-th day belongs to, as owners_of."""
        return owners_of(self.names, self.days[::every])

    def points(self, recipe: Recipe, every: int = 1) -> np.ndarray:
        """Return the points, 0 to 1000, of each query of each `every`-th day."""
        return np.concatenate([self._of_day(recipe, day) for day in range(0, len(self.days), every)])

    def _of_day(self, recipe: Recipe, day: int) -> np.ndarray:
        if (recipe, day) not in self._points:
            with quiet("retrieval.ranking"):  # which would tell of each fit
                first = first_hits(self._rank(recipe, self.days[day]))
            self._points[recipe, day] = points_of(np.array(first))
        return self._points[recipe, day]

    def _rank(self, recipe: Recipe, day: Day) -> Ranking:
        rows = day.queries, day.gallery, day.fit
        members = [tuple(vectors.some(part) for part in rows) for vectors in self._projected(recipe, day)]
        others = replace(recipe, means=replace(recipe.means, projection=None))
        return rank_recipe(others, members, self.device)

    def _projected(self, recipe: Recipe, day: Day) -> list[Embeddings]:
        """Return the vectors of the recipe's networks as its projection maps them, fitted to the day's half.

        The last ones are kept, and all fits of the last projection, which take longer than a ranking.
        """
        kind = recipe.sources, recipe.means.projection
        if self._fitted != kind:
            self._fitted, self._fits = kind, {}
        if day.half not in self._fits:
            own = [self.vectors[source].some(day.fit) for source in recipe.sources]
            self._fits[day.half] = [PROJECTIONS[kind[1]](vectors) if kind[1] else None for vectors in own]
        if self._projected_half != (kind, day.half):
            vectors = [self.vectors[source] for source in recipe.sources]
            self._vectors = [project(of_all, fit) if fit else of_all
                             for of_all, fit in zip(vectors, self._fits[day.half], strict=True)]  # fmt: skip
            self._projected_half = kind, day.half
        return self._vectors

    def score(self, recipe: Recipe, every: int = 1) -> tuple[float, list[float]]:
        """Return the score of a recipe, 0 to 1000, and its 95 % interval over the owners of the queries."""
        points = self.points(recipe, every)
        return compare_identities(points, np.zeros(len(points)), self.owners(every))

    def step(
        self, recipe: Recipe, others: list[Recipe], tests: int, until: float, every: int = 1, seed: int = 0
    ) -> Step:
        """Compare recipes with the one that the best of them would replace, on each `every`-th day.

        `tests` are all steps that the search may ask about: the interval of the gain is corrected for them.
        Recipes that cannot rank these images, or are not reached until the time `until` (as of
        time.perf_counter), are left out.
        """
        own, owners = self.points(recipe, every), self.owners(every)
        with progress_bar(len(others), "recipes compared", unit="recipe", leave=False) as bar:
            reached = []
            for other in others:
                reached += [other] if self._can(other, every, until) else []
                bar.update()
        points = np.array([own, *(self.points(other, every) for other in reached)])
        gain, interval = held_out_gain(points, owners, tests, seed)
        tries = [Try(other, float(of_other.mean()), *compare_identities(of_other, own, owners))
                 for other, of_other in zip(reached, points[1:], strict=True)]  # fmt: skip
        best = [recipe, *reached][int(points.mean(1).argmax())]
        score, score_interval = compare_identities(own, np.zeros(len(own)), owners)
        return Step(recipe, score, score_interval, tries, best, gain, interval)

    def _can(self, recipe: Recipe, every: int, until: float) -> bool:
        try:
            for day in range(0, len(self.days), every):
                if time.perf_counter() > until:
                    return False
                self._of_day(recipe, day)
        except (InputError, np.linalg.LinAlgError) as error:  # as of too few images for a fit
            log.info("  %s cannot be tried: %s", recipe, error)
            return False
        return True


@contextmanager
def quiet(name: str, least: int = logging.ERROR) -> Iterator[None]:
    """Let a logger tell of errors only, or of what is at `least` of a level, inside a `with` block."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(least)
    try:
        yield
    finally:
        logger.setLevel(level)


def rank_recipe(recipe: Recipe, members: list[Member], device: str, k: int = 10) -> Ranking:
    """Rank by a recipe; each of its networks has a member, (queries, gallery, train)."""
    if recipe.second:
        return rank_fused(recipe.means, members, [1 - recipe.share, recipe.share], k, device)
    return rank_with(recipe.means, *members[0], k, device)
