"""retrieval/datasets/sides.py: the folders of train, query and gallery are found, or named."""

from pathlib import Path

import pytest

from get_images import ImageFile
from retrieval.datasets.sides import find_sides, side_of
from retrieval.errors import InputError


def found(*names):
    sides = find_sides([ImageFile(name, Path("day") / name) for name in names], Path("day.zip"))
    assert all(image.path.as_posix().endswith(image.name) for images in sides.values() for image in images)
    return {side: [image.name for image in images] for side, images in sides.items()}


@pytest.mark.parametrize(
    ("side", "names"),
    [
        ("train", "train Train TRAINING training-set train_images trainset 1_train seg_train"),
        ("test/query", "query queries Query QUERIES test_query query_images probe probe_set"),
        ("test/gallery", "gallery Galleries database DB index gallery-set test_gallery 3.gallery references"),
        (None, "trainers constraint ann forest test val database_train face_database art_gallery 7"),
    ],
)
def test_names_of_sides(side, names):
    assert {name: side_of(name) for name in names.split()} == dict.fromkeys(names.split(), side)


@pytest.mark.parametrize("around", ["", "day/", "a/b/c/", "Training day/", "database/"])
def test_the_sides_are_found_whatever_is_around_them(around):
    names = [f"{around}{name}" for name in ("TRAIN/ann/1.jpg", "Query/q.jpg", "index/x/g.jpg")]
    assert found(*names) == {"train": ["ann/1.jpg"], "test/query": ["q.jpg"], "test/gallery": ["x/g.jpg"]}


@pytest.mark.parametrize("name", ["train", "gallery", "index", "query"])
def test_a_class_may_be_called_like_a_side(name):
    sides = found(
        f"train/{name}/1.jpg", "train/ann/2.jpg", "query/q.jpg", f"gallery/{name}/1.jpg", "gallery/g.jpg"
    )
    assert sides["train"] == [f"{name}/1.jpg", "ann/2.jpg"]
    assert sides["test/gallery"] == [f"{name}/1.jpg", "g.jpg"]


@pytest.mark.parametrize("twice", ["query/query", "queries/Query", "test/query/query_images"])
def test_a_folder_that_was_unpacked_into_its_own_name_is_one(twice):
    sides = found("train/ann/1.jpg", f"{twice}/q.jpg", f"{twice}/r.jpg", "gallery/g.jpg")
    assert sides["test/query"] == ["q.jpg", "r.jpg"]


@pytest.mark.parametrize("others", ["val/query", "old/day/query", "examples/Queries"])
def test_the_folder_in_test_wins_and_the_images_of_others_are_named(others, caplog):
    sides = found(
        "test/query/q.jpg", "test/gallery/g.jpg", "train/ann/1.jpg", f"{others}/v.jpg", "poster.jpg"
    )
    assert sides == {"train": ["ann/1.jpg"], "test/query": ["q.jpg"], "test/gallery": ["g.jpg"]}
    told = f"2 images of day.zip lie in no such folder and are left out: {others} (1), no folder (1)"
    assert caplog.messages == [told]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["a/query/q.jpg", "b/query/r.jpg", "gallery/g.jpg"],
         "2 folders that may be test/query/, a/query, b/query: unpack it"),
        (["query/q.jpg", "gallery/g.jpg", "index/h.jpg"], "may be test/gallery/, gallery, index"),
        (["query/q.jpg", "gallery/g.jpg", "train/a/1.jpg", "Train/a/2.jpg"], "may be train/, Train, train"),
    ],
)  # fmt: skip
def test_two_folders_of_one_rank_are_named(names, words):
    with pytest.raises(InputError, match=words):
        found(*names)


@pytest.mark.parametrize(
    ("names", "missing", "there"),
    [
        (["train/a/1.jpg", "train/b/1.jpg"], "test/query/ and test/gallery/", "train (2)"),
        (
            ["train/a/1.jpg", "test/1.jpg", "test/2.jpg"],
            "test/query/ and test/gallery/",
            "test (2), train (1)",
        ),
        (["q1.jpg", "gallery/1.jpg"], "test/query/", "no folder (1), gallery (1)"),
        (["queries/1.jpg", "images/a/b/c/1.jpg"], "test/gallery/", "queries (1), images/a (1)"),
    ],
)
def test_what_is_missing_and_what_is_there_are_named(names, missing, there):
    with pytest.raises(InputError) as error:
        found(*names)
    assert str(error.value).startswith(
        f"day.zip holds no images in {missing}: they lie in {there}. Name the folders train/, test/query/"
    )
