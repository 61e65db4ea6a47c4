import numpy as np
import pytest
from conftest import embeddings_of

from retrieval.ranking import hubs
from retrieval.ranking.exact import rank
from retrieval.ranking.hubs import rank_without_hubs
from retrieval.records import UNREADABLE


def naive(queries, gallery, k, neighbours):
    """The definition, by double loops: for each readable query its images as (row, cosine, score)."""
    q, g = queries.vectors.astype(np.float64), gallery.vectors.astype(np.float64)
    asked = [i for i in range(len(q)) if q[i].any()]
    images = [j for j in range(len(g)) if g[j].any()]

    def mean(cosines):
        return np.mean(sorted(cosines, reverse=True)[:neighbours])

    r_query = {i: mean([q[i] @ g[j] for j in images]) for i in asked}
    r_image = {j: mean([q[i] @ g[j] for i in asked]) for j in images}
    ranked = {}
    for i in asked:
        scores = {j: 2 * (q[i] @ g[j]) - r_query[i] - r_image[j] for j in images}
        ranked[i] = [(j, q[i] @ g[j], scores[j]) for j in sorted(images, key=lambda j: -scores[j])][:k]
    return ranked


def assert_as_naive(queries, gallery, k, neighbours):
    ranking = rank_without_hubs(queries, gallery, k, neighbours)
    for query, best in naive(queries, gallery, k, neighbours).items():
        rows, cosines, scores = zip(*best, strict=True)
        assert ranking.rows[query, : len(rows)].tolist() == list(rows)
        assert ranking.cosines[query, : len(rows)] == pytest.approx(cosines, abs=1e-7)
        assert ranking.scores[query, : len(rows)] == pytest.approx(scores, abs=1e-7)
    return ranking


@pytest.mark.parametrize(("queries", "images", "k", "neighbours"),
                         [(9, 40, 5, 3), (3, 200, 2, 10), (30, 7, 10, 10), (1, 20, 4, 10)])  # fmt: skip
@pytest.mark.parametrize("common", [0, 3])  # vectors with a common part have strong hubs
def test_csls_is_its_definition(queries, images, k, neighbours, common):
    random = np.random.default_rng(queries)
    assert_as_naive(embeddings_of(random.normal(size=(queries, 6)) + common, "q"),
                    embeddings_of(random.normal(size=(images, 6)) + common, "g"), k, neighbours)  # fmt: skip


def test_a_hub_loses_its_place_by_hand():
    # g0 lies between both queries and is near to both; g1 and g2 are near to one each.
    queries = embeddings_of([[1, 0.2], [0.2, 1]], "q")
    gallery = embeddings_of([[1, 1], [1, -0.6], [-0.6, 1]], "g")
    assert rank(queries, gallery, 1).rows.tolist() == [[0], [0]]
    assert rank_without_hubs(queries, gallery, 1, neighbours=2).rows.tolist() == [[1], [2]]


def test_one_query_has_no_hubs_to_correct():
    random = np.random.default_rng(0)
    query, gallery = (
        embeddings_of(random.normal(size=(1, 5)), "q"),
        embeddings_of(random.normal(size=(50, 5)), "g"),
    )
    assert rank_without_hubs(query, gallery).names() == rank(query, gallery).names()


def test_unreadable_images_come_last_and_unreadable_queries_keep_the_order():
    random = np.random.default_rng(1)
    vectors, asked = random.normal(size=(12, 4)), random.normal(size=(5, 4))
    vectors[[0, 5]], asked[2] = 0, 0
    ranking = assert_as_naive(embeddings_of(asked, "q"), embeddings_of(vectors, "g"), 12, 3)
    assert ranking.rows[:, -2:].tolist() == [[0, 5]] * 5
    assert (ranking.cosines[:, -2:] == UNREADABLE).all()
    assert ranking.rows[2].tolist() == [1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 0, 5]
    assert ranking.scores[[0, 1, 3, 4], -2:].max() == -np.inf


def test_equal_images_keep_the_gallerys_order_however_many_they_are(monkeypatch):
    random = np.random.default_rng(2)
    queries = embeddings_of(random.normal(size=(4, 3)), "q")
    gallery = embeddings_of(np.repeat(random.normal(size=(3, 3)), 60, axis=0)[random.permutation(180)], "g")
    lengths = []
    monkeypatch.setattr(hubs, "rank", lambda *given: lengths.append(given[2]) or rank(*given))
    ranking = rank_without_hubs(queries, gallery, 2, 2)
    assert lengths[1:] == [8, 32, 128]  # 60 images have the highest score: the shortlist grows
    assert (np.diff(ranking.rows, axis=1) > 0).all()
    assert np.ptp(ranking.scores, axis=1).max() == 0
