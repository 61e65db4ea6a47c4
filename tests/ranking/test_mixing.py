"""retrieval/ranking/mixing.py: labels give weights to runs that help, and to no others."""

import numpy as np
import pytest
from conftest import vectors_of

from retrieval.metrics import compare_identities, independent, points_of
from retrieval.ranking.fusion import RunVectors, first_right
from retrieval.ranking.mixing import _half, choose_mix


def run_of(noise, seed, people=60, dimension=12):
    """A network that sees each person as a random direction (its own), with this much noise an image."""
    random = np.random.default_rng(seed)
    centres = random.normal(size=(people, dimension))

    def seen(person):
        return centres[person] * (noise < np.inf) + min(noise, 1e3) * random.normal(size=dimension)

    queries = {f"{person:02}/{n}.jpg": seen(person) for person in range(people) for n in range(2)}
    gallery = {f"{person:02}/g{n}.jpg": seen(person) for person in range(people) for n in range(3)}
    return RunVectors(vectors_of(queries), vectors_of(gallery))


def test_two_networks_that_complement_each_other_both_get_a_weight():
    mix = choose_mix([run_of(0.9, 1), run_of(0.8, 0)], ["one", "two"])
    assert min(mix.weights) > 0.2
    assert sum(mix.weights) == pytest.approx(1)
    (tried,) = mix.tried
    assert tried["run"] == "one"  # the weaker one is tried beside the other
    assert tried["gain_interval"][0] > 0
    assert mix.labelled["score"] > tried["alone"]


@pytest.mark.parametrize("seed", range(5))
def test_a_network_of_pure_noise_gets_weight_0(seed):
    mix = choose_mix([run_of(0.8, 0), run_of(np.inf, 10 + seed), run_of(np.inf, 20 + seed)], ["a", "b", "c"])
    assert mix.weights == [1, 0, 0]
    assert [tried["share"] for tried in mix.tried] == [0, 0]
    assert mix.labelled["equal_weights_difference"] < 0


def test_the_points_by_share_are_those_of_the_mixes():
    runs = [run_of(0.9, 1), run_of(0.8, 0)]
    (tried,) = choose_mix(runs, ["one", "two"]).tried
    points = points_of(first_right(runs, [[0, 1], [0.3, 0.7]])).mean(1)
    assert [tried["points_by_share"][0], tried["points_by_share"][3]] == pytest.approx(points.tolist())


def test_the_halves_are_of_identities_and_of_queries_where_there_are_few():
    labels = [str(n % 30) for n in range(90)]
    half = _half(labels, 0)
    assert half.sum() == 45
    assert (half[:30] == half[30:60]).all()
    assert (_half(labels, 0) == half).all()
    assert (_half(labels, 1) != half).any()
    few = _half(independent([str(n % 3) for n in range(90)]), 0)
    assert few.sum() == 45
    assert not (few[:30] == few[30:60]).all()


def test_the_interval_is_that_of_a_bootstrap_over_identities():
    random = np.random.default_rng(0)
    labels = [f"{n % 25}" for n in range(70)]
    points, others = random.integers(0, 1000, 70), random.integers(0, 1000, 70)
    gain, interval = compare_identities(points, others, labels)
    assert gain == pytest.approx((points - others).mean())
    means, people = [], sorted(set(labels))
    for _ in range(4000):  # draw people with replacement, and take all of their queries
        drawn = random.choice(people, len(people))
        rows = [row for person in drawn for row in range(70) if labels[row] == person]
        means.append((points[rows] - others[rows]).mean())
    assert interval == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=12)
    wider = compare_identities(points, others, labels, tests=5)[1]
    assert wider[0] < interval[0] < interval[1] < wider[1]


def test_few_owners_are_drawn_and_not_their_queries():
    """Two images, seen on 50 days each: a draw takes one of them twice, or both."""
    points, owners = np.repeat([1000, 0], 50), ["a"] * 50 + ["b"] * 50
    assert compare_identities(points, np.zeros(100), owners) == (500, [0, 1000])
    of_queries = compare_identities(points, np.zeros(100), list(range(100)))[1]
    assert 400 <= of_queries[0] < of_queries[1] <= 600  # 500 ± 1.96 · 50
