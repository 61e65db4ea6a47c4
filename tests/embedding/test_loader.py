import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

from get_images import ImageFile, find_images
from retrieval.backbones.face_crop import FaceCrop
from retrieval.backbones.transform import ModelInput, Transform
from retrieval.embedding import loader
from retrieval.embedding.loader import PIPE_BYTES, read_batches


class Corner:
    """A transform: the upper left corner, 2 x 2 pixels."""

    size, enough = 2, None

    def __init__(self, called=lambda: None):
        self.called = called

    def __call__(self, image):
        self.called()
        return ModelInput(image[:2, :2].transpose(2, 0, 1))


def test_batches_keep_order_and_names_and_name_what_is_unreadable(tmp_path):
    for level in range(7):
        Image.new("L", (5 + level, 3), level * 10).save(tmp_path / f"{level}.png")
    broken = ("3a.jpg", "b.png", "z.gif")
    for name in broken:
        (tmp_path / name).write_bytes(b"no image")
    batches = list(read_batches(find_images(tmp_path), Corner(), batch_size=3))
    assert [batch.names for batch in batches] == [
        ["0.png", "1.png", "2.png"],
        ["3.png", "4.png"],
        ["5.png", "6.png"],
        [],
    ]
    for batch in batches:
        assert batch.pixels.shape == (len(batch.names), 3, 2, 2)
        for name, pixels in zip(batch.names, batch.pixels, strict=True):
            assert (pixels == int(name[0]) * 10).all()
    assert {name for batch in batches for name in batch.unreadable} == set(broken)


def test_unreadable_files_alone_still_come_in_a_batch(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"")
    (batch,) = read_batches(find_images(tmp_path), Corner(), batch_size=4)
    assert (batch.names, len(batch.pixels), list(batch.unreadable)) == ([], 0, ["a.jpg"])


def test_workers_read_only_a_little_ahead_and_end_with_the_caller(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    started = []
    before = threading.active_count()
    files = [ImageFile(str(i), tmp_path / "a.png") for i in range(1000)]
    batches = read_batches(files, Corner(lambda: started.append(1)), batch_size=5)
    next(batches)
    batches.close()
    assert len(started) <= 20
    assert threading.active_count() == before


def test_an_error_in_prepare_is_not_taken_for_an_unreadable_image(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "a.png")

    with pytest.raises(ZeroDivisionError):
        list(read_batches(find_images(tmp_path), Corner(lambda: 1 / 0), batch_size=5))


def test_reading_leaves_the_networks_threads_alone(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    before = torch.get_num_threads()
    list(read_batches(find_images(tmp_path), Corner(), batch_size=5))
    assert torch.get_num_threads() == before


@pytest.mark.slow
def test_dlibs_processes_need_no_torch_for_large_batches(tmp_path):
    Image.new("RGB", (60, 60), "green").save(tmp_path / "a.png")
    files = [ImageFile(str(number), tmp_path / "a.png") for number in range(64)]
    crop = FaceCrop("dlib", 150, 1 / 3, 0.08)
    assert len(files) * 3 * crop.size**2 > PIPE_BYTES
    (batch,) = read_batches(files, crop, batch_size=64, processes=True)
    assert batch.faces == [False] * 64


@pytest.mark.parametrize("size", [4, 1024])  # the second: through shared memory
def test_processes_give_what_threads_give(tmp_path, monkeypatch, size):
    assert (2 * 3 * size**2 > PIPE_BYTES) == (size == 1024)
    for level in range(5):
        Image.new("L", (5 + level, 3), level * 10).save(tmp_path / f"{level}.png")
    (tmp_path / "3a.jpg").write_bytes(b"no image")
    monkeypatch.chdir(tmp_path)  # not where the processes started
    files, transform = find_images("."), Transform(size, "bilinear")
    by_threads = list(read_batches(files, transform, batch_size=2))
    by_processes = list(read_batches(files, transform, batch_size=2, processes=True))
    assert [batch.names for batch in by_processes] == [batch.names for batch in by_threads]
    assert [batch.unreadable for batch in by_processes] == [batch.unreadable for batch in by_threads]
    for one, other in zip(by_processes, by_threads, strict=True):
        assert np.array_equal(one.pixels, other.pixels)


def test_very_large_images_are_decoded_one_at_a_time(tmp_path, monkeypatch):
    """Each reader has room for 50 pixels, one reader alone for 200."""
    for name, side in {"small": 7, "large": 14, "larger": 14, "huge": 15}.items():
        Image.new("L", (side, side), 9).save(tmp_path / f"{name}.png")
    monkeypatch.setattr(loader, "cores", lambda: 4)
    monkeypatch.setattr(loader, "memory", lambda: 200 * loader.BYTES_PER_PIXEL / loader.SHARE)
    loader.pixels_that_fit.cache_clear()
    at_once, most = [], []

    def decode(content, enough, most_pixels, decode=loader.decode_image):
        if most_pixels > 50:
            at_once.append(1)
            most.append(len(at_once))
            time.sleep(0.01)
            at_once.pop()
        return decode(content, enough, most_pixels)

    monkeypatch.setattr(loader, "decode_image", decode)
    try:
        batches = list(read_batches(find_images(tmp_path), Transform(2, "bicubic"), batch_size=1))
    finally:
        loader.pixels_that_fit.cache_clear()
    assert [name for batch in batches for name in batch.names] == ["large.png", "larger.png", "small.png"]
    reasons = {name: reason for batch in batches for name, reason in batch.unreadable.items()}
    assert reasons == {"huge.png": "225 pixels: more than the 200 that fit into memory, so make it smaller"}
    assert most == [1, 1, 1]
