"""What a GPU decodes, played by the CPU: torchvision's decoder does the same there."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import by_torch
from photographs import face_photograph, photo_of
from PIL import Image
from sklearn.datasets import load_sample_images

from get_images import find_images
from retrieval.backbones.backbone import Backbone, LazyBackbone, find_backbone, place
from retrieval.backbones.face_crop import FaceCrop
from retrieval.backbones.transform import Transform
from retrieval.embedding import gpu_decoder
from retrieval.embedding.cache import Cache
from retrieval.embedding.embed import embed
from retrieval.embedding.loader import Reader, plain_jpeg
from retrieval.embedding.runtime import choose_runtime

PHOTO = Image.fromarray(load_sample_images().images[0])


@pytest.fixture
def photographs(tmp_path):
    """Six JPEGs of three shapes, a PNG, a turned JPEG, and two that cannot be read."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    for number in range(6):
        PHOTO.crop((20 * number, 0, 300 + 20 * (number % 3), 250)).save(folder / f"{number}.jpg", quality=90)
    PHOTO.save(folder / "6.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    PHOTO.save(folder / "7.jpg", exif=exif)
    (folder / "8.jpg").write_bytes((folder / "0.jpg").read_bytes()[:5000])
    (folder / "9.jpg").write_bytes(b"")
    return find_images(folder)


def runtime_of(network, transform, files, decodes=True, batch=4):
    """A runtime by torch whose device decodes."""
    backbone = place(Backbone(network, 0, transform, (0.5,) * 3, (0.5,) * 3, "toy"))
    lazy = LazyBackbone("toy", transform, "cpu", b"toy", lambda: backbone)
    return replace(choose_runtime(lazy, "torch", len(files), batch, None), gpu_decodes=decodes)


class Mean(torch.nn.Module):
    """The mean colours of sixteen squares."""

    def forward(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images + 1, 4).flatten(1)


def test_what_the_gpu_decodes_has_the_vectors_that_the_cpu_gives(photographs, caplog):
    by_gpu = runtime_of(Mean(), Transform(32, "bicubic"), photographs)
    found = embed(photographs, by_gpu)
    expected = embed(photographs, runtime_of(Mean(), Transform(32, "bicubic"), photographs, decodes=False))
    assert by_gpu.gpu_decodes
    assert by_gpu.seconds["decode"] > 0
    assert found.names == expected.names
    assert found.unreadable == expected.unreadable == ["8.jpg", "9.jpg"]
    assert (found.vectors[:8] * expected.vectors[:8]).sum(1).min() > 0.9999
    assert not np.array_equal(found.vectors, expected.vectors)  # it rounds once more
    assert "8.jpg in the images could not be embedded" in caplog.text


def test_only_plain_jpegs_are_left_to_the_gpu(photographs, tmp_path):
    batch = Reader(Transform(32, "bicubic"), leave_jpegs=True).read_group(photographs)
    assert batch.names == [file.name for file in photographs[:8]]
    assert list(batch.jpegs) == [0, 1, 2, 3, 4, 5]
    assert batch.pixels.shape == (2, 3, 32, 32)
    kinds = {"CMYK": PHOTO.convert("CMYK"), "rgb": PHOTO, "grey": PHOTO.convert("L")}
    for name, image in kinds.items():
        image.save(tmp_path / name, "JPEG", keep_rgb=name == "rgb")
    assert {name: bool(plain_jpeg(tmp_path / name)) for name in kinds} == {
        "CMYK": False, "rgb": False, "grey": True}  # fmt: skip


def test_a_file_that_the_gpu_refuses_is_decoded_by_the_cpu(photographs, monkeypatch):
    def decode(jpegs, device, decode=gpu_decoder.decode):
        if len(jpegs) > 2:
            raise RuntimeError("Failed to decode jpeg stream: 2")
        return decode(jpegs, device)

    transform = Transform(32, "bicubic")
    by_gpu = Reader(transform, leave_jpegs=True).read_group(photographs)
    by_cpu = Reader(transform).read_group(photographs)
    monkeypatch.setattr(gpu_decoder, "PIXELS", 4 * 300 * 250)
    monkeypatch.setattr(gpu_decoder, "decode", decode)
    photographs[3].path.write_bytes(b"changed meanwhile")
    gpu_decoder.decode_on_gpu(by_gpu, transform, "cpu")
    assert by_gpu.names == [name for name in by_cpu.names if name != "3.jpg"]
    assert by_gpu.unreadable["3.jpg"] == "not an image"
    kept = [row for row, name in enumerate(by_cpu.names) if name != "3.jpg"]
    difference = by_gpu.pixels.numpy().astype(int) - by_cpu.pixels[kept]
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("why", ["few JPEGs", "no decoder", "other vectors"])
def test_where_it_is_not_worth_it_the_cpu_decodes(photographs, monkeypatch, caplog, why):
    caplog.set_level("INFO")
    if why == "few JPEGs":
        photographs = photographs[4:]
    else:
        error = NotImplementedError("Could not run 'image::decode_jpegs_cuda'")
        wrong = {
            "no decoder": lambda *_: exec("raise error", {"error": error}),
            "other vectors": lambda jpegs, device: [torch.zeros(3, 30, 40, dtype=torch.uint8)] * len(jpegs),
        }
        monkeypatch.setattr(gpu_decoder, "decode", wrong[why])
    runtime = runtime_of(Mean(), Transform(32, "bicubic"), photographs)
    key = runtime.key
    found = embed(photographs, runtime)
    assert not runtime.gpu_decodes
    assert runtime.key != key
    expected = runtime_of(Mean(), Transform(32, "bicubic"), photographs, decodes=False)
    assert np.array_equal(found.vectors, embed(photographs, expected).vectors)
    assert ("the CPU decodes JPEGs" in caplog.text) == (why != "few JPEGs")


def test_the_cache_keeps_the_two_apart(photographs, tmp_path):
    runs = [runtime_of(Mean(), Transform(32, "bicubic"), photographs, decodes) for decodes in (True, False)]
    first, second = (embed(photographs, run, cache=Cache(tmp_path / "cache")) for run in runs)
    assert not np.array_equal(first.vectors, second.vectors)
    again = runtime_of(Mean(), Transform(32, "bicubic"), photographs)
    assert np.array_equal(embed(photographs, again, cache=Cache(tmp_path / "cache")).vectors, first.vectors)


def test_faces_are_found_and_cut_on_the_gpu(tmp_path):
    for number, name in enumerate(["hopper", "collins", "hopper"]):
        image = Image.fromarray(photo_of(face_photograph(name)))
        image.resize((300 + number, 300)).save(tmp_path / f"{number}.jpg", quality=95)
    Image.new("RGB", (200, 100), "green").save(tmp_path / "3.jpg")
    files = find_images(tmp_path)
    crop = FaceCrop("mtcnn", 80, 0.1, 0.08)
    by_gpu = runtime_of(Mean(), crop, files)
    cache = Cache(tmp_path / "cache")
    found = embed(files, by_gpu, cache=cache)
    expected = embed(files, by_torch(replace(by_gpu.backbone.load()), 4))
    assert found.without_face == expected.without_face == ["3.jpg"]
    assert (found.vectors * expected.vectors).sum(1).min() > 0.9999
    other = replace(runtime_of(Mean(), crop, files), backbone=replace(by_gpu.backbone, key=b"another"))
    assert np.array_equal(embed(files, other, cache=cache).vectors, found.vectors)  # from the cached crops
    assert other.readers_seconds == 0


def test_torchcodec_decodes_where_it_is_installed(monkeypatch):
    import sys
    from types import SimpleNamespace

    def decode_jpeg(sources, mode, device):
        return [(bytes(source.numpy()), mode, device) for source in sources]

    monkeypatch.setitem(sys.modules, "torchcodec.decoders", SimpleNamespace(decode_jpeg=decode_jpeg))
    assert gpu_decoder.decode([b"a", b"b"], "cuda") == [(b"a", "RGB", "cuda"), (b"b", "RGB", "cuda")]


def test_a_gpu_decodes_by_default_what_it_can(tmp_path):
    backbone = replace(find_backbone("efficientnet_lite0", "cpu"), device="cuda")
    chosen = choose_runtime(backbone, "auto", 10_000, None, tmp_path)
    assert (chosen.gpu_decodes, chosen.reads_by_processes, chosen.batch_size) == (True, False, 512)
    chosen.gpu_decodes = False
    assert (chosen.reads_by_processes, chosen.batch_size) == (True, 128)
    dlib = replace(find_backbone("dlib", "cpu"), device="cuda")
    assert not choose_runtime(dlib, "auto", 10_000, None, tmp_path).gpu_decodes
    apple = replace(backbone, device="mps")
    assert not choose_runtime(apple, "auto", 10_000, None, tmp_path).gpu_decodes


def test_a_decoded_jpeg_is_the_photograph():
    file = io.BytesIO()
    PHOTO.save(file, "JPEG", quality=95)
    (pixels,) = gpu_decoder.decode([file.getvalue()], "cpu")
    assert np.array_equal(photo_of(pixels), np.asarray(Image.open(file)))
