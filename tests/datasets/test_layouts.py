"""retrieval/datasets/layouts.py: the same layout everywhere; no image in two of train, query and gallery."""

import json
import os
import zipfile

import numpy as np
import pytest
from conftest import run_here
from folders import names, touch
from PIL import Image
from skimage import data

from get_images import find_images
from retrieval.datasets import layouts
from retrieval.datasets.layouts import lay_out_competition, lay_out_intel, lay_out_sample, lay_out_split
from retrieval.errors import InputError, RunError


def paint(folder, *names, seed=0):
    """Images that are all different, with enough in them to tell them apart when they are saved again."""
    random = np.random.default_rng(seed)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        coarse.resize((64, 64), Image.Resampling.BICUBIC).save(folder / name)
    return folder


def classes(folder, count, *labels):
    return paint(folder, *[f"{label}/{number}.png" for label in labels for number in range(count)])


def zipped(folder, file):
    with zipfile.ZipFile(file, "w") as archive:
        for path in sorted(folder.rglob("*.*")):
            archive.write(path, path.relative_to(folder))
    return file


def everything(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*") if path.is_file()}  # fmt: skip


# ---- split


def test_a_split_gives_each_class_its_share_of_every_side(tmp_path):
    source = classes(tmp_path / "source", 10, "a", "b")
    lay_out_split(tmp_path / "out", source)
    for label in "ab":
        counts = [len(list((tmp_path / "out" / side / label).iterdir()))
                  for side in ("train", "test/query", "test/gallery")]  # fmt: skip
        assert counts == [7, 1, 2]
    placed = [path.read_bytes() for path in (tmp_path / "out").rglob("*.png")]
    assert sorted(placed) == sorted(path.read_bytes() for path in source.rglob("*.png"))
    assert len(names(source)) == 20  # nothing was moved
    lay_out_split(tmp_path / "half", source, train=0.5)
    assert len(names(tmp_path / "half" / "train")) == 10


def test_the_same_images_give_the_same_layout_whatever_they_come_in(tmp_path):
    source = classes(tmp_path / "source", 8, "a", "b")
    archive = zipped(source, tmp_path / "source.zip")
    layouts = []
    for number, given in enumerate((source, archive, source)):
        lay_out_split(tmp_path / f"out{number}", given, seed=number // 2)
        layouts.append(set(everything(tmp_path / f"out{number}")))
    assert layouts[0] == layouts[1] != layouts[2]
    plan = json.loads((tmp_path / "out1" / "split.json").read_bytes())
    assert (plan["source"], plan["seed"], plan["train"]) == ("source.zip", 0, 0.7)
    assert plan["counts"] == {"test/query": 2, "test/gallery": 2, "train": 12}
    assert {name.rpartition("/")[0] for name in plan["files"]} == {
        f"{side}/{label}" for side in plan["counts"] for label in "ab"
    }
    for place, name in plan["files"].items():
        assert (tmp_path / "out1" / place).read_bytes() == (source / name).read_bytes()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]  # what it was unpacked to


def test_a_folder_around_the_classes_is_looked_through(tmp_path):
    classes(tmp_path / "source/dataset/images", 8, "a", "b")
    lay_out_split(tmp_path / "out", tmp_path / "source")
    assert {name.split("/")[0] for name in names(tmp_path / "out" / "train")} == {"a", "b"}


def test_a_class_of_one_or_two_goes_to_train_and_is_named(tmp_path, caplog):
    classes(tmp_path / "source", 10, "a")
    paint(tmp_path / "source", "b/only.png", seed=1)
    paint(tmp_path / "source", "c/1.png", "c/2.png", seed=2)
    lay_out_split(tmp_path / "out", tmp_path / "source", train=0.7)
    assert {"b/only.png", "c/1.png", "c/2.png"} <= set(names(tmp_path / "out" / "train"))
    assert "2 of 3 classes are too small for a query and a gallery image beside --train 0.7" in caplog.text
    assert "go to train as a whole: b, c" in caplog.text


@pytest.mark.parametrize(("count", "cure"), [(1, None), (2, 0), (3, 0.3), (4, 0.5), (5, 0.6)])
def test_classes_that_are_all_too_small_are_refused_with_a_share_that_would_do(count, cure, tmp_path):
    source = classes(tmp_path / "source", count, "a", "b")
    advice = "give more images" if cure is None else f"give --train {cure:g}"
    with pytest.raises(
        InputError, match=rf"no class of .* --train 0.7: the largest, a, has {count}: {advice}$"
    ):
        lay_out_split(tmp_path / "out", source)
    assert not (tmp_path / "out").exists()
    if cure is not None:
        lay_out_split(tmp_path / "out", source, train=cure)
        counts = json.loads((tmp_path / "out" / "split.json").read_bytes())["counts"]
        assert min(counts["test/query"], counts["test/gallery"]) >= 2


def test_a_gallery_of_duplicates_alone_is_refused(tmp_path):
    source = classes(tmp_path / "source", 1, "a", "b")
    for label in "ab":
        for number in range(1, 10):
            (source / label / f"{number}.png").write_bytes((source / label / "0.png").read_bytes())
    with pytest.raises(InputError, match=r"no gallery image that is not a duplicate.*--keep_duplicates"):
        lay_out_split(tmp_path / "out", source)
    assert not (tmp_path / "out").exists()
    lay_out_split(tmp_path / "out", source, keep_duplicates=True)


@pytest.mark.parametrize(
    "parts", [("train", "test"), ("Training", "Query", "gallery"), ("seg_train", "seg_test")]
)
def test_a_divided_set_is_no_set_of_classes(parts, tmp_path):
    source = paint(tmp_path / "source", *(f"{part}/{label}/1.png" for part in parts for label in "ab"))
    with pytest.raises(
        InputError, match=rf"already divided into {', '.join(sorted(parts))}: give one of these"
    ):
        lay_out_split(tmp_path / "out", source)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["x.png", "a/y.png"], "1 images of .*, such as x.png, lie in no class folder"),
        (["a/x.png", "a/y.png"], "lie in one class folder, a: give what holds several"),
    ],
)
def test_what_is_no_folder_of_classes_is_refused(names, words, tmp_path):
    with pytest.raises(InputError, match=words):
        lay_out_split(tmp_path / "out", paint(tmp_path / "source", *names))
    assert not (tmp_path / "out").exists()


# ---- duplicates


def test_no_image_is_on_two_sides(tmp_path, caplog):
    source = classes(tmp_path / "source", 30, "a", "b")
    again = Image.fromarray(data.astronaut()).resize((128, 128))
    again.save(source / "a" / "0.png")
    for number in range(20):  # somewhere among all three sides
        (source / "a" / f"bytes{number}.png").write_bytes((source / "b" / "7.png").read_bytes())
        again.resize((80, 80)).save(source / "b" / f"smaller{number}.jpg", quality=70 + number)
    lay_out_split(tmp_path / "out", source)
    plan = json.loads((tmp_path / "out" / "split.json").read_bytes())
    assert "are left out (--keep_duplicates keeps them)" in caplog.text
    assert {found["because"] for found in plan["left_out"].values()} == {"the same bytes", "the same picture"}
    for name, found in plan["left_out"].items():
        assert not (tmp_path / "out" / name).exists()
        assert (tmp_path / "out" / found["of"]).exists()
        assert name.rpartition("/")[0].rpartition("/")[0] != found["of"].rpartition("/")[0].rpartition("/")[0]
    sides = {}
    for place, name in plan["files"].items():
        same = (
            "7" if name == "b/7.png" or "bytes" in name else "0" if name == "a/0.png" or "sm" in name else ""
        )
        if same:
            sides.setdefault(same, set()).add(place.rpartition("/")[0].rpartition("/")[0])
    assert {len(found) for found in sides.values()} == {1}
    lay_out_split(tmp_path / "all", source, keep_duplicates=True)
    assert len(names(tmp_path / "all")) == 100


# ---- Intel


@pytest.fixture
def intel(tmp_path):
    folder = tmp_path / "archive"
    classes(folder / "seg_train/seg_train", 4, *layouts.INTEL)
    for label in layouts.INTEL:
        paint(folder / "seg_test/seg_test", *[f"{label}/{n}.png" for n in range(5)], seed=hash_of(label))
    return paint(folder, "seg_pred/seg_pred/3.png", seed=99)


def hash_of(text):
    return sum(text.encode())


def test_the_intel_scenes_are_laid_out_from_the_zip_and_from_the_folder(intel, tmp_path):
    lay_out_intel(tmp_path / "a", zipped(intel, tmp_path / "intel.zip"))
    lay_out_intel(tmp_path / "b", intel)
    assert set(everything(tmp_path / "a")) == set(everything(tmp_path / "b"))
    counts = json.loads((tmp_path / "a" / "split.json").read_bytes())["counts"]
    assert counts == {"test/query": 12, "test/gallery": 18, "train": 24}
    assert {name.split("/")[0] for name in names(tmp_path / "a" / "test" / "query")} == set(layouts.INTEL)


def test_another_set_is_not_taken_for_the_intel_scenes(intel, tmp_path):
    import shutil

    shutil.rmtree(intel / "seg_test/seg_test/sea")
    with pytest.raises(InputError, match=r"seg_test holds buildings, .*street, and not buildings"):
        lay_out_intel(tmp_path / "out", intel)


def test_kagglehub_is_asked_where_it_is_installed_and_named_where_not(intel, tmp_path, monkeypatch):
    import sys
    from types import SimpleNamespace

    monkeypatch.setitem(sys.modules, "kagglehub", None)
    with pytest.raises(
        InputError, match=r"kaggle\.com/datasets/puneet6060/intel-image-classification in a browser"
    ):
        lay_out_intel(tmp_path / "out", None)
    hub = SimpleNamespace(dataset_download=lambda name: str(intel))
    monkeypatch.setitem(sys.modules, "kagglehub", hub)
    lay_out_intel(tmp_path / "out", None)
    assert len(names(tmp_path / "out")) == 54

    def offline(name):
        raise ConnectionError("no route")

    monkeypatch.setattr(hub, "dataset_download", offline)
    with pytest.raises(RunError, match=r"kagglehub cannot download .*no route.*give the zip by --archive"):
        lay_out_intel(tmp_path / "other", None)


# ---- competition


@pytest.mark.parametrize("around", ["", "day/"])
def test_what_the_organisers_hand_out_keeps_its_names(around, tmp_path, caplog):
    handed = tmp_path / "handed"
    paint(handed, f"{around}train/ann/1.png", f"{around}test/query/q.png", f"{around}test/gallery/g.png")
    (handed / around / "train/ann/2.png").write_bytes((handed / around / "test/query/q.png").read_bytes())
    (handed / around / "test/gallery/h.png").write_bytes((handed / around / "test/query/q.png").read_bytes())
    lay_out_competition(tmp_path / "data", zipped(handed, tmp_path / "x.zip"))
    assert names(tmp_path / "data") == [
        "test/gallery/g.png", "test/gallery/h.png", "test/query/q.png", "train/ann/1.png"]  # fmt: skip
    assert "test/gallery/h.png has the same bytes as test/query/q.png, and is kept" in caplog.text


def test_test_folders_without_train_will_do_and_train_without_them_will_not(tmp_path):
    lay_out_competition(tmp_path / "data", paint(tmp_path / "a", "test/query/q.png", "test/gallery/g.png"))
    assert names(tmp_path / "data") == ["test/gallery/g.png", "test/query/q.png"]
    with pytest.raises(
        InputError, match=r"holds no images in test/query/ and test/gallery/: they lie in train \(1\)"
    ):
        lay_out_competition(tmp_path / "other", paint(tmp_path / "b", "train/x/q.png"))


@pytest.mark.parametrize(
    "folders",
    [
        ("Train", "Query", "Gallery"),
        ("training", "queries", "database"),
        ("data/day/train_images", "data/day/test/probe", "data/day/test/index"),
    ],
)
@pytest.mark.parametrize("pack", [zipped, lambda folder, file: folder], ids=["zip", "folder"])
def test_the_folders_may_have_other_names_and_lie_deeper(folders, pack, tmp_path, caplog):
    caplog.set_level("INFO")
    train, query, gallery = folders
    handed = paint(tmp_path / "handed", f"{train}/ann/1.png", f"{query}/q.png", f"{gallery}/g.png")
    lay_out_competition(tmp_path / "data", pack(handed, tmp_path / "x.zip"))
    assert not [record for record in caplog.records if record.levelname != "INFO"]
    assert names(tmp_path / "data") == ["test/gallery/g.png", "test/query/q.png", "train/ann/1.png"]
    assert f"{gallery.removeprefix('data/day/')}/ for test/gallery/" in caplog.text


# ---- the target


def test_nothing_is_overwritten_and_what_else_is_there_stays(tmp_path):
    source = classes(tmp_path / "source", 6, "a", "b")
    touch(tmp_path, "data/notes.txt")
    lay_out_split(tmp_path / "data", source)
    assert (tmp_path / "data/notes.txt").exists()
    before = everything(tmp_path / "data")
    with pytest.raises(
        FileExistsError, match=r"holds train and test and split\.json already: give another --out"
    ):
        lay_out_split(tmp_path / "data", source, seed=1)
    assert everything(tmp_path / "data") == before
    with pytest.raises(FileExistsError, match="is a file: give a folder as --out"):
        lay_out_split(tmp_path / "data/notes.txt", source)


def test_files_are_copied_where_they_cannot_be_linked(tmp_path, monkeypatch):
    source = classes(tmp_path / "source", 6, "a", "b")
    lay_out_split(tmp_path / "linked", source)

    def no_link(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", no_link)
    lay_out_split(tmp_path / "copied", source)
    assert everything(tmp_path / "linked") == everything(tmp_path / "copied")
    inodes = {path.stat().st_ino for path in source.rglob("*.png")}
    assert {path.stat().st_ino for path in (tmp_path / "linked").rglob("*.png")} == inodes
    assert not {path.stat().st_ino for path in (tmp_path / "copied").rglob("*.png")} & inodes


# ---- the sample


def test_the_sample_is_every_digit_once_in_three_parts(sample):
    counts = {part: len(find_images(sample / part)) for part in ("train", "test/query", "test/gallery")}
    assert counts == {"train": 797, "test/query": 200, "test/gallery": 800}
    assert len({image.path.name for image in find_images(sample)}) == 1797
    assert len({image.path.read_bytes() for image in find_images(sample)}) == 1797
    for label in "0123456789":
        assert len(list((sample / "test/query" / label).iterdir())) == 20


def test_the_sample_shows_the_digits_of_its_folders(sample):
    from sklearn.datasets import load_digits

    digits = load_digits()
    for image in find_images(sample / "train")[::50]:
        row = int(image.path.stem.removeprefix("digit_"))
        assert image.name.split("/")[0] == str(digits.target[row])
        assert (
            abs(
                np.asarray(Image.open(image.path).convert("L"), dtype=float) - digits.images[row] * 255 / 16
            ).max()
            <= 0.5
        )


def test_the_sample_is_seeded_and_left_alone_when_it_is_there(sample, tmp_path, caplog):
    lay_out_sample(tmp_path / "again")
    assert names(tmp_path / "again") == names(sample)
    stamp = os.stat(tmp_path / "again" / "train" / "0").st_mtime_ns
    caplog.set_level("INFO")
    lay_out_sample(tmp_path / "again")
    assert "already" in caplog.text
    assert os.stat(tmp_path / "again" / "train" / "0").st_mtime_ns == stamp


def test_the_sample_overwrites_nothing_and_is_never_half_there(tmp_path, monkeypatch):
    touch(tmp_path, "mine/holiday.jpg")
    with pytest.raises(FileExistsError, match="give another --out"):
        lay_out_sample(tmp_path / "mine")
    assert os.listdir(tmp_path / "mine") == ["holiday.jpg"]

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        lay_out_sample(tmp_path / "new")
    assert os.listdir(tmp_path) == ["mine"]


def test_a_missing_flag_and_a_mistyped_command_are_sentences(tmp_path):
    ended = run_here("-m", "retrieval.datasets", "split", "--out", "y", cwd=tmp_path)
    assert ended.returncode == 2
    assert ended.stderr == "error: give --source: folder or archive with one folder per class\n"
    ended = run_here("-m", "retrieval.datasets", "spilt", cwd=tmp_path)
    assert ended.returncode == 2
    assert "give one of these commands first; did you mean split?" in ended.stderr
