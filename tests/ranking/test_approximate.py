"""Indexes of the real FAISS."""

import json
import sys
from importlib.machinery import PathFinder

import numpy as np
import pytest
from conftest import run_here
from test_exact import embeddings, unit

from retrieval.errors import InputError
from retrieval.ranking import approximate
from retrieval.ranking.approximate import cells_for, check_search, merge_shards, rank_by
from retrieval.ranking.exact import rank
from retrieval.records import Embeddings, ShardedEmbeddings


@pytest.fixture(scope="module")
def clustered():
    """200 queries and 4000 gallery images around 50 centres, as embeddings of classes are."""
    random = np.random.default_rng(0)
    centres = unit(random.normal(size=(50, 32)))
    sides = []
    for count, prefix in ((200, "q"), (4000, "g")):
        noise = 0.1 * random.normal(size=(count, 32))
        sides.append(embeddings(centres[random.integers(50, size=count)] + noise, prefix))
    return sides


def same(ranking, other):
    return ranking.names() == other.names() and np.array_equal(ranking.cosines, other.cosines)


def test_exact_is_the_ranking_and_has_no_metrics(clustered):
    ranking, metrics = rank_by("exact", *clustered)
    assert same(ranking, rank(*clustered))
    assert metrics == {}


def test_flat_finds_what_exact_finds(clustered, caplog):
    caplog.set_level("INFO", "retrieval")
    ranking, metrics = rank_by("flat", *clustered)
    assert same(ranking, rank(*clustered))
    assert metrics["search_recall"] == 1
    assert set(metrics) == {"search_recall", "index_seconds", "search_seconds"}
    assert caplog.messages[0].startswith(
        "--search flat finds 1.0000 of the 10 nearest images; the index took"
    )


@pytest.mark.parametrize("search", ["flat", "ivf", "hnsw"])
@pytest.mark.parametrize("copies", [2, 11, 50])
def test_ties_keep_the_gallerys_order(search, copies):
    """Rows 0, 40, 80 … are copies of one image, and so on."""
    random = np.random.default_rng(1)
    gallery = embeddings(np.tile(random.normal(size=(40, 16)), (copies, 1)), "g")
    queries = embeddings(np.vstack([gallery.vectors[:5], random.normal(size=(25, 16))]), "q")
    ranking, metrics = rank_by(search, queries, gallery)
    assert ranking.names()["q0"][: min(copies, 10)] == [f"g{40 * n}" for n in range(min(copies, 10))]
    if search == "flat" or copies > 10:  # all of the best ten are copies of each other
        assert same(ranking, rank(queries, gallery))
    assert metrics["search_recall"] == 1


def test_an_image_that_an_index_has_not_found_is_none_of_the_best():
    """-1 stands for it, which as a row would be the last image of the gallery, here the best one."""
    gallery = embeddings([[1, 2], [1, 3], [1, 0]], "g")
    ranking, short = approximate._exact_order(embeddings([[1, 0]], "q"), gallery, np.array([[0, 1, -1]]), k=2)
    assert (ranking.rows.tolist(), short.tolist()) == ([[0, 1]], [])


@pytest.mark.parametrize("search", ["exact", "flat", "ivf", "hnsw"])
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_no_search_ranks_by_nan_or_infinity(clustered, search, wrong, side):
    sides = [Embeddings(each.names, each.vectors[:].copy()) for each in clustered]
    sides[side].vectors[3, 5] = wrong
    with pytest.raises(InputError, match=f"the vector of {'qg'[side]}3 holds NaN or infinity"):
        rank_by(search, *sides)


@pytest.mark.parametrize("search", ["ivf", "hnsw"])
def test_the_others_find_nearly_all_twice_the_same_and_count_it_rightly(clustered, search):
    ranking, metrics = rank_by(search, *clustered)
    pairs = zip(ranking.rows.tolist(), rank(*clustered).rows.tolist(), strict=True)
    found = np.mean([len(set(rows) & set(exact)) / 10 for rows, exact in pairs])
    assert metrics["search_recall"] == pytest.approx(found, abs=1e-4)  # all queries are in the sample
    assert found > 0.95
    if search == "ivf":
        assert same(rank_by(search, *clustered)[0], ranking)


def test_a_search_that_finds_less_says_so(monkeypatch):
    monkeypatch.setattr(approximate, "PROBED", 1)
    random = np.random.default_rng(4)
    sides = [
        embeddings(random.normal(size=(count, 32)), prefix) for count, prefix in ((300, "q"), (4000, "g"))
    ]
    assert 0.1 < rank_by("ivf", *sides)[1]["search_recall"] < 0.9


@pytest.mark.parametrize("search", ["flat", "ivf", "hnsw"])
@pytest.mark.parametrize("count", [4, 30, 700])
def test_unreadable_images_come_last_and_every_query_gets_its_names(search, count):
    random = np.random.default_rng(2)
    vectors = random.normal(size=(count, 8))
    vectors[::3] = 0
    gallery = embeddings(vectors, "g")
    queries = embeddings(np.vstack([np.zeros((1, 8)), random.normal(size=(20, 8))]), "q")
    ranking, metrics = rank_by(search, queries, gallery, 10)
    assert ranking.queries == queries.names
    ranking, exact = ranking.names(), rank(queries, gallery, 10).names()
    assert ranking["q0"] == exact["q0"]
    unreadable = gallery.unreadable
    for query, names in ranking.items():
        assert len(names) == len(set(names)) == len(exact[query])
        assert [name in unreadable for name in names] == [name in unreadable for name in exact[query]]
    assert metrics["search_recall"] > 0.9


def test_a_gallery_of_which_nothing_could_be_read_keeps_its_order():
    gallery = embeddings(np.zeros((3, 2)), "g")
    ranking, _ = rank_by("ivf", embeddings([[1, 0]], "q"), gallery)
    assert ranking.names() == {"q0": ["g0", "g1", "g2"]}


def test_what_the_cells_do_not_hold_is_ranked_exactly(clustered, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(approximate, "PROBED", 1)
    ranking, _ = rank_by("ivf", *clustered, k=1000)
    assert {len(set(rows)) for rows in ranking.rows.tolist()} == {1000}
    assert "queries for which the index found too few images or ties were ranked exactly" in caplog.text


def test_a_small_gallery_has_few_cells():
    gallery = embeddings(np.random.default_rng(3).normal(size=(100, 4)), "g")
    ranking, _ = rank_by("ivf", gallery, gallery)
    assert all(names[0] == query for query, names in ranking.names().items())
    assert [cells_for(n) for n in (1, 39, 5000, 1_000_000)] == [1, 1, 128, 4000]


def test_the_gallery_may_be_a_mapped_file(clustered, tmp_path):
    queries, gallery = clustered
    gallery.vectors.tofile(tmp_path / "vectors")
    mapped = np.memmap(tmp_path / "vectors", np.float32, "r", shape=gallery.vectors.shape)
    assert same(rank_by("flat", queries, Embeddings(gallery.names, mapped))[0], rank(queries, gallery))


def test_the_recall_of_shards_is_their_mean_and_the_seconds_are_the_slowest(clustered, monkeypatch):
    queries, gallery = clustered
    parts = [
        Embeddings(gallery.names[rows], gallery.vectors[rows]) for rows in (slice(1000), slice(1000, None))
    ]
    results = [rank_by("flat", queries, part) for part in parts]
    values = []
    for (ranking, _), start, figure in zip(results, (0, 1000), (1, 0.5), strict=True):
        metrics = {"search_recall": figure, "index_seconds": figure, "search_seconds": 0}
        values.append((ranking.cosines, ranking.rows + start, metrics))
    monkeypatch.setattr(approximate, "gather", lambda _: values)
    merged, metrics = merge_shards(*results[0], ShardedEmbeddings(gallery.names, parts[0], 0, [], None), 10)
    assert same(merged, rank(queries, gallery))
    assert (metrics["search_recall"], metrics["index_seconds"]) == (0.75, 1)


# ---- where FAISS is missing


def test_a_missing_package_is_a_sentence(monkeypatch):
    monkeypatch.setattr(PathFinder, "find_spec", lambda *_: None)
    monkeypatch.delitem(sys.modules, "faiss", raising=False)
    check_search("exact")
    for search in ("flat", "ivf", "hnsw"):
        with pytest.raises(InputError, match=f"--search {search} needs .* run `pip install faiss-cpu`"):
            check_search(search)


@pytest.mark.slow
@pytest.mark.usefixtures("exported")
def test_a_run_says_what_its_search_found_and_keeps_it(few, tmp_path):
    ended = run_here("model_not_tuned.py", "--query_dir", few / "query", "--gallery_dir", few / "gallery",
                "--search", "hnsw", "--no_report", cwd=tmp_path)  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert "--search hnsw finds " in ended.stdout
    assert json.loads((tmp_path / "results" / "metrics.json").read_text())["search_recall"] == 1
