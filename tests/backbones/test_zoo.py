"""Each word beside its library's own model, with weights where the library looks for its download."""

import json

import pytest
import requests
import timm
import torch
from facenet_pytorch import InceptionResnetV1
from hub import lay_in_hub
from huggingface_hub import constants
from photographs import face_photograph, photo_of, seen_of
from safetensors.torch import save_file
from sklearn.datasets import load_sample_image
from torchvision.models import ResNet50_Weights, resnet50
from torchvision.transforms.v2.functional import resize

from retrieval.backbones.backbone import find_pretrained, load_backbone
from retrieval.backbones.face_crop import FaceCrop
from retrieval.backbones.filling import load_weights
from retrieval.backbones.networks import lite_name_in_timm
from retrieval.backbones.zoo import PRETRAINED, known_model_name
from retrieval.errors import InputError, RunError

CHINA = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1)
FLOWER = torch.from_numpy(load_sample_image("flower.jpg").copy()).permute(2, 0, 1)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Empty caches of torch.hub, facenet-pytorch and the Hugging Face hub, without a network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    torch.manual_seed(0)
    return tmp_path


def lay_in_torch_home(home, state, *place):
    file = home.joinpath("torch", *place)
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, file)


def embedded(backbone, *images):
    """The unit vectors, and the normalised pixels that gave them."""
    seen = torch.stack([seen_of(backbone.transform, image).pixels for image in images])
    mean, std = (torch.tensor(three).view(3, 1, 1) for three in (backbone.mean, backbone.std))
    with torch.inference_mode():
        vectors = backbone.embed(seen)
    assert vectors.shape == (len(images), backbone.dimension)
    assert find_pretrained(backbone.model_name).dimension in (None, backbone.dimension)
    parameters = sum(tensor.numel() for tensor in backbone.network.parameters())
    assert find_pretrained(backbone.model_name).millions in (None, round(parameters / 1e6, 1))
    return torch.nn.functional.normalize(vectors), (seen / 255 - mean) / std


def assert_same_vectors(ours, theirs):
    cosines = (ours * torch.nn.functional.normalize(theirs)).sum(1)
    assert cosines.min() >= 0.99999
    assert (ours[0] - ours[1]).norm() > 1e-3  # the network sees the images at all


def changed(network, side=128):
    """The state dict of a network that has seen images: no BatchNorm is as new, and no feature is dead."""
    for layer in network.modules():
        if isinstance(layer, torch.nn.BatchNorm2d | torch.nn.BatchNorm1d):
            layer.momentum = None  # the average of all that it sees
    images = torch.stack([image[:, :side, :side] for image in (CHINA, FLOWER, CHINA.flip(2), FLOWER.flip(1))])
    with torch.no_grad():
        network.train()((images - 128) / 64)
    return network.eval().state_dict()


def test_other_names_of_a_row():
    assert find_pretrained("resnet50:IMAGENET1K_V2") is PRETRAINED["resnet50"]
    assert find_pretrained("facenet:vggface2") is PRETRAINED["facenet"]


@pytest.mark.parametrize("word", ["resnet50", "resnet50:IMAGENET1K_V1"])
def test_resnet50_is_torchvisions(home, word):
    weights = ResNet50_Weights[word.partition(":")[2] or "IMAGENET1K_V2"]
    row = find_pretrained(word)
    assert row.weights.url == weights.url
    assert row.weights.find() is None
    name = weights.url.rpartition("/")[2]
    lay_in_torch_home(home, changed(resnet50()), "hub", "checkpoints", name)
    assert row.weights.find().name == name
    ours, pixels = embedded(load_backbone(word, "cpu"), CHINA, FLOWER)
    theirs = resnet50(weights=weights).eval()
    theirs.fc = torch.nn.Identity()
    with torch.inference_mode():
        assert_same_vectors(ours, theirs(pixels))


def test_simclr_is_resnet50_on_pixels_that_are_not_normalised(home):
    state = changed(resnet50())
    lay_in_hub(
        home, "lightly-ai/simclrv1-imagenet1k-resnet50-1x",
        **{"resnet50-1x.pth": lambda file: torch.save({"state_dict": state}, file)},
    )  # fmt: skip
    backbone = load_backbone("simclr", "cpu")
    ours, _ = embedded(backbone, CHINA, FLOWER)
    theirs = resnet50().eval()
    theirs.load_state_dict(state)
    theirs.fc = torch.nn.Identity()
    plain = torch.stack([seen_of(backbone.transform, image).pixels for image in (CHINA, FLOWER)]) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.inference_mode():
        assert_same_vectors(ours, theirs(plain))
        normalised = theirs((plain - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    assert (ours * torch.nn.functional.normalize(normalised)).sum(1).max() < 0.999


@pytest.mark.parametrize(
    ("word", "trained_on", "file", "classes"),
    [
        ("facenet", "vggface2", "20180402-114759-vggface2.pt", 8631),
        ("facenet:casia-webface", "casia-webface", "20180408-102900-casia-webface.pt", 10575),
    ],
)
def test_facenet_is_facenet_pytorchs(home, word, trained_on, file, classes):
    network = InceptionResnetV1(classify=True, num_classes=classes)
    lay_in_torch_home(home, changed(network), "checkpoints", file)
    backbone = load_backbone(word, "cpu")
    assert find_pretrained(word).weights.find() is not None
    ours, pixels = embedded(backbone, face_photograph("hopper"), face_photograph("collins"))
    theirs = InceptionResnetV1(pretrained=trained_on).eval()  # from the same file
    with torch.inference_mode():
        assert_same_vectors(ours, theirs(pixels))


def test_facenets_addresses_are_facenet_pytorchs():
    import inspect

    from facenet_pytorch.models import inception_resnet_v1

    source = inspect.getsource(inception_resnet_v1.load_weights)
    for word in ("facenet", "facenet:casia-webface"):
        assert PRETRAINED[word].weights.url in source


def test_dlib_is_dlibs_own_from_photograph_to_descriptor():
    import dlib

    from retrieval.backbones.detectors import LANDMARKS

    photo = resize(face_photograph("hopper"), [250], antialias=True)[:, :250, :200]
    photos = [photo, photo.flip(2)]
    ours, _ = embedded(load_backbone("dlib", "cpu"), *photos)
    detect, landmarks = dlib.get_frontal_face_detector(), dlib.shape_predictor(str(LANDMARKS.fetch()))
    network = dlib.face_recognition_model_v1(str(PRETRAINED["dlib"].weights.fetch()))
    theirs = []
    for photo in photos:
        pixels = photo_of(photo)
        (face,) = detect(pixels)
        theirs.append(list(network.compute_face_descriptor(pixels, landmarks(pixels, face))))
    assert_same_vectors(ours, torch.tensor(theirs))


def assert_sees_what_timm_resolves(word, network):
    row, config = find_pretrained(word), timm.data.resolve_model_data_config(network)
    assert (3, row.transform.size, row.transform.size) == tuple(config["input_size"])
    assert row.transform.resize == int(row.transform.size / config["crop_pct"])
    assert (row.transform.crop_mode, row.transform.interpolation) == (
        config["crop_mode"], config["interpolation"],
    )  # fmt: skip
    assert (row.mean, row.std) == (tuple(config["mean"]), tuple(config["std"]))


@pytest.mark.parametrize("name", ["resnet18.a1_in1k", "vit_tiny_patch16_224.augreg_in21k_ft_in1k"])
def test_a_timm_word_is_timms(home, name):
    network = timm.create_model(name, pretrained=False)
    state = {key: tensor.contiguous() for key, tensor in changed(network, 224).items()}
    lay_in_hub(home, f"timm/{name}", **{"model.safetensors": lambda file: save_file(state, file)})
    ours, pixels = embedded(load_backbone(f"timm:{name}", "cpu"), CHINA, FLOWER)
    theirs = timm.create_model(name, pretrained=True, num_classes=0).eval()  # from the same file
    assert_sees_what_timm_resolves(f"timm:{name}", theirs)
    with torch.inference_mode():
        assert_same_vectors(ours, theirs(pixels))


def test_a_transform_that_is_not_ours_is_a_sentence(home):
    seen = {"input_size": [3, 112, 112], "interpolation": "nearest", "num_classes": 64, "classifier": "fc"}
    config = {"architecture": "resnet18", "num_classes": 64, "pretrained_cfg": seen}
    lay_in_hub(home, "owner/near", **{"config.json": lambda file: file.write_text(json.dumps(config))})
    with pytest.raises(InputError, match="by center, nearest; supported are square RGB images"):
        find_pretrained("timm:hf-hub:owner/near")


@pytest.mark.parametrize(("tag", "dimension"), [("cosface_ms1mv3", 64), ("in1k", 512)])
def test_a_repository_of_the_hub_by_its_config(home, caplog, tag, dimension):
    """Face networks of a margin loss end in the embedding; of others the classifier is taken off."""
    network = timm.create_model("resnet18", num_classes=64)
    seen = {"input_size": [3, 112, 112], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear",
            "crop_pct": 1.0, "num_classes": 64, "first_conv": "conv1", "classifier": "fc"}  # fmt: skip
    config = {"architecture": "resnet18", "num_classes": 64, "pretrained_cfg": seen}
    lay_in_hub(
        home, f"owner/resnet18.{tag}",
        **{"config.json": lambda file: file.write_text(json.dumps(config)),
           "model.safetensors": lambda file: save_file(changed(network), file)},
    )  # fmt: skip
    backbone = load_backbone(f"timm:hf-hub:owner/resnet18.{tag}", "cpu")
    aligned = FaceCrop("mtcnn", 112, 0, 0.08, "align")
    assert (backbone.transform == aligned) == (dimension == 64)
    backbone = load_backbone(f"timm:hf-hub:owner/resnet18.{tag}", "cpu", crop="none")
    assert ("face network, but --crop none lets it see whole images" in caplog.text) == (dimension == 64)
    assert (backbone.dimension, backbone.transform.size, backbone.mean) == (dimension, 112, (0.5, 0.5, 0.5))
    ours, pixels = embedded(backbone, CHINA, FLOWER)
    theirs = network.eval()
    if dimension == 512:
        theirs.reset_classifier(0)
    snapshot = find_pretrained(f"timm:hf-hub:owner/resnet18.{tag}").weights.find().parent
    assert_sees_what_timm_resolves(
        f"timm:hf-hub:owner/resnet18.{tag}", timm.create_model(f"local-dir:{snapshot}", pretrained=False)
    )
    with torch.inference_mode():
        assert_same_vectors(ours, theirs(pixels))


TEN = {"fc.weight": torch.ones(10, 96), "fc.bias": torch.ones(10)}
ONE = torch.ones(1)


def bare(state, prefix):
    return {f"{prefix}{name}": tensor for name, tensor in state.items() if not name.startswith("fc.")}


OF_OTHERS = {
    "with its classifier": lambda s: s,
    "for ten classes": lambda s: s | TEN,
    "DataParallel, no classifier": lambda s: bare(s, "module."),
    "lightly": lambda s: {"state_dict": bare(s, "backbone.") | {"projection_head.layers.0.weight": ONE}},
    "SupContrast": lambda s: {"model": bare(s, "encoder.") | {"head.0.weight": ONE}},
}


@pytest.mark.parametrize("layout", OF_OTHERS)
def test_weights_of_another_file_go_into_a_timm_word(home, tmp_path, layout):
    network = timm.create_model("test_resnet.r160_in1k", pretrained=False)
    torch.save(OF_OTHERS[layout](changed(network)), tmp_path / "w.pth")
    backbone = load_backbone("timm:test_resnet.r160_in1k", "cpu", weights=tmp_path / "w.pth")
    assert backbone.dimension == 96
    for name, tensor in backbone.network.state_dict().items():
        assert torch.equal(tensor, network.state_dict()[name]), name


@pytest.mark.parametrize("name", ["test_resnet.r160_in1k", "dla46_c.in1k", "convnextv2_atto.fcmae"])
def test_a_timm_word_never_has_random_weights(home, tmp_path, name):
    """timm loads some families, such as the last two, with strict=False."""
    network = timm.create_model(name, pretrained=False)
    state = {n: t for n, t in changed(network).items() if not n.startswith("head.norm")}
    torch.save(state, tmp_path / "w.pth")
    first = next(iter(state))
    ours = load_backbone(f"timm:{name}", "cpu", weights=tmp_path / "w.pth").network.state_dict()
    assert torch.equal(ours[first], state[first])
    for wrong in ({n: t for n, t in state.items() if n != first}, {"foo.weight": torch.ones(1)}):
        torch.save(wrong, tmp_path / "w.pth")
        with pytest.raises(InputError, match=rf"does not hold the weights of timm:{name}"):
            load_backbone(f"timm:{name}", "cpu", weights=tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("dla46_c.in1k", "level3.tree2.root.bn.bias"),  # a new network has zeros there, and never NaN
        ("dla46_c.in1k", "base_layer.1.running_mean"),
        ("convnextv2_atto.fcmae", "stages.2.blocks.1.mlp.grn.weight"),
    ],
)
def test_a_tensor_that_a_file_for_timm_lacks_is_named(home, tmp_path, name, tensor):
    state = {n: t for n, t in timm.create_model(name).state_dict().items() if n != tensor}
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(InputError, match=rf"does not hold the weights of timm:{name}: {tensor} is missing$"):
        load_backbone(f"timm:{name}", "cpu", weights=tmp_path / "w.pth")


@pytest.mark.parametrize(
    "name", ["beit_base_patch16_224.in22k_ft_in22k_in1k", "swin_tiny_patch4_window7_224"]
)
def test_a_vit_for_another_kind_of_transformer_is_a_sentence(home, tmp_path, name):
    torch.save(timm.create_model("vit_tiny_patch16_224").state_dict(), tmp_path / "w.pth")
    with pytest.raises(InputError, match="does not hold the weights of timm:"):
        load_backbone(f"timm:{name}", "cpu", weights=tmp_path / "w.pth")


@pytest.mark.parametrize("config", ['{"model_type": "vit"}', "no JSON", '{"architecture": 3}'])
def test_a_repository_that_is_not_timms_is_a_sentence(home, config):
    lay_in_hub(home, "owner/other", **{"config.json": lambda file: file.write_text(config)})
    with pytest.raises(InputError, match=r"owner/other is no model of timm: its config\.json"):
        find_pretrained("timm:hf-hub:owner/other")
    with pytest.raises(InputError, match="a--b/c cannot be a repository of the hub"):
        find_pretrained("timm:hf-hub:a--b/c")
    with pytest.raises(InputError, match="timm has no weights for hf-hub:owner/other@main"):
        find_pretrained("timm:hf-hub:owner/other@main")


def test_weights_of_another_lite_are_a_sentence():
    file = PRETRAINED["efficientnet_lite2"].weights.fetch()
    with pytest.raises(InputError, match="does not hold the weights of EfficientNet-Lite0: "):
        load_backbone("efficientnet_lite0", "cpu", weights=file)


@pytest.mark.parametrize(
    "word",
    ["resnet50", "simclr", "facenet", "clip:base", "dinov2", "timm:resnet18.a1_in1k", "timm:hf-hub:a/b"],
)
def test_weights_that_cannot_be_downloaded_are_never_random_ones(home, monkeypatch, word):
    def offline(*_, **__):
        raise OSError("Name or service not known")

    monkeypatch.setattr(requests, "get", offline)
    by_hand = r"--weights FILE|put it at /|copy the cache that `python -m retrieval\.backbones --fetch"
    with pytest.raises(RunError, match=rf"https://.* could not be downloaded .*({by_hand})"):
        load_backbone(word, "cpu")


# ---- EfficientNet-Lite


@pytest.mark.parametrize("number", [0, 1, 2])
def test_every_tensor_of_lite_lies_in_the_network_under_its_name(number):
    row = find_pretrained(f"efficientnet_lite{number}")
    file = row.weights.fetch()
    network = timm.create_model(f"tf_efficientnet_lite{number}", pretrained=False).eval()
    blocks = [(stage, i) for stage, depth in enumerate(network.blocks) for i in range(len(depth))]
    load_weights(network, file, "Lite", lambda name: lite_name_in_timm(name, blocks))
    given, placed = torch.load(file, weights_only=True), network.state_dict()
    # The same layers in the same order, which names and shapes alone do not promise.
    assert [lite_name_in_timm(name, blocks) for name in given] == list(placed)
    assert all(torch.equal(placed[lite_name_in_timm(name, blocks)], given[name]) for name in given)
    # ImageNet's words for the two: bell cote (or palace, monastery, stupa: a Chinese temple), and daisy (or
    # the honeycomb that Lite2 takes its middle for).
    for image, classes in ((CHINA, {442, 663, 698, 832}), (FLOWER, {985, 599})):
        pixels = seen_of(row.transform, image).pixels[None] / 255
        with torch.inference_mode():
            assert network((pixels - 0.5) / 0.5).argmax().item() in classes
    config = network.pretrained_cfg
    assert (3, row.transform.size, row.transform.size) == config["input_size"]
    assert (row.mean, row.std, row.transform.interpolation) == (
        config["mean"], config["std"], config["interpolation"],
    )  # fmt: skip
    ours, pixels = embedded(load_backbone(f"efficientnet_lite{number}", "cpu"), CHINA, FLOWER)
    network.reset_classifier(0)
    with torch.inference_mode():
        assert_same_vectors(ours, network(pixels))


# ---- the words


def test_an_unknown_word_is_a_sentence_with_the_nearest():
    assert known_model_name("efficientnet_lite0") == "efficientnet_lite0"
    for word, hint in {
        "efficientnet-lite": "did you mean efficientnet_lite",
        "face_net": "did you mean facenet",
        "resnet": "did you mean resnet50",
        "zzzz": "there is no such backbone; `python -m retrieval.backbones` lists the names",
        "DLIB": "did you mean dlib",
        "clip-vit-b32": r"did you mean clip\?",
        "dinov2_vitb14": r"did you mean dinov2\?",
        "facenet-not-tuned": r"did you mean facenet\?",
        "supcon-tuned": "a file, not a name: .* `python model_fine_tuned.py --weights FILE` runs it",
        "simclr-tuned": "a file, not a name",
        "facenet_fine_tuned": "a file, not a name",
        "timm:": "and timm:NAME",
    }.items():
        with pytest.raises(InputError, match=hint):
            known_model_name(word)
    with pytest.raises(InputError, match=r"timm has no weights for resnt18.*did you mean resnet18"):
        find_pretrained("timm:resnt18")
    with pytest.raises(InputError, match=r"timm has no weights for resnet18\.nothing"):
        find_pretrained("timm:resnet18.nothing")
    with pytest.raises(InputError, match=r"sees 1024 × 768 pixels.*square.*such as dinov3"):
        find_pretrained("timm:vit_base_patch16_sapiens2.fb")
