import numpy as np
import pytest
from conftest import ranking_of

from get_images import ImageFile
from retrieval.errors import InputError
from retrieval.metrics import (
    METRICS,
    Metric,
    are_labelled,
    competition_score,
    hits_of,
    measure,
    metrics_of,
    require_labels,
    score,
    wilson_interval,
)
from retrieval.records import Embeddings, Ranking


def embeddings(*names):
    return Embeddings(list(names), np.ones((len(names), 2), dtype=np.float32))


def ranking_with_first_hits(*ranks):
    """One query of class a for each rank; its first right image stands there, from 1; 0: nowhere."""
    gallery = [f"b/{i}.jpg" for i in range(12)] + ["a/right.jpg"]
    ranking = {}
    for number, rank in enumerate(ranks):
        names = gallery[:12]
        if rank:
            names[rank - 1] = "a/right.jpg"
        ranking[f"a/{number}.jpg"] = names
    return ranking_of(ranking, gallery), embeddings(*ranking), embeddings(*gallery)


def test_where_all_queries_earn_the_same_the_score_is_not_certain():
    metrics = metrics_of(ranking_of({f"a/{number}": ["a/x"] for number in range(40)}))
    low = 1000 * wilson_interval(40, 40)[0]
    assert metrics["score"] == 1000
    assert metrics["score_interval"] == pytest.approx([low, 1000])
    metrics = metrics_of(ranking_of({f"a/{number}": [*["b/x"] * 3, "a/x"] for number in range(40)}))
    bounds = wilson_interval(0.4 * 40, 40)
    assert (metrics["score"], metrics["score_interval"]) == (400, pytest.approx([1000 * b for b in bounds]))


def test_a_published_reply_of_the_competitions_server():
    assert competition_score(194, 229, 243, queries=300) == 698.0
    ranks = [1] * 194 + [4] * (229 - 194) + [10] * (243 - 229) + [0] * (300 - 243)
    metrics = measure(*ranking_with_first_hits(*ranks))
    assert metrics["score"] == 698.0
    assert [round(metrics[name], 4) for name in ("top_1", "top_5", "top_10")] == [0.6467, 0.7633, 0.81]


def test_each_cut_counts_the_hits_up_to_it(caplog):
    caplog.set_level("INFO")
    metrics = measure(*ranking_with_first_hits(1, 2, 3, 4, 5, 6, 10, 11, 0, 0), top_k=4)
    shares = {name: metrics[name] for name in ("top_1", "top_3", "top_5", "top_10", "top_k")}
    assert shares == {"top_1": 0.1, "top_3": 0.3, "top_5": 0.5, "top_10": 0.7, "top_k": 0.4}
    assert metrics["score"] == 600 * 0.1 + 300 * 0.5 + 100 * 0.7
    assert metrics["k"] == 4
    assert "top-10 0.700 · top-4 0.400 · score 280.0 of 1000" in caplog.text
    assert measure(*ranking_with_first_hits(1, 11), top_k=11)["top_k"] == 1.0


def test_wilson_against_the_equation_it_solves():
    """The bounds p of Wilson's interval satisfy |hits/n − p| = z · sqrt(p(1 − p)/n)."""
    for hits, n in ((8, 10), (1, 300), (194, 300)):
        for bound in wilson_interval(hits, n):
            assert abs(hits / n - bound) == pytest.approx(1.959964 * np.sqrt(bound * (1 - bound) / n))
    assert wilson_interval(0, 5)[0] == pytest.approx(0.0)
    assert wilson_interval(5, 5)[1] == pytest.approx(1.0)


def test_the_scores_interval_against_a_plain_bootstrap():
    ranks = [1] * 30 + [4] * 20 + [8] * 10 + [0] * 40
    low, high = measure(*ranking_with_first_hits(*ranks))["score_interval"]
    points = np.array([1000] * 30 + [400] * 20 + [100] * 10 + [0] * 40)
    random = np.random.default_rng(5)
    means = [random.choice(points, size=100).mean() for _ in range(4000)]
    assert low == pytest.approx(np.percentile(means, 2.5), abs=12)
    assert high == pytest.approx(np.percentile(means, 97.5), abs=12)
    assert measure(*ranking_with_first_hits(*ranks))["score_interval"] == [low, high]  # seeded


def test_per_class_and_a_class_that_the_gallery_lacks(caplog):
    ranking = {"a/1": ["a/x", "b/x"], "a/2": ["b/x", "a/x"], "b/1": ["b/x", "a/x"], "c/1": ["a/x", "b/x"]}
    metrics = measure(ranking_of(ranking), embeddings(*ranking), embeddings("a/x", "b/x"), top_k=2)
    per_class = metrics["per_class"].items()
    assert {label: (part["queries"], part["top_1"], part["top_k"]) for label, part in per_class} == {
        "a": (2, 0.5, 1.0), "b": (1, 1.0, 1.0), "c": (1, 0.0, 0.0),
    }  # fmt: skip
    assert metrics["top_1"] == 0.5
    assert metrics["queries_without_match"] == 1
    assert "count as misses, since the gallery lacks their classes: c" in caplog.text
    for name in ("top_1", "top_3", "top_5", "top_10", "top_k", "score"):
        low, high = metrics[f"{name}_interval"]
        assert low <= metrics[name] <= high
        assert f"{name}_interval" in metrics["per_class"]["a"]


def test_without_labels_there_are_counts_only():
    queries = Embeddings(["1.jpg", "2.jpg"], np.array([[1, 0], [0, 0]], dtype=np.float32))
    ranking = ranking_of({"1.jpg": ["x.jpg"], "2.jpg": ["x.jpg"]})
    metrics = measure(ranking, queries, embeddings("x.jpg"))
    assert metrics == {
        "queries": 2, "gallery_images": 1, "k": 10,
        "unreadable_queries": ["2.jpg"], "unreadable_gallery_images": [],
        "damaged_queries": [], "damaged_gallery_images": [],
    }  # fmt: skip


def test_distractors_may_be_unlabelled_but_queries_may_not():
    assert are_labelled(["a/1.jpg"], ["a/2.jpg", "b/3.jpg", "distractor.jpg"])
    assert not are_labelled(["a/1.jpg", "2.jpg"], ["a/2.jpg"])
    assert are_labelled(["a/1.jpg"], ["a/2.jpg", "distractor.jpg"])
    assert not are_labelled(["a/1.jpg"], ["2.jpg"])
    assert not are_labelled(["a/1.jpg", "b/1.jpg"], ["x.jpg", "y.jpg"])


def test_one_folder_for_all_images_is_no_label():
    """As an archive unpacks to query/images/ and gallery/images/: any ranking would score 1000."""
    assert not are_labelled(["images/1.jpg", "images/2.jpg"], ["images/3.jpg"])


def test_required_labels_are_missed_with_a_sentence(tmp_path):
    def files(*names):
        return [ImageFile(name, tmp_path / name) for name in names]

    require_labels(files("a/1.jpg"), files("a/2.jpg", "b/2.jpg"))
    with pytest.raises(InputError, match="all images lie in one"):
        require_labels(files("a/1.jpg"), files("a/2.jpg"))
    with pytest.raises(InputError, match=r"1 images, such as .*2.jpg, lie in none"):
        require_labels(files("a/1.jpg", "2.jpg"), files("a/2.jpg"))


def test_a_ranking_is_scored_by_itself():
    ranking, queries, gallery = ranking_with_first_hits(1, 2, 0)
    metrics = score(ranking)
    assert (metrics["top_1"], metrics["top_3"], metrics["queries_without_match"]) == (1 / 3, 2 / 3, 0)
    assert metrics["score"] == pytest.approx((1000 + 400) / 3)
    assert metrics.items() <= measure(ranking, queries, gallery).items()


def test_a_ranking_without_labels_is_not_scored():
    with pytest.raises(
        InputError, match=r"needs class folders, but 2 images, such as 1\.jpg, lie in none: lay"
    ):
        score(ranking_of({"1.jpg": ["x.jpg"]}))
    with pytest.raises(InputError, match=r"needs class folders, but all images lie in one: lay"):
        score(ranking_of({"a/1.jpg": ["a/x.jpg"]}))


def test_a_metric_is_a_row_of_the_table(monkeypatch):
    root = Metric(lambda hits, _: np.where(hits.first, 1 / np.sqrt(np.maximum(hits.first, 1)), 0))
    monkeypatch.setitem(METRICS, "root", root)
    metrics = score(ranking_with_first_hits(1, 4, 0, 0)[0])
    assert metrics["root"] == (1 + 1 / 2) / 4
    error = 1.959964 * np.std([1, 0.5, 0, 0], ddof=1) / 2
    assert metrics["root_interval"] == pytest.approx([0, 0.375 + error])


# ---- metrics that ask for more than the first right image: beside naive loops


def naive(ranking, query, k):
    """AP@k, AP@R, 1 / rank and precision@k of one query, as their papers write them."""
    best = [ranking.gallery[row] for row in ranking.rows[query]]
    rel = [name[0] == ranking.queries[query][0] for name in best]
    total = sum(name[0] == ranking.queries[query][0] for name in ranking.gallery)

    def averaged(ranks, n):
        return sum(sum(rel[:i]) / i for i in ranks if rel[i - 1]) / n if n else 0

    r = min(total, len(rel))
    return {
        "map_at_k": averaged(range(1, min(k, len(rel)) + 1), min(total, k)),
        "map_at_r": averaged(range(1, r + 1), r),
        "mrr": next((1 / i for i, right in enumerate(rel, 1) if right), 0),
        "precision_at_k": sum(rel[:k]) / k,
    }


def random_ranking(random, queries=30, gallery=25, ranked=10):
    """Classes a to d of unlike sizes; the gallery lacks class d, and class a has more images than ranked."""
    names = [f"{'abc'[min(2, number // 12)]}/{number}.jpg" for number in range(gallery)]
    rows = np.array([random.permutation(gallery)[:ranked] for _ in range(queries)])
    asked = [f"{random.choice(list('abcd'))}/q{number}.jpg" for number in range(queries)]
    return Ranking(asked, names, rows, np.zeros(rows.shape))


@pytest.mark.parametrize("k", [1, 3, 10, 20])
def test_the_other_metrics_beside_naive_loops(k):
    ranking = random_ranking(np.random.default_rng(k))
    metrics = score(ranking, top_k=k)
    by_hand = [naive(ranking, query, k) for query in range(30)]
    for name in by_hand[0]:
        values = np.array([values[name] for values in by_hand])
        assert metrics[name] == pytest.approx(values.mean())
        of_a = values[[query[0] == "a" for query in ranking.queries]]
        assert metrics["per_class"]["a"][name] == pytest.approx(of_a.mean())
        low, high = metrics[f"{name}_interval"]
        assert 0 <= low < metrics[name] < high <= 1
    assert metrics["queries_with_r_cut"] == sum(query[0] in "ab" for query in ranking.queries)


def test_a_perfect_ranking_earns_one_and_a_hopeless_one_nothing():
    perfect = ranking_of({"a/1": ["a/x", "a/y", "b/x"], "b/1": ["b/x", "a/x", "a/y"]})
    hopeless = ranking_of({"a/1": ["b/x", "b/y"], "b/1": ["a/x", "a/y"]})
    for ranking, value in ((perfect, 1.0), (hopeless, 0.0)):
        metrics = score(ranking)
        assert [metrics[name] for name in ("map_at_k", "map_at_r", "mrr")] == [value] * 3
    assert score(perfect)["precision_at_k"] == pytest.approx((2 / 10 + 1 / 10) / 2)


def test_the_interval_of_a_mean_is_that_of_a_plain_bootstrap():
    ranking = random_ranking(np.random.default_rng(0), queries=400)
    values = np.array([naive(ranking, query, 10)["map_at_k"] for query in range(400)])
    random = np.random.default_rng(5)
    means = [random.choice(values, size=400).mean() for _ in range(4000)]
    assert score(ranking)["map_at_k_interval"] == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.003)


def test_a_query_that_the_gallery_also_holds_is_not_counted():
    """Each image is a query among the others: of three images of a class, two are right."""
    ranking = ranking_of(
        {"a/1": ["a/2", "a/3"], "a/2": ["a/1", "a/3"], "a/3": ["a/1", "b/1"], "b/1": ["a/1", "a/2"]},
        ["a/1", "a/2", "a/3", "b/1"],
    )
    assert hits_of(ranking, itself=1).total.tolist() == [2, 2, 2, 0]
    assert metrics_of(ranking, itself=1)["map_at_r"] == (1 + 1 + 1 / 2 + 0) / 4
