from math import exp

import numpy as np
import pytest
from conftest import embeddings_of

from retrieval.ranking import reciprocal
from retrieval.ranking.reciprocal import rank_by_reciprocals
from retrieval.records import UNREADABLE


def naive(queries, gallery, k1, k2, lam):
    """The paper's definition, with sets and double loops: the distances (queries, gallery images)."""
    x = np.concatenate([queries.vectors, gallery.vectors]).astype(np.float64)
    every, d = range(len(x)), 2 - 2 * x @ x.T
    order = [sorted(every, key=lambda j: (j != i, d[i, j])) for i in every]  # an image is its own nearest

    def reciprocals(p, k):
        return {g for g in order[p][: k + 1] if p in order[g][: k + 1]}

    weights = []
    for p in every:
        star = set(reciprocals(p, k1))
        for c in reciprocals(p, k1):
            half = reciprocals(c, k1 // 2)
            if len(half & reciprocals(p, k1)) >= 2 / 3 * len(half):
                star |= half
        total = sum(exp(-d[p, g]) for g in star)
        weights.append([exp(-d[p, g]) / total if g in star else 0 for g in every])
    weights = [np.mean([weights[g] for g in order[p][:k2]], axis=0) for p in every]
    n = len(queries.names)
    found = np.empty((n, len(gallery.names)))
    for q in range(n):
        for g in range(len(gallery.names)):
            smaller = sum(min(a, b) for a, b in zip(weights[q], weights[n + g], strict=True))
            larger = sum(max(a, b) for a, b in zip(weights[q], weights[n + g], strict=True))
            found[q, g] = (1 - lam) * (1 - smaller / larger) + lam * d[q, n + g]
    return found


def people(seed, queries, images, identities=6, dimension=8):
    random = np.random.default_rng(seed)
    centres = random.normal(size=(identities, dimension))
    sides = []
    for count, prefix in ((queries, "q"), (images, "g")):
        noise = 0.4 * random.normal(size=(count, dimension))
        sides.append(embeddings_of(centres[random.integers(identities, size=count)] + noise, prefix))
    return sides


@pytest.mark.parametrize(
    ("k1", "k2", "lam"), [(20, 6, 0.3), (5, 3, 0.3), (4, 1, 0.0), (7, 2, 1.0), (200, 6, 0.5)]
)
@pytest.mark.parametrize("tile", [reciprocal.TILE, 100])  # 100: two queries at a time
def test_k_reciprocal_is_its_definition(monkeypatch, k1, k2, lam, tile):
    monkeypatch.setattr(reciprocal, "TILE", tile)
    queries, gallery = people(k1, 11, 45)
    ranking = rank_by_reciprocals(queries, gallery, 10, k1, k2, lam)
    wanted = naive(queries, gallery, k1, k2, lam)
    best = np.argsort(wanted, axis=1, kind="stable")[:, :10]
    assert ranking.rows.tolist() == best.tolist()
    assert -ranking.scores == pytest.approx(np.take_along_axis(wanted, best, 1), abs=1e-6)
    cosines = np.take_along_axis(queries.vectors @ gallery.vectors.T, best, 1)
    assert ranking.cosines == pytest.approx(cosines, abs=1e-6)


def test_unreadable_images_take_no_part():
    queries, gallery = people(3, 6, 20)
    whole = rank_by_reciprocals(queries, gallery, 10)
    with_broken = [embeddings_of(np.insert(side.vectors, 2, 0, axis=0), name)
                   for side, name in ((queries, "q"), (gallery, "g"))]  # fmt: skip
    ranking = rank_by_reciprocals(*with_broken, 21)
    readable = [0, 1, 3, 4, 5, 6]
    assert ranking.rows[readable, :10].tolist() == (whole.rows + (whole.rows >= 2)).tolist()
    assert ranking.scores[readable, :10] == pytest.approx(whole.scores, abs=1e-6)
    assert (ranking.rows[:, -1] == 2).all()
    assert (ranking.cosines[:, -1] == UNREADABLE).all()
    assert ranking.scores[readable, -1].max() == -np.inf
    assert ranking.rows[2].tolist() == [0, 1, *range(3, 21), 2]


def test_equal_images_keep_the_gallerys_order():
    queries, gallery = people(4, 3, 30)
    twice = embeddings_of(np.concatenate([gallery.vectors, gallery.vectors]), "g")
    ranking = rank_by_reciprocals(queries, twice, 60, k1=200, k2=1)
    assert (ranking.rows[:, 1::2] == ranking.rows[:, ::2] + 30).all()
