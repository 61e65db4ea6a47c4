from dataclasses import fields

import numpy as np
import pytest
from conftest import vectors_of

import model_not_tuned
from retrieval.errors import InputError
from retrieval.ranking.cover import SHORTLIST, cover, fit_curve
from retrieval.ranking.exact import rank
from retrieval.ranking.fusion import RunVectors, fuse
from retrieval.ranking.hubs import rank_without_hubs
from retrieval.ranking.means import Means, check_fused, check_means, means_of, rank_fused, rank_with
from retrieval.ranking.neighbours import augment_gallery, expand_queries
from retrieval.ranking.projections import lda, project, whiten
from retrieval.records import Embeddings
from retrieval.settings import MeansSettings

EACH = [Means(projection="lda"), Means(projection="within_class"), Means(centre=True), Means(whiten=True),
        Means(gallery_augmentation="3:2"), Means(query_expansion="3:2"), Means(hubs=3),
        Means(rerank="k-reciprocal:5,3,0.3"), Means(cover=True)]  # fmt: skip


@pytest.fixture
def sides():
    random = np.random.default_rng(0)
    centres = random.normal(size=(5, 8)) + 1

    def images(count, prefix):
        labels = random.integers(5, size=count)
        vectors = centres[labels] + 0.8 * random.normal(size=(count, 8))
        return vectors_of({f"{labels[row]}/{prefix}{row}": vectors[row] for row in range(count)})

    return images(12, "q"), images(40, "g"), images(50, "t")


def test_each_means_is_a_flag_off_by_default():
    names = {field.name for field in fields(Means)}
    assert names | {"train_dir"} == set(MeansSettings.model_fields)
    assert means_of(MeansSettings()) == Means()
    assert Means().applied() == {}
    assert means_of(MeansSettings(hubs=3, query_expansion="5:3", whiten=True)).applied() == {
        "whiten": True, "query_expansion": "5:3", "hubs": 3}  # fmt: skip


def test_without_means_the_ranking_is_the_plain_one(sides):
    queries, gallery, _ = sides
    ranking, plain = rank_with(Means(), queries, gallery, k=7), rank(queries, gallery, 7)
    assert (ranking.rows == plain.rows).all()
    assert (ranking.cosines == plain.cosines).all()
    assert ranking.scores is None


def test_cover_comes_last_by_a_curve_of_the_projected_training_images(sides):
    queries, gallery, train = sides
    by = whiten(gallery)
    queries_, gallery_, train_ = (project(each, by) for each in sides)
    expected = cover(rank(queries_, gallery_, k=SHORTLIST), gallery_, fit_curve(train_), k=6)
    ranking = rank_with(Means(whiten=True, cover=True), queries, gallery, train, k=6)
    assert (ranking.rows == expected.rows).all()


@pytest.mark.parametrize("means", EACH, ids=lambda means: next(iter(means.applied())))
def test_each_means_changes_the_ranking_and_sees_no_label(sides, means):
    queries, gallery, train = sides
    ranking = rank_with(means, queries, gallery, train)
    assert (ranking.rows != rank(queries, gallery).rows).any()
    falls = ranking.cosines if ranking.scores is None else ranking.scores
    assert (np.diff(falls, axis=1) <= 0).all() or means.cover

    def relabelled(side):  # the names of queries and gallery images hold their labels
        return Embeddings([f"x/{name.replace('/', '')}" for name in side.names], side.vectors)

    again = rank_with(means, relabelled(queries), relabelled(gallery), train)
    assert (again.rows == ranking.rows).all()


def test_all_together_in_their_order(sides):
    queries, gallery, train = sides
    means = Means("lda", False, True, "3:2", "2:1", 4)
    ranking = rank_with(means, queries, gallery, train, 6)
    discriminants = lda(train)
    queries, gallery = project(queries, discriminants), project(gallery, discriminants)
    whitened = whiten(gallery)
    queries, gallery = project(queries, whitened), project(gallery, whitened)
    gallery = augment_gallery(gallery, 3, 2)
    queries = expand_queries(queries, gallery, 2, 1)
    wanted = rank_without_hubs(queries, gallery, 6, 4)
    assert (ranking.rows == wanted.rows).all()
    assert (ranking.scores == wanted.scores).all()


@pytest.mark.parametrize("means", EACH, ids=lambda means: next(iter(means.applied())))
def test_unreadable_images_keep_their_places(sides, means):
    queries, gallery, train = sides
    vectors = gallery.vectors.copy(), queries.vectors.copy()
    vectors[0][[0, 7]], vectors[1][2] = 0, 0
    ranking = rank_with(
        means, Embeddings(queries.names, vectors[1]), Embeddings(gallery.names, vectors[0]), train, 40
    )
    assert (ranking.rows[:, -2:] == [0, 7]).all()
    assert (np.diff(ranking.rows[2, :-2]) > 0).all()
    assert (np.sort(ranking.rows, axis=1) == np.arange(40)).all()


def by_another_network(sides):
    """The same images, of vectors with another dimension."""
    matrix = np.random.default_rng(1).normal(size=(8, 5))
    return tuple(vectors_of(dict(zip(side.names, side.vectors @ matrix, strict=True))) for side in sides)


def test_several_networks_are_ranked_by_the_fusion_of_the_vectors_that_each_refines(sides):
    members = [sides, by_another_network(sides)]
    moved = []
    for queries, gallery, train in members:
        discriminants = lda(train)
        queries, gallery = project(queries, discriminants), project(gallery, discriminants)
        whitened = whiten(gallery)
        queries, gallery = project(queries, whitened), project(gallery, whitened)
        moved.append(RunVectors(expand_queries(queries, gallery, 2, 1), gallery))
    wanted = fuse(moved, [0.6, 0.4], 6)
    ranking = rank_fused(Means(projection="lda", whiten=True, query_expansion="2:1"), members, [0.6, 0.4], 6)
    assert (ranking.rows == wanted.rows).all()
    assert (ranking.cosines == wanted.cosines).all()
    assert ranking.rows.shape == (12, 6)
    assert (ranking.rows != rank_fused(Means(), members, [0.6, 0.4], 6).rows).any()


def test_a_network_with_all_the_weight_ranks_alone(sides):
    members = [sides, by_another_network(sides)]
    alone = rank_with(Means(whiten=True), *members[1])
    assert (rank_fused(Means(whiten=True), members, [0, 1]).rows == alone.rows).all()


@pytest.mark.parametrize(("means", "search", "saves", "processes", "sentence"), [
    (Means(hubs=3), "exact", False, 1, "several networks, which excludes --hubs: leave out either"),
    (Means(rerank="k-reciprocal"), "exact", False, 1, "excludes --rerank:"),
    (Means(cover=True), "ivf", True, 1, "excludes --cover, --search, --save_embeddings:"),
    (Means(), "exact", False, 2, "--fuse needs all vectors in one process: start the script without"),
])  # fmt: skip
def test_what_a_fusion_cannot_have_is_refused(monkeypatch, means, search, saves, processes, sentence):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(InputError, match=sentence):
        check_fused(means, search, saves)
    monkeypatch.setenv("WORLD_SIZE", "1")
    check_fused(Means(whiten=True, projection="lda", query_expansion="3:2"), "exact", False)


@pytest.mark.parametrize(("means", "search", "processes", "sentence"), [
    (Means(hubs=3, rerank="k-reciprocal"), "exact", 1, "--hubs and --rerank each replace the ranking"),
    (Means(hubs=3, cover=True), "exact", 1, "--hubs and --cover each replace the ranking"),
    (Means(cover=True), "exact", 1, "--cover is fitted on labelled images: give their folder by --train_dir"),
    (Means(projection="lda"), "exact", 1, "--projection is fitted on labelled images: give their folder"),
    (Means(whiten=True, hubs=3), "ivf", 1, "--whiten, --hubs needs the exact search: leave out --search ivf"),
    (Means(centre=True), "exact", 2, "--centre needs all vectors in one process: start the script"),
])  # fmt: skip
def test_what_cannot_be_applied_is_refused(monkeypatch, means, search, processes, sentence):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(InputError, match=sentence):
        check_means(means, search, labelled=False)
    check_means(Means(), search, labelled=False)


@pytest.mark.parametrize(("flag", "value", "sentence"), [
    ("query_expansion", "5", "write N:ALPHA, such as 5:3"),
    ("gallery_augmentation", "0:3", "write N:ALPHA, such as 5:3"),
    ("rerank", "reciprocal", "write k-reciprocal, or k-reciprocal:20,6,0.3"),
    ("rerank", "k-reciprocal:20,6,1.5", "write k-reciprocal, or k-reciprocal:20,6,0.3"),
    ("hubs", "0", "greater than 0"),
    ("fuse", "dlib", "--fuse is 'dlib': write MODEL=SHARE or MODEL@CROP=SHARE"),
    ("fuse", "dlib=0", "write MODEL=SHARE or MODEL@CROP=SHARE with a share above 0"),
    ("fuse", "dlib=0.7,clip@loose=0.3", "=0.7,clip@loose=0.3': the shares add up to 1 or more"),
])  # fmt: skip
def test_a_value_that_cannot_be_read_is_refused(tmp_path, flag, value, sentence):
    from retrieval.forms import read_form

    flags = [f"--query_dir={tmp_path}", f"--gallery_dir={tmp_path}", f"--{flag}={value}"]
    with pytest.raises(InputError, match=sentence):
        read_form(model_not_tuned.Settings, flags)
