"""retrieval/datasets/duplicates.py: equal bytes and equal pictures are found, similar pictures are not."""

import numpy as np
from PIL import Image
from skimage import data

from retrieval.datasets.duplicates import find_duplicates


def test_a_picture_saved_again_is_found_and_a_similar_one_is_not(tmp_path):
    photograph = Image.fromarray(data.astronaut())
    photograph.save(tmp_path / "a.png")
    photograph.save(tmp_path / "quality.jpg", quality=50)
    photograph.resize((200, 200)).save(tmp_path / "smaller.jpg")
    (tmp_path / "bytes.png").write_bytes((tmp_path / "a.png").read_bytes())
    photograph.crop((40, 0, 512, 472)).save(tmp_path / "moved.png")
    photograph.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / "mirrored.png")
    turned = photograph.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned back by whoever shows it
    turned.save(tmp_path / "turned.jpg", exif=exif, quality=90)
    again = {path.name: path for path in tmp_path.iterdir() if path.name != "a.png"}
    duplicates = find_duplicates([{"a.png": tmp_path / "a.png"}, again])
    assert {name: duplicate.because for name, duplicate in duplicates.items()} == {
        "bytes.png": "the same bytes",
        "quality.jpg": "the same picture",
        "smaller.jpg": "the same picture",
        "turned.jpg": "the same picture",
    }
    assert {duplicate.of for duplicate in duplicates.values()} == {"a.png"}


def test_only_an_earlier_group_counts_and_what_cannot_be_read_is_compared_by_its_bytes(tmp_path):
    for name, content in {"a": b"1", "b": b"1", "c": b"1", "d": b"2", "e": b"2"}.items():
        (tmp_path / name).write_bytes(content)
    groups = [
        {"a": tmp_path / "a", "b": tmp_path / "b"},
        {"d": tmp_path / "d"},
        {n: tmp_path / n for n in "ce"},
    ]
    duplicates = find_duplicates(groups)
    assert {name: duplicate.of for name, duplicate in duplicates.items()} == {"c": "a", "e": "d"}
    assert find_duplicates([{}, {"a": tmp_path / "a"}, {}]) == {}


def test_two_hundred_images_are_told_apart(tmp_path):
    random = np.random.default_rng(0)
    paths = {}
    for number in range(200):
        coarse = Image.fromarray(random.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        path = tmp_path / f"{number}.png"
        coarse.resize((32, 32), Image.Resampling.BICUBIC).save(path)
        paths[path.name] = path
    names = list(paths)
    halves = [{name: paths[name] for name in names[:100]}, {name: paths[name] for name in names[100:]}]
    assert find_duplicates(halves) == {}
