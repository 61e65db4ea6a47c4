"""retrieval/ranking/collapse.py: a ranking that tells nothing apart is told from one that does."""

import numpy as np
import pytest
from conftest import embeddings_of

from retrieval.ranking.collapse import mean_cosine, spread_of
from retrieval.ranking.exact import rank


def unit(vectors):
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def spread(queries, gallery):
    sides = embeddings_of(unit(queries), "q"), embeddings_of(unit(gallery), "g")
    return spread_of(rank(*sides, 10), sides[0])


RANDOM = np.random.default_rng(0)
QUERIES, GALLERY = RANDOM.normal(size=(8, 16)), RANDOM.normal(size=(40, 16))


def test_vectors_that_differ_are_no_collapse():
    found = spread(QUERIES, GALLERY)
    assert found["collapsed"] is False
    assert found["same_images"] == 1 / 8
    assert found["spread"] > 0.1
    assert abs(found["mean_cosine"]) < 0.2


@pytest.mark.parametrize("noise", [0, 1e-4])
def test_one_vector_for_all_is_a_collapse(noise):
    found = spread(1 + noise * QUERIES, 1 + noise * GALLERY)
    assert found["collapsed"] is True
    assert found["mean_cosine"] == pytest.approx(1)


def test_queries_that_all_get_the_same_images_are_a_collapse():
    queries = np.repeat(QUERIES[:2], 4, axis=0)  # half of them get one list, the others another
    assert spread(queries, GALLERY)["collapsed"] is True
    assert spread(np.concatenate([queries[:4], RANDOM.normal(size=(8, 16))]), GALLERY)["collapsed"] is False


def test_few_images_may_have_the_same_nearest():
    assert spread(np.repeat(QUERIES[:1], 3, axis=0), GALLERY)["collapsed"] is False
    assert spread(np.ones((8, 16)), np.ones((12, 16)))["collapsed"] is False


def test_a_cone_that_is_narrow_is_no_collapse():
    """The cosines of some networks lie between 0.99 and 1, and rank well."""
    found = spread(QUERIES + 20, GALLERY + 20)
    assert found["mean_cosine"] > 0.99
    assert found["collapsed"] is False


def test_the_mean_cosine_by_a_double_loop():
    vectors = unit(RANDOM.normal(size=(7, 5)))
    pairs = [vectors[i].astype(float) @ vectors[j] for i in range(7) for j in range(7) if i != j]
    assert mean_cosine(vectors) == pytest.approx(np.mean(pairs))
