"""A word becomes a backbone: its crop, its size, its device; and the list of the words."""

import re

import pytest
import torch
from conftest import ROOT, run, run_here

from retrieval.backbones import backbone as backbones
from retrieval.backbones.backbone import choose_device, find_backbone, load_backbone
from retrieval.backbones.face_crop import FaceCrop
from retrieval.backbones.transform import Transform
from retrieval.backbones.zoo import PRETRAINED
from retrieval.errors import InputError, RunError


def test_crop_auto_is_what_the_word_is_for():
    assert load_backbone("dlib", "cpu").transform == FaceCrop("dlib", 150, 1 / 3, 0.08)
    assert load_backbone("dlib", "cpu", crop="none").transform == Transform(150, "bilinear")
    assert load_backbone("efficientnet_lite0", "cpu").transform == Transform(224, "bicubic")
    face = load_backbone("efficientnet_lite0", "cpu", crop="face")
    assert face.transform == FaceCrop("mtcnn", 224, 0.2, 0.08)
    assert face.transform.detects_faces


def test_size_margin_and_smallest_face_take_the_place_of_the_words_own(caplog):
    other = load_backbone("dlib", "cpu", image_size=120, face_margin=0.5, min_face_size=0.1)
    assert other.transform == FaceCrop("dlib", 120, 0.5, 0.1)
    whole = load_backbone("efficientnet_lite0", "cpu", image_size=96)
    assert whole.transform == Transform(96, "bicubic")
    assert not caplog.records
    load_backbone("efficientnet_lite0", "cpu", face_margin=0.0)
    assert "change nothing" in caplog.text


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("dlib", {"crop": "face"}, FaceCrop("dlib", 150, 1 / 3, 0.08)),
        ("dlib", {"crop": "align"}, FaceCrop("dlib", 150, 0.0, 0.08, "align")),
        ("dlib", {"detector": "mtcnn"}, FaceCrop("mtcnn", 150, 1 / 3, 0.08)),
        ("dlib", {"crop": "align", "detector": "mtcnn"}, FaceCrop("mtcnn", 150, 0.0, 0.08, "align")),
        ("dlib", {"crop": "loose"}, FaceCrop("dlib", 150, 0.5, 0.08, "loose")),
        (
            "efficientnet_lite0",
            {"crop": "loose", "face_margin": 0.3},
            FaceCrop("mtcnn", 224, 0.3, 0.08, "loose", "bicubic"),
        ),
        (
            "efficientnet_lite0",
            {"crop": "align", "image_size": 112, "min_face_size": 0.2},
            FaceCrop("mtcnn", 112, 0.0, 0.2, "align"),
        ),
        ("efficientnet_lite0", {"crop": "face", "detector": "dlib"}, FaceCrop("dlib", 224, 0.2, 0.08)),
    ],
)
def test_the_crop_and_the_detector_are_chosen_by_name(name, options, expected, caplog):
    assert find_backbone(name, "cpu", **options).transform == expected
    assert not caplog.records


@pytest.mark.parametrize(
    ("options", "warning"),
    [
        ({"crop": "none"}, "this is a face network, but --crop none lets it see whole images"),
        ({"crop": "none", "detector": "mtcnn"}, "--min_face_size and --detector change nothing"),
        ({"crop": "align", "face_margin": 0.3}, "--face_margin changes nothing"),
    ],
)
def test_what_changes_nothing_is_a_warning(options, warning, caplog):
    find_backbone("dlib", "cpu", **options)
    assert warning in caplog.text


def test_a_size_that_the_network_does_not_take_is_a_sentence(monkeypatch, tmp_path):
    import timm

    name = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    torch.save(timm.create_model(name).state_dict(), tmp_path / "w.pth")
    with pytest.raises(InputError, match="does not take images of 100 pixels"):
        load_backbone(f"timm:{name}", "cpu", weights=tmp_path / "w.pth", image_size=100)


def test_weights_that_give_no_numbers_are_a_sentence(tmp_path):
    network = load_backbone("dlib", "cpu").network
    with torch.no_grad():
        network.fc.weight.mul_(torch.nan)
    torch.save(network.state_dict(), tmp_path / "broken.pth")
    with pytest.raises(InputError, match="gives no numbers for a black image of 150 pixels"):
        load_backbone("dlib", "cpu", tmp_path / "broken.pth")


def test_weights_of_a_file_take_the_place_of_the_words_own(tmp_path):
    network = load_backbone("dlib", "cpu").network
    with torch.no_grad():
        network.fc.weight.mul_(2)
    torch.save(network.state_dict(), tmp_path / "tuned.pth")
    assert torch.equal(
        load_backbone("dlib", "cpu", tmp_path / "tuned.pth").network.fc.weight, network.fc.weight
    )
    with pytest.raises(InputError, match="does not hold the weights of EfficientNet-Lite0"):
        load_backbone("efficientnet_lite0", "cpu", tmp_path / "tuned.pth")


def test_a_detector_whose_package_is_missing_is_the_line_that_installs_it(monkeypatch):
    from retrieval import machine

    find = machine.find_spec
    monkeypatch.setattr(machine, "find_spec", lambda name: None if name == "dlib" else find(name))
    with pytest.raises(InputError, match="run `pip install dlib-bin`"):
        load_backbone("dlib", "cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("word", ["efficientnet_lite0", "efficientnet_lite1", "efficientnet_lite2", "dlib"])
def test_the_gpu_gives_the_same_vectors(word):
    size = PRETRAINED[word].transform.size
    images = torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8, generator=torch.manual_seed(0))
    with torch.inference_mode():
        here, there = (load_backbone(word, device).embed(images).cpu() for device in ("cpu", "cuda"))
    assert torch.nn.functional.cosine_similarity(here, there).min() >= 0.999


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("out of memory"), RuntimeError("MPS: out of memory")]
)
def test_a_device_without_room_is_a_sentence(monkeypatch, error):
    def full(*_, **__):
        raise error

    monkeypatch.setattr(torch.nn.Module, "to", full)
    with pytest.raises(RunError, match="cpu has no room for efficientnet_lite0"):
        load_backbone("efficientnet_lite0", "cpu")


def test_a_device_that_is_not_there_is_a_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device("auto") == "cpu"
    for name in ("cuda", "mps"):
        with pytest.raises(InputError, match="no such device"):
            choose_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(backbones, "ACCELERATORS", ())
    monkeypatch.setattr(backbones.sys, "platform", "linux")
    assert choose_device("auto") == "cpu"  # without asking torch, which takes a second
    monkeypatch.setattr(backbones, "ACCELERATORS", (__file__,))
    assert choose_device("auto") == "cuda"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["facenet", "clip:base"])  # the first also imports torchvision
def test_a_network_loads_while_readers_import_torch(tmp_path, name):
    """As in every first run: each thread may import torch, or a part of it, before the other has."""
    code = (
        "import sys, threading, time; from retrieval.backbones.backbone import find_backbone; "
        "lazy = find_backbone(sys.argv[1], 'cpu', sys.argv[2]); assert 'torch' not in sys.modules; "
        "threading.Thread(target=lambda: __import__('torch')).start(); time.sleep(0.05); lazy.load()"
    )
    torch.save({}, tmp_path / "w.pth")
    ended = run("-c", code, name, tmp_path / "w.pth", cwd=ROOT)
    assert "holds no weights" in ended.stderr  # read by torch, once the network was built


# ---- the list of the words


@pytest.mark.slow
def test_the_list_has_a_line_for_each_name(tmp_path):
    ended = run("-m", "retrieval.backbones", cwd=tmp_path, TORCH_HOME=str(tmp_path), HF_HOME=str(tmp_path))
    assert ended.returncode == 0, ended.stderr
    lines = {line.split()[0]: re.split(r"  +", line) for line in ended.stdout.splitlines()}
    assert list(lines)[: 1 + len(PRETRAINED)] == ["name", *PRETRAINED]
    seen = ["aligned face, 150 px", "128-d", "5.6", "0.27", "here, 22 MB", "faces", "public domain"]
    assert lines["dlib"][1:] == seen
    assert lines["arcface"][5:] == ["to fetch", "faces", "research only"]
    one = run_here("-m", "retrieval.backbones", "dlib", cwd=tmp_path)
    assert one.stdout.splitlines()[1].startswith("dlib ")
    assert "resnet50" not in one.stdout


@pytest.mark.slow
def test_fetch_says_where_the_weights_lie(tmp_path):
    ended = run_here("-m", "retrieval.backbones", "--fetch", "dlib", "efficientnet_lite1", cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert "dlib: " in ended.stdout
    assert "efficientnet-lite1-77cc7160.pth" in ended.stdout
    detector = "--detector", "scrfd"
    offline = {"HF_HOME": str(tmp_path), "HTTPS_PROXY": "http://127.0.0.1:9"}
    gone = run_here("-m", "retrieval.backbones", "--fetch", "dlib", *detector, cwd=tmp_path, **offline)
    assert gone.returncode == 1
    assert "buffalo_l/snapshots/main/detection/model.onnx" in gone.stderr
    wrong = run_here("-m", "retrieval.backbones", "--fetch", "simcrl", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "error: the argument is 'simcrl': there is no such backbone; did you mean simclr?" in wrong.stderr
    proxy = "http://127.0.0.1:9"  # no network, at once
    there = {"cwd": tmp_path, "TORCH_HOME": str(tmp_path), "https_proxy": proxy, "HTTPS_PROXY": proxy}
    gone = run_here("-m", "retrieval.backbones", "--fetch", "resnet50", "dlib", **there)
    assert gone.returncode == 1
    assert "dlib: " in gone.stdout  # all the same
    assert "resnet50-11ad3fa6.pth could not be downloaded" in gone.stderr
    assert f"put it at {tmp_path}/hub/checkpoints/resnet50-11ad3fa6.pth" in gone.stderr
    assert "Traceback" not in gone.stderr
