"""What a GPU decodes, played by the CPU: torchvision's decoder does the same there."""

import hashlib
import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import by_torch
from photographs import face_photograph, photo_of
from PIL import Image
from sklearn.datasets import load_sample_images

import retrieval.embedding.embed as embedding
from get_images import find_images
from retrieval.backbones.backbone import Backbone, LazyBackbone, find_backbone, place
from retrieval.backbones.face_crop import FaceCrop
from retrieval.backbones.mtcnn import cut_faces, find_faces
from retrieval.backbones.transform import Transform
from retrieval.embedding import gpu_decoder
from retrieval.embedding.cache import Cache
from retrieval.embedding.embed import embed
from retrieval.embedding.loader import Reader, plain_jpeg
from retrieval.embedding.onnx_runtime import NetworkFiles
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
    assert found.unreadable == expected.unreadable == ["9.jpg"]
    assert found.damaged == expected.damaged == ["8.jpg"]
    assert (found.vectors[:9] * expected.vectors[:9]).sum(1).min() > 0.9999
    assert not np.array_equal(found.vectors, expected.vectors)  # it rounds once more
    assert "9.jpg in the images could not be embedded" in caplog.text


def test_only_plain_jpegs_are_left_to_the_gpu(photographs, tmp_path):
    batch = Reader(Transform(32, "bicubic"), leave_jpegs=True).read_group(photographs)
    assert batch.names == [file.name for file in photographs[:9]]
    assert list(batch.jpegs) == [0, 1, 2, 3, 4, 5]
    assert batch.pixels.shape == (3, 3, 32, 32)
    kinds = {"CMYK": PHOTO.convert("CMYK"), "rgb": PHOTO, "grey": PHOTO.convert("L")}
    for name, image in kinds.items():
        image.save(tmp_path / name, "JPEG", keep_rgb=name == "rgb")
    assert {name: bool(plain_jpeg((tmp_path / name).read_bytes())) for name in kinds} == {
        "CMYK": False, "rgb": False, "grey": True}  # fmt: skip


def test_a_file_that_the_gpu_refuses_is_decoded_by_the_cpu(photographs, monkeypatch):
    refused = photographs[3].path.read_bytes()

    def decode(jpegs, device, decode=gpu_decoder.decode):
        if refused in jpegs:
            raise RuntimeError("Failed to decode jpeg stream: 2")
        return decode(jpegs, device)

    transform = Transform(32, "bicubic")
    by_gpu = Reader(transform, leave_jpegs=True).read_group(photographs)
    by_cpu = Reader(transform).read_group(photographs)
    monkeypatch.setattr(gpu_decoder, "PIXELS", 4 * 300 * 250)
    monkeypatch.setattr(gpu_decoder, "decode", decode)
    photographs[3].path.write_bytes(b"changed meanwhile")  # the bytes that were read count
    assert gpu_decoder.decode_on_gpu(by_gpu, transform, "cpu") == 5
    assert by_gpu.names == by_cpu.names
    assert by_gpu.digests == by_cpu.digests
    assert by_gpu.digests["3.jpg"] == hashlib.sha256(refused).digest()
    assert np.abs(by_gpu.pixels.numpy().astype(int) - by_cpu.pixels).max() <= 1


def test_what_neither_the_gpu_nor_the_cpu_can_decode_is_unreadable(photographs, monkeypatch):
    def decode(jpegs, device):
        raise RuntimeError("Failed to decode jpeg stream: 2")

    monkeypatch.setattr(gpu_decoder, "decode", decode)
    content = photographs[3].path.read_bytes()
    photographs[3].path.write_bytes(content[: content.index(b"\xff\xda")] + b"\xff\xd9")  # no scan
    transform = Transform(32, "bicubic")
    by_gpu = Reader(transform, leave_jpegs=True).read_group(photographs)
    assert "3.jpg" in by_gpu.names
    assert gpu_decoder.decode_on_gpu(by_gpu, transform, "cpu") == 0
    assert by_gpu.names == [f"{n}.{'png' if n == 6 else 'jpg'}" for n in (0, 1, 2, 4, 5, 6, 7, 8)]
    assert by_gpu.unreadable["3.jpg"]


def test_a_jpeg_that_the_gpu_refuses_and_that_decodes_in_part_is_damaged(photographs, monkeypatch):
    def decode(jpegs, device):
        raise RuntimeError("Failed to decode jpeg stream: 2")

    monkeypatch.setattr(gpu_decoder, "decode", decode)
    monkeypatch.setattr(gpu_decoder, "Reader", lambda transform: Cut(transform))

    class Cut(Reader):
        def read(self, content):
            return super().read(content[: len(content) // 2])

    transform = Transform(32, "bicubic")
    by_gpu = Reader(transform, leave_jpegs=True).read_group(photographs)
    gpu_decoder.decode_on_gpu(by_gpu, transform, "cpu")
    assert list(by_gpu.damaged) == ["8.jpg", *(f"{number}.jpg" for number in range(6))]
    assert len(by_gpu.pixels) == 9


@pytest.mark.parametrize("why", ["no decoder", "other vectors"])
def test_where_the_gpu_does_not_keep_the_vectors_the_cpu_decodes(photographs, monkeypatch, caplog, why):
    def decode(jpegs, device):
        if why == "no decoder":
            raise NotImplementedError("Could not run 'image::decode_jpegs_cuda'")
        return [torch.zeros(3, 30, 40, dtype=torch.uint8)] * len(jpegs)

    caplog.set_level("INFO")
    monkeypatch.setattr(gpu_decoder, "decode", decode)
    runtime = runtime_of(Mean(), Transform(32, "bicubic"), photographs, decodes=None)
    found = embed(photographs, runtime)
    assert runtime.gpu_decodes is False
    expected = runtime_of(Mean(), Transform(32, "bicubic"), photographs, decodes=False)
    assert np.array_equal(found.vectors, embed(photographs, expected).vectors)
    assert "the CPU decodes JPEGs" in caplog.text


def test_what_a_run_finds_out_is_kept_for_the_next(photographs, tmp_path):
    """Else the second run would load the network to know under which key its vectors are."""
    runtime = runtime_of(Mean(), Transform(32, "bicubic"), photographs, decodes=None)
    runtime.files = NetworkFiles(tmp_path, b"a network")
    runtime.settle(photographs)
    assert runtime.gpu_decodes is True
    backbone = LazyBackbone("toy", Transform(32, "bicubic"), "cuda", b"a network", pytest.fail)
    again = choose_runtime(backbone, "auto", 10, None, tmp_path)
    assert again.gpu_decodes is True
    assert choose_runtime(backbone, "auto", 10, None, tmp_path / "other").gpu_decodes is None


def test_a_folder_without_jpegs_needs_no_answer(photographs, tmp_path):
    pngs = photographs[6:7]
    first = embed(pngs, runtime_of(Mean(), Transform(32, "bicubic"), pngs, None), cache=Cache(tmp_path / "c"))
    again = runtime_of(Mean(), Transform(32, "bicubic"), pngs, None)
    assert np.array_equal(embed(pngs, again, cache=Cache(tmp_path / "c")).vectors, first.vectors)
    assert again.gpu_decodes is None  # the network was not loaded


@pytest.mark.parametrize("jpeg_bytes", [2**27, 1])
def test_small_groups_are_joined_to_batches(photographs, monkeypatch, jpeg_bytes):
    monkeypatch.setattr(embedding, "FILES", 2)
    monkeypatch.setattr(embedding, "JPEG_BYTES", jpeg_bytes)
    sizes = []

    class Counting(Mean):
        def forward(self, images):
            sizes.append(int((images > -1).any(dim=(1, 2, 3)).sum()))  # the others fill the batch up
            return super().forward(images)

    runtime = runtime_of(Counting(), Transform(32, "bicubic"), photographs, batch=5)
    runtime.settle(photographs)
    sizes.clear()
    found = embed(photographs, runtime)
    assert sizes == ([4, 5] if jpeg_bytes > 1 else [2, 2, 2, 3])
    assert (found.unreadable, found.damaged) == (["9.jpg"], ["8.jpg"])


def test_the_cache_keeps_the_two_apart(photographs, tmp_path):
    runs = [runtime_of(Mean(), Transform(32, "bicubic"), photographs, decodes) for decodes in (True, False)]
    first, second = (embed(photographs, run, cache=Cache(tmp_path / "cache")) for run in runs)
    assert not np.array_equal(first.vectors, second.vectors)
    again = runtime_of(Mean(), Transform(32, "bicubic"), photographs)
    assert np.array_equal(embed(photographs, again, cache=Cache(tmp_path / "cache")).vectors, first.vectors)


@pytest.mark.parametrize("method", ["face", "align", "loose"])
def test_faces_are_found_and_cut_on_the_gpu(tmp_path, method):
    for number, name in enumerate(["hopper", "collins", "hopper"]):
        image = Image.fromarray(photo_of(face_photograph(name)))
        image.resize((300 + number, 300)).save(tmp_path / f"{number}.jpg", quality=95)
    Image.new("RGB", (200, 100), "green").save(tmp_path / "3.jpg")
    files = find_images(tmp_path)
    crop = FaceCrop("mtcnn", 80, 0.1, 0.08, method)
    assert gpu_decoder.can_decode(crop)
    assert not gpu_decoder.can_decode(replace(crop, detector="scrfd"))
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
    gpu_decoder._library.cache_clear()
    try:
        assert gpu_decoder.decode([b"a", b"b"], "cpu") == [(b"a", "RGB", "cpu"), (b"b", "RGB", "cpu")]
    finally:
        gpu_decoder._library.cache_clear()


def test_a_gpu_decodes_by_default_what_it_can(tmp_path):
    backbone = replace(find_backbone("efficientnet_lite0", "cpu"), device="cuda")
    chosen = choose_runtime(backbone, "auto", 10_000, None, tmp_path)
    assert chosen.gpu_decodes is None  # it will find out
    chosen.gpu_decodes = True
    assert chosen.batch_size == 512
    chosen.gpu_decodes = False
    assert (chosen.reads_by_processes, chosen.batch_size) == (True, 128)
    assert not choose_runtime(backbone, "auto", 1000, None, tmp_path).reads_by_processes
    dlib = replace(find_backbone("dlib", "cpu"), device="cuda")
    assert choose_runtime(dlib, "auto", 10_000, None, tmp_path).gpu_decodes is False
    apple = replace(backbone, device="mps")
    assert choose_runtime(apple, "auto", 10_000, None, tmp_path).gpu_decodes is False


def test_a_decoded_jpeg_is_the_photograph():
    file = io.BytesIO()
    PHOTO.save(file, "JPEG", quality=95)
    (pixels,) = gpu_decoder.decode([file.getvalue()], "cpu")
    assert np.array_equal(photo_of(pixels), np.asarray(Image.open(file)))


# ---- on a GPU -------------------------------------------------------------------------------------

ON_A_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@ON_A_GPU
def test_decoding_ahead_touches_nothing_that_the_network_still_reads(tmp_path):
    """Batches of mixed shapes through a slow network, beside the same with a wait after every step."""
    from torchvision.models import resnet50

    for number in range(240):
        side = 200 + 40 * (number % 7)
        PHOTO.resize((side, 240)).rotate(number).save(tmp_path / f"{number:03d}.jpg", quality=90)
    files, transform = find_images(tmp_path), Transform(224, "bilinear")
    torch.manual_seed(0)
    network = torch.nn.Sequential(*[torch.nn.Conv2d(3, 3, 7, padding=3) for _ in range(40)], resnet50())
    backbone = place(Backbone(network, 0, transform, (0.5,) * 3, (0.5,) * 3, "slow", "cuda"))
    lazy = LazyBackbone("slow", transform, "cuda", b"", lambda: backbone)
    runtime = choose_runtime(lazy, "torch", len(files), 24, None)
    runtime.settle(files)
    assert runtime.gpu_decodes
    found = embed(files, runtime).vectors
    expected = []
    for start in range(0, len(files), 24):
        batch = Reader(transform, leave_jpegs=True).read_group(files[start : start + 24])
        torch.cuda.synchronize()
        assert gpu_decoder.decode_on_gpu(batch, transform, "cuda") == 24
        torch.cuda.synchronize()
        features = runtime.embed(batch.pixels)
        expected.append(features / np.linalg.norm(features, axis=1, keepdims=True))
    assert np.array_equal(found, np.concatenate(expected))


@ON_A_GPU
@pytest.mark.parametrize(
    ("longest", "bound"),
    # A longer side than 500 pixels is shortened on the device, where a GPU rounds some ties the other way;
    # one pixel in a hundred a grey level brighter moves a box by as much on the CPU.
    [(500, 0.01), (700, 0.05)],
)
def test_a_gpu_finds_the_faces_of_the_cpu(longest, bound):
    photos = [face_photograph(name)[:, :longest, :longest] for name in ("hopper", "collins")]
    here, there = find_faces(photos, 0.08), find_faces([photo.cuda() for photo in photos], 0.08)
    for boxes, others in zip(here, there, strict=True):
        assert np.abs(boxes - others).max() < bound
    first = np.array([faces[0, :4] for faces in here])
    cuts = [cut_faces([photo.to(device) for photo in photos], first, 160, 0.1) for device in ("cpu", "cuda")]
    assert (cuts[0].int() - cuts[1].cpu().int()).abs().max() <= 1


@ON_A_GPU
@pytest.mark.parametrize("kind", ["CMYK", "cut", "empty"])
def test_what_nvjpeg_refuses_is_decoded_by_the_cpu(photographs, kind):
    if kind == "CMYK":
        PHOTO.convert("CMYK").save(photographs[2].path)
    elif kind == "cut":
        photographs[2].path.write_bytes(photographs[2].path.read_bytes()[:-2])
    else:  # its scan ends at once
        content = photographs[2].path.read_bytes()
        photographs[2].path.write_bytes(content[: content.index(b"\xff\xda")] + b"\xff\xd9")
    transform = Transform(32, "bicubic")
    by_gpu = Reader(transform, leave_jpegs=True).read_group(photographs)
    by_cpu = Reader(transform).read_group(photographs)
    gpu_decoder.decode_on_gpu(by_gpu, transform, "cuda")
    assert set(by_cpu.names) <= set(by_gpu.names)
    kept = [row for row, name in enumerate(by_gpu.names) if name in by_cpu.names]
    assert np.abs(by_gpu.pixels.cpu().numpy()[kept].astype(int) - by_cpu.pixels).mean() < 2
