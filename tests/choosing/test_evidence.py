"""retrieval/choosing/evidence.py: a step is taken where it pays, and noise pays nothing."""

import time

import numpy as np
import pytest
from conftest import vectors_of

from retrieval.choosing.days import check_days, draw_days, owners_of
from retrieval.choosing.evidence import Evidence, rank_recipe
from retrieval.choosing.recipes import Recipe, Source, fusions, neighbours
from retrieval.errors import InputError
from retrieval.metrics import first_hits, points_of
from retrieval.ranking.means import Means

GOOD, BAD, OTHER = Source("good"), Source("bad"), Source("other")
LATER = time.perf_counter() + 1e6


def people(noise, seed, count=50, images=6, dimension=16):
    """A network's vectors: a random direction for each person, with noise on each image."""
    random = np.random.default_rng(seed)
    centres = random.normal(size=(count, dimension))
    return vectors_of({f"{person:02}/{n}.jpg": centres[person] + noise * random.normal(size=dimension)
                       for person in range(count) for n in range(images)})  # fmt: skip


def evidence_of(count=5, seed=0, **vectors):
    names = next(iter(vectors.values())).names
    evidence = Evidence(names, draw_days(names, 2, 0.5, count, seed))
    evidence.vectors |= {Source(model): of_model for model, of_model in vectors.items()}
    return evidence


def test_points_are_those_of_each_day_ranked_by_hand():
    vectors = people(1.0, 0)
    evidence = evidence_of(count=3, good=vectors)
    by_hand = []
    for day in evidence.days:
        queries, gallery = vectors.some(day.queries), vectors.some(day.gallery)
        by_hand += points_of(
            np.array(first_hits(rank_recipe(Recipe(GOOD), [(queries, gallery, None)], "cpu")))
        ).tolist()
    assert evidence.points(Recipe(GOOD)).tolist() == by_hand
    assert len(evidence.owners()) == len(by_hand)


@pytest.mark.parametrize(
    "means", [Means(projection="lda", hubs=5), Means(projection="within_class", cover=True)]
)
def test_a_projection_that_is_fitted_once_a_day_changes_no_ranking(means):
    vectors = people(1.0, 1)
    evidence = evidence_of(count=2, good=vectors)
    recipe = Recipe(GOOD, means)
    whole = [
        first_hits(rank_recipe(recipe, [tuple(vectors.some(rows) for rows in day[:3])], "cpu"))
        for day in evidence.days
    ]
    assert evidence.points(recipe).tolist() == points_of(np.concatenate(whole)).tolist()


def test_a_better_network_is_taken():
    evidence = evidence_of(bad=people(3.0, 0), good=people(0.5, 1))
    step = evidence.step(Recipe(BAD), [Recipe(GOOD)], tests=10, until=LATER)
    assert step.pays
    assert step.best == Recipe(GOOD)
    assert step.gain == pytest.approx(step.tries[0].gain)  # there was one to choose


def test_a_worse_network_is_not_taken():
    evidence = evidence_of(bad=people(3.0, 0), good=people(0.5, 1))
    step = evidence.step(Recipe(GOOD), [Recipe(BAD)], tests=10, until=LATER)
    assert not step.pays
    assert step.best == Recipe(GOOD)
    assert step.tries[0].interval[1] < 0


def test_two_networks_that_complement_each_other_are_fused():
    evidence = evidence_of(count=10, good=people(1.2, 0), other=people(1.3, 1))
    others = fusions(Recipe(GOOD), [GOOD, OTHER])[OTHER]
    step = evidence.step(Recipe(GOOD), others, tests=10, until=LATER)
    assert step.pays
    assert step.best.second == OTHER


def test_the_interval_widens_with_the_number_of_steps():
    evidence = evidence_of(good=people(1.0, 0), bad=people(1.2, 1))
    once, often = (evidence.step(Recipe(BAD), [Recipe(GOOD)], tests, LATER) for tests in (1, 20))
    assert often.interval[0] < once.interval[0]
    assert often.gain == once.gain


def test_queries_of_several_days_count_once_for_each_image():
    """Two scenes of six images, drawn ten times: 20 queries of at most 12 images, which are the evidence."""
    names = [f"{scene}/{image}.jpg" for scene in "ab" for image in range(6)]
    days = draw_days(names, 1, 0.3, 10)
    owners = owners_of(names, days)
    assert len(owners) == 20
    assert set(owners) <= set(names)
    with pytest.raises(InputError, match=f"only {len(set(owners))} different queries, and fewer than 20"):
        check_days(names, days)


def test_when_the_time_is_over_nothing_more_is_tried():
    evidence = evidence_of(good=people(1.0, 0))
    step = evidence.step(Recipe(GOOD), neighbours(Recipe(GOOD), 2), 7, until=time.perf_counter() - 1)
    assert not step.tries
    assert not step.pays


def test_a_recipe_that_cannot_be_fitted_is_left_out():
    few = people(1.0, 0, count=2, images=4)
    evidence = Evidence(few.names, draw_days(few.names, 2, 0.5, 1))
    evidence.days = [day._replace(fit=day.fit[:1]) for day in evidence.days]
    evidence.vectors[GOOD] = few
    step = evidence.step(
        Recipe(GOOD), [Recipe(GOOD, Means(projection="lda")), Recipe(GOOD, Means(hubs=2))], 7, LATER
    )
    assert [tried.recipe.means for tried in step.tries] == [Means(hubs=2)]
