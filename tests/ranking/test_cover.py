import math
import tracemalloc
from itertools import combinations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from get_images import label_of
from retrieval import records
from retrieval.errors import InputError
from retrieval.metrics import first_hits, points_of
from retrieval.ranking import cover as cover_module
from retrieval.ranking.cover import Curve, cover, fit_curve
from retrieval.ranking.exact import rank
from retrieval.records import UNREADABLE, Embeddings, Ranking

CURVE = Curve(mean=0.3, std=0.2, slope=2.0, intercept=-1.0)


def unit(vectors):
    vectors = np.asarray(vectors, dtype=np.float32)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 0)


def people(count, images, spread, seed, dimension=16):
    """Images of people: a direction for each person, and noise of the length `spread` for each image."""
    random = np.random.default_rng(seed)
    directions = np.repeat(unit(random.normal(size=(count, dimension))), images, axis=0)
    noise = random.normal(size=directions.shape) * spread / dimension**0.5
    names = [f"person{person}/{image}.jpg" for person in range(count) for image in range(images)]
    return Embeddings(names, unit(directions + noise))


def split(images, of_person):
    """The first image of each person as a query, the others as the gallery."""
    first = np.arange(len(images.names)) % of_person == 0
    return [Embeddings([images.names[row] for row in np.flatnonzero(rows)], images.vectors[rows])
            for rows in (first, ~first)]  # fmt: skip


def probability(curve, cosine):
    return 1 / (1 + math.exp(-(curve.slope * (cosine - curve.mean) / curve.std + curve.intercept)))


def naive(ranking, gallery, curve, k, shortlist):
    """The definition: of those that are left, the largest p_j · Π (1 − r_js) over the chosen s."""
    vectors = gallery.vectors.astype(np.float64)
    result = []
    for rows, cosines in zip(ranking.rows[:, :shortlist], ranking.cosines[:, :shortlist], strict=True):
        chosen = [0]
        while len(chosen) < min(k, len(rows)):
            gains = {}
            for j in set(range(len(rows))) - set(chosen):
                gains[j] = probability(curve, cosines[j])
                for s in chosen:
                    gains[j] *= 1 - probability(curve, vectors[rows[j]] @ vectors[rows[s]])
            chosen.append(max(gains, key=gains.get))
        result.append(rows[chosen].tolist())
    return result


# ---- cover ----------------------------------------------------------------------------------------


def test_by_hand():
    """b looks like a, and c like neither: b repeats a, so c comes before b, though it is less similar."""
    gallery = Embeddings(["a", "b", "c"], unit([[10, 3, 0], [10, 4, 0], [8, -6, 0]]))
    ranking = rank(Embeddings(["q"], unit([[1, 0, 0]])), gallery)
    assert ranking.names() == {"q": ["a", "b", "c"]}
    curve = Curve(mean=0.9, std=0.1, slope=3.0, intercept=0.0)
    covered = cover(ranking, gallery, curve)
    assert covered.names() == {"q": ["a", "c", "b"]}
    assert covered.cosines == pytest.approx(ranking.cosines[:, [0, 2, 1]])
    assert (covered.queries, covered.gallery) == (["q"], ["a", "b", "c"])


@pytest.mark.parametrize(("k", "shortlist"), [(10, 40), (10, 12), (3, 100), (1, 5), (20, 20), (10, 4)])
@pytest.mark.parametrize("spread", [0.3, 1.5])
def test_the_same_as_the_definition_whatever_the_blocks(monkeypatch, spread, k, shortlist):
    queries, gallery = split(people(12, 6, spread, seed=k), of_person=6)
    ranking = rank(queries, gallery, 40)
    expected = naive(ranking, gallery, CURVE, k, shortlist)
    for chunk_bytes in (1, 4 * 16 * 100, 2**26):
        monkeypatch.setattr(records, "CHUNK_BYTES", chunk_bytes)
        assert cover(ranking, gallery, CURVE, k, shortlist).rows.tolist() == expected


def test_the_second_image_gives_the_largest_expected_coverage_beside_the_first():
    """Of all pairs with the first image, by the probability that the one or the other is right."""
    queries, gallery = split(people(5, 5, 1.0, seed=3), of_person=5)
    ranking = rank(queries, gallery, 20)
    covered = cover(ranking, gallery, CURVE, k=2, shortlist=20)
    for rows, cosines, chosen in zip(ranking.rows, ranking.cosines, covered.rows, strict=True):
        p = {row: probability(CURVE, cosine) for row, cosine in zip(rows, cosines, strict=True)}
        coverage = {}
        for one, other in combinations(rows, 2):
            both_if_other = probability(CURVE, gallery.vectors[one] @ gallery.vectors[other])
            coverage[one, other] = p[one] + p[other] - p[other] * both_if_other
        with_first = {pair: value for pair, value in coverage.items() if pair[0] == rows[0]}
        assert tuple(chosen) == max(with_first, key=with_first.get)


@pytest.mark.parametrize("slope", [0.0, 0.5, 20.0, 500.0])
def test_the_first_image_stays_and_none_is_repeated(slope):
    queries, gallery = split(people(20, 8, 1.0, seed=1), of_person=8)
    ranking = rank(queries, gallery, 100)
    covered = cover(ranking, gallery, Curve(0.3, 0.2, slope, 0.0))
    assert covered.rows.shape == covered.cosines.shape == (20, 10)
    assert (covered.rows.dtype, covered.cosines.dtype) == (np.int64, np.float64)
    assert np.array_equal(covered.rows[:, 0], ranking.rows[:, 0])
    for rows, cosines, query in zip(covered.rows, covered.cosines, queries.vectors, strict=True):
        assert len(set(rows)) == 10
        assert cosines == pytest.approx(gallery.vectors[rows] @ query, abs=1e-6)


def test_a_curve_that_tells_nothing_changes_nothing():
    queries, gallery = split(people(20, 8, 1.0, seed=1), of_person=8)
    ranking = rank(queries, gallery, 100)
    covered = cover(ranking, gallery, Curve(0.3, 0.2, slope=0.0, intercept=-2.0))
    assert np.array_equal(covered.rows, ranking.rows[:, :10])


def test_the_label_of_no_query_and_of_no_gallery_image_is_used():
    queries, gallery = split(people(20, 8, 1.0, seed=1), of_person=8)
    covered = cover(rank(queries, gallery, 100), gallery, CURVE)
    random = np.random.default_rng(0)
    queries, gallery = (Embeddings(random.permutation(some.names).tolist(), some.vectors)
                        for some in (queries, gallery))  # fmt: skip
    assert np.array_equal(cover(rank(queries, gallery, 100), gallery, CURVE).rows, covered.rows)


@pytest.mark.parametrize("images", [0, 1, 3])
def test_a_small_gallery_is_ranked_whole(images):
    gallery = Embeddings([f"g{row}" for row in range(images)], unit(np.eye(3, 4)[:images]))
    queries = Embeddings(["q"], unit([[3, 2, 1, 0]]))
    assert cover(rank(queries, gallery), gallery, CURVE).rows.tolist() == [list(range(images))]


def test_no_queries():
    gallery = people(3, 2, 1.0, seed=0)
    ranking = rank(Embeddings([], np.empty((0, 16), np.float32)), gallery)
    assert cover(ranking, gallery, CURVE).rows.shape == (0, 6)


def test_unreadable_images_come_last_and_an_unreadable_query_keeps_the_gallerys_order():
    """Even copies of the first image, each all but certain to repeat it, come before unreadable ones."""
    gallery = Embeddings(list("abcdef"), unit([[0, 0], [1, 0], [1, 0], [0, 0], [1, 0], [1, 0]]))
    ranking = rank(Embeddings(["q", "unreadable"], unit([[1, 0], [0, 0]])), gallery)
    covered = cover(ranking, gallery, Curve(0.0, 0.001, slope=50.0, intercept=0.0))
    assert covered.names() == {"q": list("bcefad"), "unreadable": list("bcefad")}
    assert covered.cosines[0].tolist() == [1, 1, 1, 1, UNREADABLE, UNREADABLE]
    others = Embeddings(list("abc"), unit([[1, 0.1], [1, 0], [-1, 0]]))  # c would come before b
    ranking = rank(Embeddings(["unreadable"], unit([[0, 0]])), others)
    assert cover(ranking, others, CURVE).names() == {"unreadable": ["a", "b", "c"]}


@pytest.mark.parametrize("dimension", [3, 64, 1280])
def test_ties_keep_the_order_of_the_ranking(dimension):
    random = np.random.default_rng(2)
    kinds = unit(random.normal(size=(7, dimension)))
    gallery = Embeddings([f"g{row}" for row in range(90)], kinds[random.integers(7, size=90)])
    queries = Embeddings([f"q{row}" for row in range(5)], unit(random.normal(size=(5, dimension))))
    for rows in cover(rank(queries, gallery, 90), gallery, CURVE, k=90).rows:
        for kind in kinds:
            copies = [row for row in rows if np.array_equal(gallery.vectors[row], kind)]
            assert copies == sorted(copies)


def test_the_block_of_a_query_does_not_change_its_images(monkeypatch):
    queries, gallery = split(people(30, 6, 1.0, seed=5), of_person=6)
    ranking = rank(queries, gallery, 100)
    whole = cover(ranking, gallery, CURVE).rows
    for row, name in enumerate(queries.names):
        alone = Ranking([name], gallery.names, ranking.rows[[row]], ranking.cosines[[row]])
        assert np.array_equal(cover(alone, gallery, CURVE).rows[0], whole[row])


def test_memory_grows_with_the_shortlists_only(tmp_path, monkeypatch):
    """The vectors of all shortlists would take 100 MB; the gallery is a file that is mapped."""
    monkeypatch.setattr(records, "CHUNK_BYTES", 2**20)
    random = np.random.default_rng(0)
    unit(random.normal(size=(3000, 256))).tofile(tmp_path / "vectors")
    vectors = np.memmap(tmp_path / "vectors", np.float32, "r", shape=(3000, 256))
    gallery = Embeddings([str(row) for row in range(3000)], vectors)
    queries = Embeddings([str(row) for row in range(1000)], unit(random.normal(size=(1000, 256))))
    ranking = rank(queries, gallery, 100)
    tracemalloc.start()
    cover(ranking, gallery, CURVE)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * 2**20 + 40 * 1000 * 100


def test_where_a_network_is_weak_more_is_found_and_where_it_is_strong_nothing_is_lost():
    gains = {}
    for spread in (0.5, 3.0):
        queries, gallery = split(people(60, 11, spread, seed=7, dimension=64), of_person=11)
        curve = fit_curve(people(60, 6, spread, seed=8, dimension=64))  # other people
        ranking = rank(queries, gallery, 100)
        plain, covered = (points_of(np.array(first_hits(some))).mean()
                          for some in (ranking, cover(ranking, gallery, curve)))  # fmt: skip
        gains[spread] = covered - plain
    assert gains[0.5] == 0
    assert gains[3.0] > 0


# ---- the curve ------------------------------------------------------------------------------------


def test_the_curve_by_hand():
    assert CURVE.probability(np.array([0.3, 0.4])) == pytest.approx([1 / (1 + math.e), 0.5])
    steep = Curve(0.0, 1e-3, 10.0, 0.0)
    assert steep.probability(np.array([-1, 0, 1], np.float32)).tolist() == [0, 0.5, 1]  # without overflow


def test_the_curve_is_that_of_all_pairs():
    labelled = people(8, 5, 1.5, seed=0)
    labels = [label_of(name) for name in labelled.names]
    pairs = list(combinations(range(40), 2))
    cosines = np.array([[labelled.vectors[one] @ labelled.vectors[other]] for one, other in pairs])
    same = [labels[one] == labels[other] for one, other in pairs]
    expected = LogisticRegression(C=1e6).fit(cosines, same).predict_proba(cosines)[:, 1]
    found = fit_curve(labelled).probability(cosines[:, 0])
    assert found == pytest.approx(expected, abs=0.02)
    assert found.mean() == pytest.approx(np.mean(same), abs=0.01)  # the folder's share of matches


def test_the_order_of_the_images_and_images_without_use_hardly_matter_and_a_seed_decides():
    labelled = people(8, 5, 1.5, seed=0)
    curve = fit_curve(labelled)
    assert fit_curve(labelled) == curve != fit_curve(labelled, seed=1)
    order = np.random.default_rng(0).permutation(40)
    names = [labelled.names[row] for row in order] + ["person0/unreadable.jpg", "without_label.jpg"]
    vectors = np.concatenate([labelled.vectors[order], np.zeros((1, 16)), np.ones((1, 16)) / 4])
    other = fit_curve(Embeddings(names, vectors.astype(np.float32)))
    assert other.slope == pytest.approx(curve.slope, rel=0.02)


def test_pairs_are_drawn_evenly_and_none_is_an_image_with_itself():
    labels = np.array(list("aaabbc"))
    pairs, same, share = cover_module._draw_pairs(labels, np.random.default_rng(0))
    assert np.array_equal(labels[pairs[0]] == labels[pairs[1]], same)
    assert share == pytest.approx(4 / 15)  # of 15 pairs: three of a and one of b
    drawn, counts = np.unique(np.sort(pairs, axis=0), axis=1, return_counts=True)
    assert sorted(map(tuple, drawn.T.tolist())) == list(combinations(range(6), 2))
    expected = np.where(labels[drawn[0]] == labels[drawn[1]], 1 / 4, 1 / 11) * cover_module.PAIRS
    assert counts == pytest.approx(expected, rel=0.05)


def test_images_of_one_class_that_are_no_more_similar_give_a_flat_curve(caplog):
    labelled = people(10, 10, 1.0, seed=0)
    names = [f"{row % 10}/{row}.jpg" for row in range(100)]  # each class holds one image of each person
    assert fit_curve(Embeddings(names, labelled.vectors)).slope == 0
    assert "cover changes no ranking" in caplog.text


@pytest.mark.parametrize("names", [["a/1", "b/2", "c/3"], ["a/1", "a/2", "a/3"], ["1", "2", "3"]])
def test_without_pairs_of_both_kinds_a_sentence_says_what_to_do(names):
    with pytest.raises(InputError, match=r"3 readable labelled|0 readable labelled"):
        fit_curve(Embeddings(names, unit(np.eye(3))))
