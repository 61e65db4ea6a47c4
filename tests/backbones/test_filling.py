"""Checkpoints of every layout, good and bad: the network is filled, or a sentence says why not."""

import argparse

import pytest
import timm
import torch
from torch import nn
from torchvision.models import resnet18

from retrieval.backbones.backbone import load_backbone
from retrieval.backbones.filling import load_weights, read_checkpoint
from retrieval.backbones.networks import resnet_name_in_torchvision
from retrieval.errors import InputError


def small_resnet():
    network = resnet18(weights=None)
    network.fc = nn.Identity()
    return network.eval()


@pytest.fixture(scope="module")
def trained():
    """The state dict of a network whose every tensor differs from a new one's."""
    torch.manual_seed(1)
    network = small_resnet()
    with torch.no_grad():
        for tensor in network.state_dict().values():
            tensor.copy_(torch.rand(tensor.shape).mul(10).to(tensor.dtype))
    return network.state_dict()


def before(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def numbered(state):
    """As lightly's nn.Sequential over the children of a ResNet."""
    children = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}
    parts = {name: name.split(".", 1) for name in state}
    return {f"{children[first]}.{rest}": state[name] for name, (first, rest) in parts.items()}


def zeros(state):
    return {name: torch.zeros_like(tensor) for name, tensor in state.items()}


FC = {"fc.weight": torch.ones(5, 512), "fc.bias": torch.ones(5)}
PROJECTION = {"projection_head.layers.0.weight": torch.ones(3, 512)}
ONE = torch.ones(1)
ONLINE = {"online_classifier.linear.weight": torch.ones(5, 512)}
HEAD = {"head.0.weight": torch.ones(3, 512)}
LAYOUTS = {
    "plain": lambda s: s,
    "with a classifier": lambda s: s | FC,
    "DataParallel": lambda s: before("module.", s | FC),
    "the converted SimCLR": lambda s: {"state_dict": s | FC},
    "PyTorch's tutorial": lambda s: {"model_state_dict": s, "epoch": 3, "loss": 0.5},
    "SupContrast": lambda s: {
        "opt": argparse.Namespace(learning_rate=0.05),
        "model": before("encoder.", {n.replace("downsample", "shortcut"): s[n] for n in s}) | HEAD,
        "optimizer": {"state": {}},
        "epoch": 7,
    },
    "SupContrast on many GPUs": lambda s: {"model": before("encoder.module.", s) | HEAD},
    "lightly": lambda s: {"state_dict": before("backbone.", numbered(s)) | PROJECTION, "epoch": 9},
    "lightly's benchmarks": lambda s: {"state_dict": before("backbone.", s) | ONLINE},
    "nested": lambda s: {"model": {"state_dict": s}, "opt": 1},
    "Lightning": lambda s: {"state_dict": before("model.", s), "pytorch-lightning_version": "2.5"},
    "torch.compile": lambda s: before("_orig_mod.", s),
    "DDP inside torch.compile": lambda s: {"net": before("_orig_mod.module.", s)},
    "torch.compile inside DDP": lambda s: {"weights": before("module._orig_mod.", s)},
    "compiled blocks": lambda s: {name.replace("layer1.", "layer1._orig_mod."): s[name] for name in s},
    "MoCo": lambda s: {
        "arch": "resnet18",
        "state_dict": before("module.encoder_q.", s | FC)
        | before("module.encoder_k.", zeros(s) | FC)
        | {"module.queue": torch.ones(8, 4), "module.queue_ptr": ONE},
    },
    "MoCo v3": lambda s: {
        "state_dict": before("module.momentum_encoder.", zeros(s)) | before("module.base_encoder.", s)
    },
    "BYOL": lambda s: {"state_dict": before("backbone.", s) | before("momentum_backbone.", zeros(s))},
    "DINO": lambda s: {
        "student": before("module.backbone.", zeros(s)) | {"module.head.mlp.0.weight": ONE},
        "teacher": before("backbone.", s) | {"head.mlp.0.weight": ONE},
        "optimizer": {"state": {0: {"exp_avg": next(iter(s.values()))}}, "param_groups": []},
        "dino_loss": {"center": torch.ones(1, 4)},
    },
    "timm's average": lambda s: {"state_dict": zeros(s), "state_dict_ema": s, "epoch": 3},
    "DeiT's average": lambda s: {"model": zeros(s), "model_ema": s},
    "an average of the parameters alone": lambda s: {
        "model": s,
        "ema": {n: t for n, t in zeros(s).items() if "running" not in n},
    },
    "averaged by torch": lambda s: {"n_averaged": ONE, **before("module.", s)},
    "a network beside its parts": lambda s: {"backbone": s, "head": {"weight": ONE}, "loss": {"weight": ONE}},
    "in four holders": lambda s: {"weights": {"teacher": {"encoder": {"model": before("net.", s)}}}},
    "with numbers for keys": lambda s: {"state_dict": s, 3: {"x": ONE}},
    "an old file without counters": lambda s: {n: t for n, t in s.items() if "num_batches" not in n},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_known_layout_fills_every_place(tmp_path, trained, layout):
    torch.save(LAYOUTS[layout](trained), tmp_path / "weights.pth")
    network = small_resnet()
    load_weights(network, tmp_path / "weights.pth", "Toy", resnet_name_in_torchvision)
    for name, tensor in network.state_dict().items():
        if layout != "an old file without counters" or "num_batches" not in name:
            assert torch.equal(tensor, trained[name]), name


def test_a_head_is_left_out_and_said(tmp_path, trained, caplog):
    torch.save(trained | FC, tmp_path / "weights.pth")
    with caplog.at_level("INFO", logger="retrieval"):
        load_weights(small_resnet(), tmp_path / "weights.pth", "Toy")
    assert "left out" in caplog.text
    assert ": fc, " in caplog.text


PARAMETER = nn.Parameter(torch.ones(2))
PARAMETER.grad = torch.ones(2)
SGD = torch.optim.SGD([PARAMETER], momentum=0.9)
SGD.step()


@pytest.mark.parametrize(
    ("state", "problem"),
    [
        (FC, "holds only a classifier .fc.: give the weights of its backbone"),
        ({"model": FC}, "holds only a classifier"),
        ({"recipe": {}, "network": {}}, "run `python model_fine_tuned.py --weights .*weights.pth`"),
        ({"epoch": 3, "best": 0.5}, "holds no weights, but epoch: int, best: float: save the network's"),
        (
            {"conv1.weight": ONE, "best": 0.5},
            r"Toy: conv1.weight has shape \(1,\) instead of \(64, 3, 7, 7\); bn1.weight is missing",
        ),
        ({"teacher": {"backbone.a": ONE}}, r"Toy under teacher\.backbone: .* the first is a \(1,\), and"),
        ({}, "holds no weights, but nothing"),
        ([1, 2], "holds no weights, but a list"),
        (SGD.state_dict(), "holds no weights, but the state of an optimiser"),
        ({"optimizer": SGD.state_dict()}, "holds no weights, but optimizer: dict"),
        (small_resnet(), "holds a Python object .torchvision.models.resnet.ResNet.*not loaded"),
    ],
)
def test_a_checkpoint_of_another_kind_is_a_sentence(tmp_path, state, problem):
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(InputError, match=problem):
        load_weights(small_resnet(), tmp_path / "weights.pth", "Toy")


def test_weights_that_do_not_fit_are_refused(tmp_path):
    network = nn.Linear(2, 3)
    good = {"weight": torch.ones(3, 2), "bias": torch.ones(3)}
    wrong = {
        "bias is missing": {"weight": good["weight"]},
        "extra has no place": good | {"extra": torch.ones(1)},
        r"weight has shape \(2, 3\) instead of \(3, 2\)": good | {"weight": torch.ones(2, 3)},
    }
    for problem, state in wrong.items():
        torch.save(state, tmp_path / "weights.pth")
        with pytest.raises(InputError, match=problem):
            load_weights(network, tmp_path / "weights.pth", "Toy")
    torch.save(good, tmp_path / "weights.pth")
    with pytest.raises(InputError, match="1 tensors share a name"):
        load_weights(network, tmp_path / "weights.pth", "Toy", lambda name: "bias")
    load_weights(network, tmp_path / "weights.pth", "Toy")
    assert torch.equal(network.weight, good["weight"])


def test_a_refused_file_names_the_place_and_the_first_key_that_does_not_fit(tmp_path, trained):
    good, file = before("module.backbone.", trained), tmp_path / "weights.pth"
    name = "module.backbone.conv1.weight"
    for change, problem in (
        (
            {name: torch.ones(64, 3, 3, 3)},
            r"conv1\.weight has shape \(64, 3, 3, 3\) instead of \(64, 3, 7, 7\)$",
        ),
        ({"module.backbone.extra": ONE}, r"extra has no place$"),
    ):
        torch.save({"state_dict": good | change}, file)
        with pytest.raises(
            InputError, match=rf"weights of Toy under state_dict\.module\.backbone: {problem}"
        ):
            load_weights(small_resnet(), file, "Toy")
    torch.save({"state_dict": {n: t for n, t in good.items() if n != name}}, file)
    with pytest.raises(InputError, match=r"under state_dict\.module\.backbone: conv1\.weight is missing$"):
        load_weights(small_resnet(), file, "Toy")


def test_a_file_that_timm_refuses_names_the_place_and_the_key(tmp_path):
    state = timm.create_model("test_vit", num_classes=0).state_dict()
    first = next(iter(state))
    torch.save({"teacher": before("backbone.", state | {first: torch.ones(2, 2)})}, tmp_path / "w.pth")
    with pytest.raises(InputError, match=rf"test_vit\S* under teacher\.backbone: .*{first}"):
        load_backbone("timm:test_vit.r160_in1k", "cpu", weights=tmp_path / "w.pth")


def test_what_is_taken_and_what_is_left_out_is_logged(tmp_path, trained, caplog):
    for layout, said in {
        "DINO": "are those under teacher.backbone; left out: head, student, dino_loss",
        "MoCo": "are those under state_dict.module.encoder_q; left out: encoder_k, queue, queue_ptr",
        "timm's average": "are those under state_dict_ema; left out: state_dict",
    }.items():
        torch.save(LAYOUTS[layout](trained), tmp_path / "weights.pth")
        with caplog.at_level("INFO", logger="retrieval"):
            load_weights(small_resnet(), tmp_path / "weights.pth", "Toy")
        assert said in caplog.text


@pytest.mark.parametrize("layout", ["MoCo", "DINO", "timm's average", "DDP inside torch.compile"])
@pytest.mark.parametrize("name", ["test_resnet.r160_in1k", "test_vit.r160_in1k"])
def test_the_same_layouts_fill_a_network_of_timm(tmp_path, layout, name):
    torch.manual_seed(0)
    state = timm.create_model(name, num_classes=0).state_dict()
    state = {name: torch.rand(tensor.shape).to(tensor.dtype) for name, tensor in state.items()}
    torch.save(LAYOUTS[layout](state), tmp_path / "w.pth")
    loaded = load_backbone(f"timm:{name}", "cpu", weights=tmp_path / "w.pth").network.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.items())


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_file_of_open_clip_keeps_its_names_for_timm_to_convert(tmp_path, prefix):
    tower = before("visual.trunk.", timm.create_model("test_vit", num_classes=0).state_dict())
    state = tower | {"visual.head.proj.weight": ONE, "logit_scale": ONE, "transformer.resblocks.0.x": ONE}
    torch.save({"state_dict": before(prefix, state), "epoch": 1}, tmp_path / "w.pth")
    wanted = timm.create_model("test_vit", num_classes=0).state_dict()
    given, under = read_checkpoint(tmp_path / "w.pth", wanted)
    assert set(given) == set(state)
    assert under == " under state_dict" + f".{prefix}".rstrip(".")
