"""supcon/batches.py: what is set aside, what is read, and what an epoch's batches hold."""

import logging
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import image_files
from PIL import Image

from retrieval import machine
from retrieval.backbones.transform import Transform
from retrieval.errors import InputError
from supcon import batches
from supcon.batches import by_class, find_labelled, load_images, shuffled, split


def folder_of(**classes):
    return image_files(
        [f"{label}/{number:03}.jpg" for label, count in classes.items() for number in range(count)]
    )


def test_a_share_of_each_class_is_set_aside_and_no_image_is_on_both_sides():
    files = folder_of(a=20, b=10, c=3, d=1)
    found = split(files, 0.2, seed=0)
    assert found.by == "image"
    assert Counter(file.name[0] for file in found.validation) == {"a": 4, "b": 2, "c": 2}
    assert sorted(file.name for file in [*found.train, *found.validation]) == sorted(f.name for f in files)
    assert found == split(files, 0.2, seed=0)
    assert found.validation != split(files, 0.2, seed=1).validation


def test_of_many_classes_whole_ones_are_set_aside_and_those_of_one_image_stay():
    files = folder_of(
        **{f"p{number:02}": 5 for number in range(30)}, **{f"q{number:02}": 1 for number in range(9)}
    )
    found = split(files, 0.2, seed=0)
    assert found.by == "identity"
    assert set(Counter(file.name[:3] for file in found.validation).values()) == {5}
    assert len({file.name[:3] for file in found.validation}) == 10  # a share of 0.2 is too few images
    assert not {file.name[:3] for file in found.validation} & {file.name[:3] for file in found.train}
    assert sum(file.name[0] == "q" for file in found.train) == 9


def test_where_each_class_has_one_image_or_labels_do_not_count_images_are_set_aside():
    files = folder_of(**{f"p{number:02}": 1 for number in range(40)})
    found = split(files, 0.25, seed=0)
    assert (found.by, len(found.validation), len(found.train)) == ("view", 10, 30)
    unlabelled = image_files([f"{number}.jpg" for number in range(10)])
    assert split(unlabelled, 0.2, seed=0, labelled=False).by == "view"
    assert split(folder_of(a=2, b=2), 0.5, seed=0).by == "view"  # two images a class: none to spare


def test_validation_is_never_of_one_class_however_large_the_classes_are(monkeypatch):
    monkeypatch.setattr(batches, "MOST_FOR_VALIDATION", 60)
    found = split(folder_of(**{f"p{number:02}": 100 for number in range(25)}), 0.2, seed=0)
    assert Counter(file.name[:3] for file in found.validation).most_common()[0][1] == 12
    assert len({file.name[:3] for file in found.validation}) == 5
    assert len({file.name[:3] for file in found.train}) == 20
    one_rich = folder_of(m=3, **{f"q{number:02}": 1 for number in range(40)})
    assert split(one_rich, 0.2, seed=0).by == "view"


def test_two_classes_are_left_to_learn_from_and_few_images_are_made_more():
    small = folder_of(**{f"p{number:02}": 3 for number in range(20)})
    assert len({file.name[:3] for file in split(small, 0.97, seed=0).train}) == 2
    pairs = folder_of(**{f"p{number:02}": 2 for number in range(60)})
    assert len(split(pairs, 0.1, seed=0).validation) == 50


def test_never_more_are_set_aside_than_the_most(monkeypatch):
    monkeypatch.setattr(batches, "MOST_FOR_VALIDATION", 12)
    assert len(split(folder_of(a=100, b=100), 0.5, seed=0).validation) == 12
    many = folder_of(**{f"p{number:02}": 5 for number in range(30)})
    assert len(split(many, 0.2, seed=0).validation) == 20  # two of each: one looks for the other
    assert len(split(many, 0.9, seed=0, labelled=False).validation) == 12


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (
            lambda folder: shutil.copy(next(folder.glob("0/*")), folder / "x.png"),
            "1 images in .*x.png, lie in no class",
        ),
        (lambda folder: (folder / "9").mkdir(), "9 holds no image, so that its class has none"),
        (lambda folder: [shutil.rmtree(folder / label) for label in "123"], "one class only, 0"),
    ],
)
def test_a_folder_that_cannot_be_learned_from_is_a_sentence(few, tmp_path, spoil, sentence):
    shutil.copytree(few / "gallery", tmp_path / "train")
    spoil(tmp_path / "train")
    with pytest.raises(InputError, match=sentence):
        find_labelled(tmp_path / "train")


def test_squares_are_what_the_transform_gives_and_unreadable_images_are_named_and_counted(
    few, tmp_path, caplog
):
    from get_images import find_images, read_image

    shutil.copytree(few / "gallery", tmp_path / "train")
    (tmp_path / "train" / "1" / "broken.png").write_bytes(b"no image")
    for name in ("0/cut.jpg", "1/cut.jpg", "2/cut.jpg"):
        Image.effect_noise((40, 40), 50).save(tmp_path / "train" / name)
        content = (tmp_path / "train" / name).read_bytes()
        (tmp_path / "train" / name).write_bytes(content[:-300])
    files = find_images(tmp_path / "train")
    prepare = Transform(20, "bilinear")
    with caplog.at_level(logging.WARNING):
        found = load_images(files, prepare, "training images")
    assert "1/broken.png is left out of the training images: not an image" in caplog.text
    assert f"1 of the {len(files)} training images are left out" in caplog.text
    assert "the pixels that decode are used: 0/cut.jpg, 1/cut.jpg, 2/cut.jpg" in caplog.text
    assert found.names == [file.name for file in files if "broken" not in file.name]
    assert found.classes == list("0123")
    assert found.labels.tolist() == [int(name[0]) for name in found.names]
    for row in (0, 5, 11):
        path = tmp_path / "train" / found.names[row]
        assert np.array_equal(found.pixels[row].numpy(), prepare(read_image(path)).pixels)


def test_more_squares_than_memory_is_meant_for_lie_in_a_file(few, monkeypatch):
    from get_images import find_images

    files, prepare = find_images(few / "gallery"), Transform(20, "bilinear")
    in_memory = load_images(files, prepare, "images")
    monkeypatch.setattr(machine, "memory", lambda: 1000)
    in_a_file = load_images(files, prepare, "images")
    assert torch.equal(in_memory.pixels, in_a_file.pixels)


def test_shuffled_batches_hold_each_image_once():
    found = shuffled(50, 8, np.random.default_rng(0))
    assert [len(rows) for rows in found] == [8] * 6
    assert len(set(np.concatenate(found).tolist())) == 48
    assert [len(rows) for rows in shuffled(5, 5, np.random.default_rng(0))] == [5]


@pytest.mark.parametrize(
    "counts",
    [[20] * 6, [1] * 40, [1000, 3, 1, 1, 2], [2, 2], [5, 1], [300] + [1] * 100],
    ids=["even", "one image each", "uneven", "tiny", "two classes", "one large and many of one"],
)
@pytest.mark.parametrize("images_per_class", [1, 4, 100])
def test_batches_by_class_are_full_and_hold_no_image_twice(counts, images_per_class):
    labels = np.repeat(np.arange(len(counts)), counts)
    size = min(16, len(labels))
    found = by_class(labels, size, images_per_class, np.random.default_rng(0))
    assert len(found) == len(labels) // size
    for rows in found:
        assert len(rows) == size
        assert len(set(rows.tolist())) == size


def test_batches_by_class_have_p_classes_of_k_images():
    labels = np.repeat(np.arange(10), 30)
    for rows in by_class(labels, 16, 4, np.random.default_rng(0)):
        assert sorted(Counter(labels[rows].tolist()).values()) == [4, 4, 4, 4]


def test_classes_count_the_same_however_many_images_they_have():
    labels = np.repeat(np.arange(5), [400, 40, 40, 4, 4])
    drawn = Counter(labels[np.concatenate(by_class(labels, 20, 4, np.random.default_rng(0)))].tolist())
    assert max(drawn.values()) - min(drawn.values()) <= 4


def test_a_large_class_hands_out_all_its_images_in_turn():
    labels = np.repeat(np.arange(2), [64, 64])
    rows = np.concatenate(by_class(labels, 8, 4, np.random.default_rng(0)))
    assert len(set(rows.tolist())) == 128


def test_batches_follow_from_the_seed():
    labels = np.repeat(np.arange(6), 20)
    first, again, other = (by_class(labels, 16, 4, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert all(map(np.array_equal, first, again))
    assert not all(map(np.array_equal, first, other))


def test_a_whole_data_set_is_no_training_folder(few, tmp_path):
    for part in ("train", "test"):
        shutil.copytree(few / "gallery", tmp_path / part)
    with pytest.raises(InputError, match=r"holds train/ and test/, .*: give .*/train$"):
        find_labelled(tmp_path)
