"""ONNX Runtime beside the network itself: the same vectors, to the bit in every batch, or torch, and said."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import by_torch
from torch import nn

from get_images import find_images
from retrieval.backbones.backbone import Backbone, LazyBackbone, find_backbone, place
from retrieval.backbones.fine_tuned import Joined
from retrieval.backbones.transform import Transform
from retrieval.embedding import onnx_runtime, runtime, torch_runtime
from retrieval.embedding.embed import embed
from retrieval.embedding.runtime import BREAK_EVEN, ONNX, TORCH, choose_runtime
from retrieval.errors import InputError


class Small(nn.Module):
    """A convolution and a mean."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, images):
        return self.conv(images).relu().mean((2, 3))


class Untraceable(Small):
    def forward(self, images):
        return torch.special.bessel_j0(super().forward(images))


def lazy(network, key=b"1" * 32):
    backbone = place(Backbone(network, 0, Transform(16, "bicubic"), (0.5,) * 3, (0.5,) * 3, "small"))
    return LazyBackbone("small", backbone.transform, "cpu", key, lambda: backbone)


def images(count, size=16):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator).numpy()


def settled(backbone, folder, asked=ONNX, count=1000):
    chosen = choose_runtime(backbone, asked, count, 32, folder)
    chosen.settle()
    return chosen


def random_facenet(file):
    from facenet_pytorch import InceptionResnetV1

    return InceptionResnetV1(classify=False)


def random_resnet50(file):
    from torchvision.models import resnet50

    network = resnet50()
    network.fc = nn.Identity()
    return network


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lite0", "dlib", "resnet50", "facenet", "joined"])
def test_the_networks_give_the_same_in_onnx_runtime_and_the_same_bits_in_every_batch(kind, tmp_path):
    if kind in ("lite0", "dlib"):
        name, size = {"lite0": ("efficientnet_lite0", 96), "dlib": ("dlib", None)}[kind]
        found = find_backbone(name, "cpu", image_size=size)
    elif kind == "joined":
        found = lazy(Joined(Small(), Small(), 2.0, 12))
    else:
        size, build = (96, random_facenet) if kind == "facenet" else (64, random_resnet50)
        torch.manual_seed(0)
        backbone = place(Backbone(build(None), 0, Transform(size, "bilinear"), (0.5,) * 3, (0.5,) * 3, kind))
        found = LazyBackbone(kind, backbone.transform, "cpu", b"2" * 32, lambda: backbone)
    chosen = settled(found, tmp_path)
    assert chosen.name == ONNX
    seen = images(7, found.transform.size)
    together = chosen.embed(seen)
    with torch.inference_mode():
        plain = found.load().embed(torch.from_numpy(seen)).numpy()
    cosines = (together * plain).sum(1) / np.linalg.norm(together, axis=1) / np.linalg.norm(plain, axis=1)
    assert cosines.min() > 0.99999
    order = [3, 0, 6, 1, 5, 2, 4]
    assert np.array_equal(np.concatenate([chosen.embed(seen[[row]]) for row in order]), together[order])


def test_the_exported_network_is_found_again_without_torch_or_the_weights(tmp_path):
    first = settled(lazy(Small()), tmp_path)

    def load():
        raise AssertionError("the network was loaded")

    again = settled(replace(lazy(Small()), load=load), tmp_path, "auto", 1)
    assert again.name == ONNX
    assert np.array_equal(again.embed(images(5)), first.embed(images(5)))
    settled(lazy(Small(), b"3" * 32), tmp_path)
    assert len(list((tmp_path / "networks").glob("*.onnx"))) == 2


@pytest.mark.parametrize(
    ("asked", "before", "sentences"),
    [
        (ONNX, [], ["loading small and exporting it for ONNX Runtime, once: some seconds"]),
        (TORCH, [], ["loading small: some seconds"]),
        (ONNX, [ONNX], []),  # the export of an earlier run takes no second
    ],
)
def test_a_line_comes_before_the_seconds_in_which_a_network_is_loaded(
    tmp_path, caplog, asked, before, sentences
):
    for engine in before:
        settled(lazy(Small()), tmp_path, engine)
    caplog.set_level("INFO", "retrieval.runtime")
    caplog.clear()
    settled(lazy(Small()), tmp_path, asked)
    assert caplog.messages == sentences


def test_small_folders_do_not_pay_for_the_export(tmp_path):
    backbone = lazy(Small())
    assert choose_runtime(backbone, "auto", BREAK_EVEN - 1, 32, tmp_path).name == TORCH
    assert choose_runtime(backbone, "auto", BREAK_EVEN, 32, tmp_path).name == ONNX
    assert choose_runtime(backbone, "torch", 10**6, 32, tmp_path).name == TORCH
    assert choose_runtime(replace(backbone, device="cuda"), "auto", 10**6, 32, tmp_path).name == TORCH


def test_onnx_runtime_where_it_cannot_be_is_a_sentence(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="give --device cpu with it"):
        choose_runtime(replace(lazy(Small()), device="cuda"), "onnx", 10, 32, tmp_path)
    from retrieval import machine

    monkeypatch.setattr(machine, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install onnxruntime"):
        choose_runtime(lazy(Small()), "onnx", 10, 32, tmp_path)


def test_a_network_that_cannot_be_exported_is_run_by_torch_and_not_tried_again(tmp_path, caplog):
    backbone = lazy(Untraceable())
    chosen = settled(backbone, tmp_path, "auto")
    assert chosen.name == TORCH
    assert "small is run by torch, not by ONNX Runtime: " in caplog.text
    with torch.inference_mode():
        assert np.allclose(
            chosen.embed(images(3)), backbone.load().embed(torch.from_numpy(images(3))), atol=1e-6
        )
    assert choose_runtime(backbone, "auto", 10**6, 32, tmp_path).name == TORCH
    assert choose_runtime(backbone, ONNX, 10**6, 32, tmp_path).name == TORCH
    assert caplog.text.count("small is run by torch") == 3  # each run says so
    assert choose_runtime(backbone, "auto", 10, 32, tmp_path).name == TORCH
    assert caplog.text.count("small is run by torch") == 3  # here torch is the choice


def test_an_export_that_gives_other_vectors_is_refused(tmp_path, caplog, monkeypatch):
    other = Small()
    with torch.no_grad():
        other.conv.weight[0, 0] += 0.05
    wrong = onnx_runtime.export(lazy(other).load())
    monkeypatch.setattr(onnx_runtime, "export", lambda backbone: wrong)
    assert settled(lazy(Small()), tmp_path).name == TORCH
    assert "its vectors are others, cosine 0.9" in caplog.text
    assert not list(tmp_path.rglob("*.onnx"))


def test_a_broken_file_is_exported_again(tmp_path, caplog):
    right = settled(lazy(Small()), tmp_path).embed(images(3))
    (file,) = tmp_path.rglob("*.onnx")
    content = file.read_bytes()
    file.write_bytes(content[:100])
    assert np.array_equal(settled(lazy(Small()), tmp_path).embed(images(3)), right)
    assert "1.onnx is not used, but made again: it is not as it was written" in caplog.text
    assert file.read_bytes() == content


@pytest.mark.parametrize("kind", ["flipped", "planted", "of another network", "without its digest"])
def test_a_network_in_the_cache_that_was_changed_is_exported_again(tmp_path, caplog, kind):
    right = settled(lazy(Small()), tmp_path).embed(images(3))
    (file,) = tmp_path.rglob("*.onnx")
    content = file.read_bytes()
    other = Small()
    with torch.no_grad():
        other.conv.weight[0, 0] += 0.05
    if kind == "flipped":  # in the weights: it still runs
        at = content.index(lazy(Small()).load().network.conv.weight.detach().numpy().tobytes()) + 3
        changed = content[:at] + bytes([content[at] ^ 0x40]) + content[at + 1 :]
    elif kind == "of another network":
        settled(lazy(other, b"4" * 32), tmp_path)
        changed = next(path for path in file.parent.iterdir() if path != file).read_bytes()
    else:
        exported = onnx_runtime.export(lazy(other).load())
        changed = content.partition(b"\n")[0] + b"\n" + exported if kind == "planted" else exported
    file.write_bytes(changed)
    assert np.array_equal(settled(lazy(Small()), tmp_path).embed(images(3)), right)
    assert "not as it was written" in caplog.text
    assert file.read_bytes() == content


def test_a_refusal_that_is_no_text_is_tried_again(tmp_path, caplog):
    settled(lazy(Untraceable()), tmp_path)
    (file,) = tmp_path.rglob("*.refused")
    file.write_bytes(b"\xff\xfe no UTF-8")
    assert choose_runtime(lazy(Small()), ONNX, 10, 32, tmp_path).name == ONNX
    assert "1.refused is not used, but made again" in caplog.text


def test_a_folder_that_cannot_be_written_costs_the_next_run_an_export(tmp_path, caplog):
    (tmp_path / "networks").write_text("in the way")
    assert settled(lazy(Small()), tmp_path).name == ONNX
    assert "the next run makes it again" in caplog.text


def test_a_want_of_memory_is_tried_again_by_the_next_run(tmp_path, caplog, monkeypatch):
    def full(backbone):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 10 bytes")

    with monkeypatch.context() as patch:
        patch.setattr(onnx_runtime, "export", full)
        assert settled(lazy(Small()), tmp_path).name == TORCH
    assert "can't allocate memory: you tried to allocate 10 bytes; the next run tries again" in caplog.text
    assert settled(lazy(Small()), tmp_path, "auto").name == ONNX


def test_of_several_processes_one_that_cannot_makes_all_use_torch(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(runtime.distributed, "all_agree", lambda yes: asked.append(yes))
    monkeypatch.setattr(runtime.distributed, "all_gather", lambda value: asked.append(value) or [value])
    assert settled(lazy(Small()), tmp_path).name == TORCH
    assert asked == [True, False, torch_runtime.FULL]  # ONNX Runtime, the GPU's decoder, and the precision
    assert settled(lazy(Small()), tmp_path, "torch").name == TORCH
    assert asked[3:] == [
        False,
        False,
        torch_runtime.FULL,
    ]  # it is asked whatever it has chosen: none waits for ever


def test_both_engines_rank_real_images_alike(few, backbone, tmp_path):
    files = find_images(few / "gallery")
    found = find_backbone("efficientnet_lite0", "cpu")
    fast = embed(files, choose_runtime(found, ONNX, len(files), 32, tmp_path))
    plain = embed(files, by_torch(backbone, 32))
    assert (fast.vectors * plain.vectors).sum(1).min() > 0.99999
    alone = embed(files[5:6], choose_runtime(found, ONNX, 1, 32, tmp_path))
    assert np.array_equal(alone.vectors[0], fast.vectors[5])


def test_torch_gives_the_same_bits_in_every_batch_of_one_size():
    chosen = by_torch(lazy(Small()).load(), 8)
    chosen.settle()
    together = chosen.embed(images(8))
    assert np.array_equal(chosen.embed(images(3)), together[:3])


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_is_used_only_where_the_vectors_stay_the_same(half, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(torch_runtime, "half_type", lambda: half)  # what a GPU has, whatever this machine has
    small = lazy(Small()).load()
    assert torch_runtime.fastest_precision(small, images(4)) == torch_runtime.CAST
    cast = torch_runtime.with_precision(small, torch_runtime.CAST)
    assert small.network.conv.weight.dtype == torch.float32  # it stays as it is
    seen = torch_runtime.embed_plainly(cast, images(4))
    assert not np.array_equal(seen, torch_runtime.embed_plainly(small, images(4)))
    assert torch_runtime.least_cosine(seen, torch_runtime.embed_plainly(small, images(4))) > 0.999

    class Mixed(Small):
        """Multiplies its features by numbers in full precision, which autocast alone allows."""

        def forward(self, pixels):
            return nn.functional.linear(super().forward(pixels), torch.eye(8))

    assert torch_runtime.fastest_precision(lazy(Mixed()).load(), images(4)) == torch_runtime.AUTOCAST

    class Fine(Small):
        """What it tells apart lies below the digits of half precision."""

        def forward(self, pixels):
            features = super().forward(pixels)
            return nn.functional.linear(features + 100, torch.eye(8)) - 100

    assert torch_runtime.fastest_precision(lazy(Fine()).load(), images(4)) == torch_runtime.FULL
    assert "needs full precision" in caplog.text


def test_on_a_gpu_the_key_names_its_half_precision(monkeypatch, tmp_path):
    keys = {choose_runtime(lazy(Small()), "torch", 10, 32, tmp_path).key}
    for half in (torch.float16, torch.bfloat16):
        monkeypatch.setattr(runtime, "half_type", lambda half=half: half)
        keys.add(choose_runtime(replace(lazy(Small()), device="cuda"), "auto", 10, 32, tmp_path).key)
    assert len(keys) == 3
