import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import by_torch
from PIL import Image

from get_images import find_images, read_image
from retrieval.backbones.transform import Transform
from retrieval.embedding.embed import embed
from retrieval.errors import InputError, RunError
from retrieval.machine import cores


def corner_network(images):
    """A stand-in network: the channels of the first pixel, so that the vector of an image is known."""
    return images[:, :, 0, 0]


@pytest.fixture
def toy(backbone):
    """A backbone whose network sees 2 × 2 pixels from 0 to 1 and gives three numbers."""
    two_pixels = Transform(2, "bicubic")
    return replace(
        backbone, network=corner_network, dimension=3, transform=two_pixels, mean=(0, 0, 0), std=(1, 1, 1)
    )


@pytest.fixture
def colours(tmp_path):
    """Seven one-coloured images in the order of their names, and their unit vectors."""
    levels = np.random.default_rng(0).integers(1, 256, (7, 3))
    for name, level in enumerate(levels):
        Image.new("RGB", (3, 5), tuple(level.tolist())).save(tmp_path / f"{name}.png")
    return find_images(tmp_path), levels / np.linalg.norm(levels, axis=1, keepdims=True)


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_each_name_keeps_its_own_vector(colours, toy, batch_size):
    files, expected = colours
    embeddings = embed(files, by_torch(toy, batch_size))
    assert embeddings.names == [f"{name}.png" for name in range(7)]
    assert embeddings.vectors.dtype == np.float32
    assert np.allclose(embeddings.vectors, expected, atol=1e-6)
    backwards = embed(files[::-1], by_torch(toy, batch_size))
    assert backwards.names == embeddings.names[::-1]
    assert np.allclose(backwards.vectors, expected[::-1], atol=1e-6)


def test_the_real_network_gives_an_image_the_same_vector_alone_and_in_a_batch(few, backbone):
    files, backbone = find_images(few / "query"), replace(backbone, transform=backbone.transform.of_size(96))
    together = embed(files, by_torch(backbone, 5))
    assert together.vectors.shape == (8, 1280)
    assert np.allclose(np.linalg.norm(together.vectors, axis=1), 1, atol=1e-6)
    with torch.inference_mode():
        for file, vector in zip(files, together.vectors, strict=True):
            pixels = torch.from_numpy(backbone.transform(read_image(file.path)).pixels[None])
            alone = backbone.embed(pixels)[0].numpy()
            assert np.dot(vector, alone / np.linalg.norm(alone)) > 0.99999


def test_unreadable_images_keep_their_rows_as_zeros_and_are_named(colours, toy, caplog):
    files, expected = colours
    files[2].path.write_bytes(b"")
    files[6].path.write_text("hello")
    embeddings = embed(files, by_torch(toy, 2), kind="queries")
    assert embeddings.names == [file.name for file in files]
    assert embeddings.unreadable == ["2.png", "6.png"]
    readable = [0, 1, 3, 4, 5]
    assert np.allclose(embeddings.vectors[readable], expected[readable], atol=1e-6)
    assert "2.png in the queries could not be embedded: an empty file" in caplog.text
    assert "6.png in the queries could not be embedded: not an image" in caplog.text


def test_numbers_that_a_ranking_cannot_use_are_unreadable_too(colours, toy, caplog):
    files, _ = colours
    Image.new("RGB", (2, 2), "black").save(files[0].path)  # gives a vector of length 0

    def network(images):
        return torch.where(images[:, :1, 0, 0] == images[:, 0, 0, 0].max(), torch.nan, corner_network(images))

    embeddings = embed(files, by_torch(replace(toy, network=network), 10))
    brightest = f"{np.argmax([read_image(file.path)[0, 0, 0] for file in files])}.png"
    assert embeddings.unreadable == sorted(["0.png", brightest])
    assert np.isfinite(embeddings.vectors).all()
    assert "no usable numbers" in caplog.text


def test_not_one_image_is_an_error_and_each_is_named(tmp_path, toy, caplog):
    for name in range(15):
        (tmp_path / f"{name}.png").write_bytes(b"")
    with pytest.raises(InputError, match="not one of the 15 queries"):
        embed(find_images(tmp_path), by_torch(toy, 4), kind="queries")
    assert len(caplog.records) == 15


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("MPS backend out of memory")]
)
def test_a_batch_that_does_not_fit_is_halved_and_said(colours, toy, caplog, error):
    files, expected = colours
    sizes = []

    def network(images):
        sizes.append(len(images))
        if len(images) > 2:
            raise error
        return corner_network(images)

    embeddings = embed(files, by_torch(replace(toy, network=network), 7))
    assert np.allclose(embeddings.vectors, expected, atol=1e-6)
    assert sizes == [7, 3, 1, 1, 1, 1, 1, 1, 1]
    assert "trying 3 at once" in caplog.text
    assert "trying 1 at once" in caplog.text


def test_the_size_that_fits_is_remembered(colours, toy):
    sizes = []

    def network(images):
        sizes.append(len(images))
        if len(images) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return corner_network(images)

    embed(colours[0], by_torch(replace(toy, network=network), 4))
    assert sizes == [4, 2, 2, 2, 2]  # filled up to a batch


def test_one_image_that_does_not_fit_and_other_errors(colours, toy):
    def raising(error):
        def network(images):
            raise error

        return replace(toy, network=network)

    with pytest.raises(RunError, match="--device cpu"):
        embed(colours[0], by_torch(raising(torch.OutOfMemoryError("out of memory")), 4))
    with pytest.raises(RuntimeError, match="shapes"):
        embed(colours[0], by_torch(raising(RuntimeError("shapes do not match")), 4))


def test_torch_runs_in_the_main_thread_with_all_cores(colours, toy):
    """Readers have one thread each, and CUDA's current GPU is that of a thread."""
    found = []

    def network(images):
        found.append((threading.current_thread(), torch.get_num_threads()))
        return corner_network(images)

    for _ in range(2):  # the second time after readers
        embed(colours[0], by_torch(replace(toy, network=network), 2))
    assert set(found) == {(threading.main_thread(), cores())}
