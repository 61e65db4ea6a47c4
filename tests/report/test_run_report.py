import json
import re
import shutil
from dataclasses import replace
from importlib.metadata import version

import numpy as np
import pytest
from conftest import vectors_of
from pages import STRANGE, drawn, found_of

from retrieval.metrics import score
from retrieval.ranking.exact import rank
from retrieval.records import Ranking
from retrieval.report import charts, embedding_map, results, run_report, viewer
from retrieval.report.charts import RIGHT, WRONG, confusion, per_class
from retrieval.report.results import Results
from retrieval.report.viewer import Matches, page_data
from retrieval.run import Outcome

READABLE = {"unreadable_queries": []}  # of the metrics


def data_of(page):
    """What the page's script reads."""
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.S)[1])


# ---- what is told of each query


def test_the_first_hit_and_the_lead_by_hand(tmp_path):
    queries = vectors_of({"a/1": [1, 0], "b/1": [0, 1], "c/1": [0.6, 0.8]})
    gallery = vectors_of({"a/2": [0.8, 0.6], "a/3": [1, 0], "b/2": [0.6, 0.8]})
    matches = Matches(Results([], [], queries, gallery, rank(queries, gallery), READABLE))
    assert matches.rows.tolist() == [[1, 0, 2], [2, 0, 1], [2, 0, 1]]
    assert matches.first.tolist() == [1, 1, 0]
    assert matches.cosines == pytest.approx(np.array([[1, 0.8, 0.6], [0.8, 0.6, 0], [1, 0.96, 0.6]]))
    # the lead over the first match of another class: a/1 over b/2, the two others over a/2
    assert matches.margin == pytest.approx([0.4, 0.2, 0.04])


def test_a_gallery_of_one_class_and_one_of_a_single_image_have_a_lead_too():
    queries = vectors_of({"a/1": [1, 0], "b/1": [0, 1]})
    gallery = vectors_of({"a/2": [1, 0], "a/3": [0.6, 0.8]})
    found = Results([], [], queries, gallery, rank(queries, gallery), READABLE)
    assert Matches(found).margin == pytest.approx([0.4, 0.8])
    gallery = vectors_of({"a/2": [1, 0]})
    assert Matches(Results([], [], queries, gallery, rank(queries, gallery), READABLE)).margin.tolist() == [
        0,
        0,
    ]


def test_the_lead_is_that_of_the_scores_where_these_decide():
    queries, gallery = vectors_of({"q": [1, 0]}), vectors_of({"x": [0, 0], "y": [0.6, 0.8], "z": [0.8, 0.6]})
    cosines, scores = np.array([[0.6, 0.8, -2.0]]), np.array([[0.3, 0.1, -np.inf]])
    ranking = Ranking(["q"], ["x", "y", "z"], np.array([[1, 2, 0]]), cosines, scores)
    matches = Matches(Results([], [], queries, gallery, ranking, READABLE))
    assert matches.cosines.tolist() == [[0.6, 0.8, 0]]
    assert matches.margin == pytest.approx([0.2])  # without labels: ahead of the last of those shown


def test_an_unreadable_match_is_shown_without_similarity():
    queries, gallery = vectors_of({"q": [1, 0]}), vectors_of({"x": [0, 0], "y": [0.6, 0.8]})
    matches = Matches(Results([], [], queries, gallery, rank(queries, gallery), READABLE))
    assert matches.rows.tolist() == [[1, 0]]
    assert matches.cosines == pytest.approx(np.array([[0.6, 0]]))


def test_the_page_holds_every_query_with_its_matches_and_their_pictures(digits, digits_page):
    data = data_of(digits_page.read_text())
    assert [data["names"][str(row)] for row in range(40)] == digits.ranking.queries
    for query, best in zip(data["matches"], digits.ranking.names().values(), strict=True):
        assert [data["names"][str(row)] for row in query] == best[:10]
    assert all(data["pictures"][str(row)] for rows in data["matches"] for row in rows)
    assert sorted(data["random"]) == list(range(40))
    assert np.array(data["cosines"]).max() <= 1.001


def test_the_pictures_shrink_where_there_are_many_and_the_last_are_left_out(digits, monkeypatch):
    matches = Matches(digits)
    large = page_data(digits, matches, [])["pictures"]
    monkeypatch.setattr(viewer, "SIDES", {10: 96, 1000: 4})
    small = page_data(digits, matches, [])["pictures"]
    assert small.keys() == large.keys()
    assert all(len(small[row]) < len(large[row]) for row in large)
    monkeypatch.setattr(viewer, "MOST_THUMBNAILS", 45)
    some = page_data(digits, matches, [])["pictures"]
    assert len(some) == 45
    assert set(range(40)) <= set(some)  # queries come first


# ---- files


def test_the_pictures_for_slides_lie_beside_the_page(digits_page):
    assert {path.name for path in digits_page.parent.iterdir()} == {
        "report.html", "similar_images.png", "tsne.png", "per_class.png", "confusion.png", "similarities.png",
        "loss.png",
    }  # fmt: skip


def test_a_page_loads_nothing_from_elsewhere(digits_page):
    page = digits_page.read_text()
    addresses = set(re.findall(r"(?:src|href)=[\"']?([^\"' >]+)", page))
    assert {a for a in addresses if not a.startswith(("#", "data:"))} == {
        "similar_images.png", "tsne.png", "per_class.png", "confusion.png", "similarities.png",
        "loss.png",
    }  # fmt: skip
    assert "@import" not in page
    assert "url(http" not in page


def test_unlabelled_images_have_matches_and_the_servers_score_and_no_verdict(flat, tmp_path):
    found = found_of(flat)
    found.metrics["server_score"] = 698.0
    page = drawn(found, tmp_path / "out", Outcome("scored", "the server's score: 698 of 1000", 698.0))
    assert "<dd>698.0</dd>" in page
    assert "the server&#39;s score: 698 of 1000" in page
    assert "whether a match is right is unknown" in page
    assert not {"per_class.png", "confusion.png"} & {path.name for path in (tmp_path / "out").iterdir()}
    assert "worst first" not in page
    data = data_of(page)
    assert data["labelled"] is False
    assert len(data["matches"]) == 8


def test_a_network_that_tells_nothing_apart_is_said_at_the_top(few, tmp_path):
    found = found_of(few)
    assert 'class="collapsed"' not in drawn(found, tmp_path / "good")
    found.metrics.update(collapsed=True, same_images=1.0, mean_cosine=1.0)
    page = drawn(found, tmp_path / "bad")
    warning = re.search(r'<p class="collapsed" role="alert">(.*?)</p>', page)[1]
    assert "hardly tells these images apart: 100 % of the queries get the same images" in warning


def test_names_are_text_whatever_they_are(sample, tmp_path):
    source = sorted((sample / "test" / "gallery" / "0").iterdir())
    for part in ("query", "gallery"):
        for number, name in enumerate(STRANGE):
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True)
            for copy in range(3):
                shutil.copy(source[number], folder / f"{name}{copy}.png")
    page = drawn(found_of(tmp_path / "images"), tmp_path / "out")
    assert "<script>window" not in page
    assert "49" not in re.findall(r"<option.*?</option>", page)
    data = data_of(page)
    assert set(data["classes"]) == set(STRANGE)
    assert {name.split("/")[0] for name in data["names"].values()} == set(STRANGE)


def test_an_image_that_cannot_be_read_costs_its_picture_only(few, tmp_path):
    folder = shutil.copytree(few, tmp_path / "images")
    found = found_of(folder)
    found.queries[3].path.write_bytes(b"")
    found.metrics["unreadable_queries"].append(found.queries[3].name)
    page = drawn(found, tmp_path / "out")
    assert "<summary>1 queries that could not be embedded</summary>" in page
    data = data_of(page)
    assert [row for row, embedded in enumerate(data["embedded"]) if not embedded] == [3]
    assert data["pictures"]["3"] == ""
    assert data["pictures"]["2"]


# ---- charts


def test_the_map_is_seeded_and_keeps_classes_together(digits):
    vectors = digits.gallery_vectors.vectors
    first, second = embedding_map.tsne(vectors), embedding_map.tsne(vectors)
    assert np.array_equal(first, second)
    labels = np.array([name[0] for name in digits.gallery_vectors.names])
    distances = np.linalg.norm(first[:, None] - first[None], axis=2) + 1e9 * np.eye(len(first))
    assert (labels[distances.argmin(1)] == labels).mean() > 0.7  # by chance a tenth


def test_the_map_shows_each_class_as_often_and_leaves_out_empty_vectors(digits, monkeypatch):
    monkeypatch.setattr(results, "MOST_POINTS", 30)
    vectors = digits.query_vectors.vectors.copy()
    vectors[0] = 0
    digits = replace(digits, query_vectors=replace(digits.query_vectors, vectors=vectors))
    rows = results.sample_rows(digits.query_vectors, digits.gallery_vectors)
    names = digits.query_vectors.names + digits.gallery_vectors.names
    labels = [names[row][0] for row in rows]
    assert 0 not in rows
    assert {labels.count(label) for label in "0123456789"} == {3}
    assert np.array_equal(rows, results.sample_rows(digits.query_vectors, digits.gallery_vectors))


def test_a_tuned_network_that_holds_the_untuned_one_is_mapped_before_and_after(digits, digits_page):
    page = digits_page.read_text()
    assert "before fine-tuning" in page
    assert "training loss" in page
    points = data_of(page)["points"]
    assert sum(map(len, points)) == 2 * (len(digits.queries) + len(digits.gallery))


def test_of_many_classes_the_map_shows_which_queries_are_right(digits, monkeypatch):
    monkeypatch.setattr(charts, "COLOURS", charts.COLOURS[:9])  # fewer than the ten classes
    monkeypatch.setattr(embedding_map, "tsne", lambda vectors: vectors[:, :2])
    (chart,), groups = embedding_map.draw_map(digits)
    wrong = [row for row, first in enumerate(digits.first) if first != 1]
    assert wrong
    assert wrong in groups
    assert "first match wrong" in chart.svg


def test_of_many_classes_the_worst_are_shown(monkeypatch):
    monkeypatch.setattr(charts, "MOST_CLASSES", 11)
    metrics = {
        f"class {n:03}": {"top_1": n / 100, "mrr": n / 100, "top_1_interval": [n / 100, n / 100]}
        for n in range(20)
    }
    chart = per_class(metrics)
    assert "the worst 11 of 20 classes" in chart.svg
    assert "class 010" in chart.svg
    assert "class 011" not in chart.svg
    queries = [f"c{n:02}" for n in range(20)] * 2
    matches = [*queries[1:11], *queries[10:20]] * 2  # the first ten are taken for the next
    chart = confusion(queries, matches)
    assert "the 11 most confused classes" in chart.svg
    assert all(f">{label}<" in chart.svg for label in queries[:10])


def people(ranks):
    """The metrics of people 00, 01 and so on with one query each, whose first right image has such a rank."""
    gallery = [*(f"{n:02}/g" for n in range(40)), "x/g"]
    rows = np.full((len(ranks), 10), 40)  # x/g, which is nobody
    for n, first in enumerate(ranks):
        if first:
            rows[n, first - 1] = n
    queries = [f"{n:02}/q" for n in range(len(ranks))]
    return score(Ranking(queries, gallery, rows, np.zeros(rows.shape)))["per_class"]


@pytest.mark.parametrize(
    ("ranks", "counts"),
    [
        ([1] * 12 + [2] * 3 + [3] * 4 + [5] * 5 + [10] * 6 + [0] * 10, [12, 7, 5, 6, 10]),
        ([1] * 39 + [0], [39, 0, 0, 0, 1]),
        ([0] * 40, [0, 0, 0, 0, 40]),
    ],
)
def test_of_many_people_with_one_query_each_the_chart_counts_them(ranks, counts):
    svg = per_class(people(ranks)).svg
    groups = ["first match", "2nd or 3rd", "4th or 5th", "6th to 10th", "none of the first 10"]
    assert ", ".join(f"{group}: {count}" for group, count in zip(groups, counts, strict=True)) in svg
    assert "best right match of each of 40 classes" in svg


@pytest.mark.parametrize("wrong", [1, 5, 30])
def test_of_many_people_the_most_frequent_wrong_matches_are_shown(wrong):
    queries = [f"{n:02}" for n in range(40)]
    matches = ["39"] * wrong + queries[wrong:]
    svg = confusion(queries, matches).svg
    assert f"{wrong} wrong first matches; most, {wrong}, are 39" in svg
    assert "first matches, right on the diagonal" in confusion(queries, queries).svg


def test_the_worst_classes_are_named_worst_first():
    failing = run_report._failing(people([1, 2, 0, 5, 1]))
    assert failing == [("02", "1 of 1"), ("03", "1 of 1"), ("01", "1 of 1")]
    assert run_report._failing({"a": {"top_1": 0.75, "mrr": 0.8, "queries": 8}}) == [("a", "2 of 8")]
    assert run_report._failing({}) == []


def test_the_page_names_them_and_says_what_came_from_the_cache(digits, digits_page, tmp_path):
    wrong = {query.split("/")[0] for query, first in zip(digits.ranking.queries, digits.first, strict=True)
             if first != 1}  # fmt: skip
    text = digits_page.read_text()
    assert f"<summary>{len(wrong)} of 10 classes have a wrong first match: the worst first" in text
    assert "came from the cache" not in text
    page = drawn(replace(digits, metrics=digits.metrics | {"cached_gallery_images": 7}), tmp_path / "out")
    assert "7 images came from the cache" in page


def test_the_versions_name_the_runtimes(digits_page):
    text = digits_page.read_text()
    for package in ("torch", "onnxruntime", "numpy"):
        assert f'<tr><th scope="row">{package}</th><td>{version(package)}</td></tr>' in text


def test_the_colours_are_seen_on_white_and_on_black():
    from retrieval.report.charts import COLOURS

    def brightness(colour):  # WCAG 2.2: relative luminance
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for colour in (*COLOURS, RIGHT, WRONG):
        for ground in ("#ffffff", "#0d1117"):
            light, dark = sorted((brightness(colour), brightness(ground)))[::-1]
            assert (light + 0.05) / (dark + 0.05) >= 3, (colour, ground)


def test_a_copy_inside_another_repository_tells_no_commit_of_that(tmp_path):
    (tmp_path / ".git").mkdir()
    (tmp_path / "copy").mkdir()
    assert run_report._commit(tmp_path / "copy") == {}
    assert run_report._commit(tmp_path) == {}  # nor does a broken one


def test_more_metrics_are_a_line_below_the_tiles(digits, digits_page):
    text = digits_page.read_text()
    found = re.search(r'<p class="note">(mAP@3 [^<]*)</p>', text)[1]
    low, high = digits.metrics["map_at_r_interval"]
    assert f" · MAP@R (R ≤ 10) {digits.metrics['map_at_r']:.3f} [{low:.3f}, {high:.3f}] · MRR " in found
    assert found.count(" · ") == 3
    assert " · precision@3 " in found
