import threading

import numpy as np
import pytest
import torch
from PIL import Image

from get_images import ImageFile, find_images
from retrieval.backbones.transform import ModelInput, Transform
from retrieval.embedding.loader import read_batches


def test_batches_keep_order_and_names_and_name_what_is_unreadable(tmp_path):
    for level in range(7):
        Image.new("L", (5 + level, 3), level * 10).save(tmp_path / f"{level}.png")
    broken = ("3a.jpg", "b.png", "z.gif")
    for name in broken:
        (tmp_path / name).write_bytes(b"no image")
    batches = list(
        read_batches(
            find_images(tmp_path), lambda image: ModelInput(image[:2, :2].transpose(2, 0, 1)), batch_size=3
        )
    )
    assert [batch.names for batch in batches] == [
        ["0.png", "1.png", "2.png"],
        ["3.png", "4.png", "5.png"],
        ["6.png"],
    ]
    for batch in batches:
        for name, image in zip(batch.names, batch.images, strict=True):
            assert image.pixels.shape == (3, 2, 2)
            assert (image.pixels == int(name[0]) * 10).all()
    assert {name for batch in batches for name in batch.unreadable} == set(broken)


def test_unreadable_files_alone_still_come_in_a_batch(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"")
    (batch,) = read_batches(find_images(tmp_path), ModelInput, batch_size=4)
    assert (batch.names, batch.images, list(batch.unreadable)) == ([], [], ["a.jpg"])


def test_workers_read_only_a_little_ahead_and_end_with_the_caller(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    started = []
    before = threading.active_count()
    files = [ImageFile(str(i), tmp_path / "a.png") for i in range(1000)]
    batches = read_batches(files, lambda image: started.append(1) or ModelInput(image), batch_size=5)
    next(batches)
    batches.close()
    assert len(started) <= 20
    assert threading.active_count() == before


def test_an_error_in_prepare_is_not_taken_for_an_unreadable_image(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "a.png")

    def prepare(image):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(read_batches(find_images(tmp_path), prepare, batch_size=5))


def test_reading_leaves_the_networks_threads_alone(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    before = torch.get_num_threads()
    list(read_batches(find_images(tmp_path), ModelInput, batch_size=5))
    assert torch.get_num_threads() == before


def test_processes_give_what_threads_give(tmp_path):
    for level in range(5):
        Image.new("L", (5 + level, 3), level * 10).save(tmp_path / f"{level}.png")
    (tmp_path / "3a.jpg").write_bytes(b"no image")
    files, transform = find_images(tmp_path), Transform(4, "bilinear")
    by_threads = list(read_batches(files, transform, batch_size=2))
    by_processes = list(read_batches(files, transform, batch_size=2, processes=True))
    assert [batch.names for batch in by_processes] == [batch.names for batch in by_threads]
    assert [batch.unreadable for batch in by_processes] == [batch.unreadable for batch in by_threads]
    for one, other in zip(by_processes, by_threads, strict=True):
        for image, same in zip(one.images, other.images, strict=True):
            assert np.array_equal(image.pixels, same.pixels)
