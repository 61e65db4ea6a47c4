"""retrieval/fine_tuned.py: a checkpoint rebuilds the very backbone that was written."""

import copy
from dataclasses import asdict, replace

import pytest
import torch
from conftest import SMALL
from torch.nn import functional

from retrieval.backbones import fine_tuned
from retrieval.backbones.backbone import find_pretrained, load_backbone
from retrieval.backbones.batch_norm_folding import fold_batch_norms
from retrieval.backbones.face_crop import FaceCrop
from retrieval.backbones.fine_tuned import (
    JOINED,
    Mapped,
    Recipe,
    load_fine_tuned,
    load_tuned_alone,
    write_fine_tuned,
)
from retrieval.backbones.transform import Transform
from retrieval.backbones.weights_file import is_fine_tuned, unpickle
from retrieval.errors import InputError


@pytest.fixture(scope="module")
def networks():
    """The default network, folded, and a copy with other weights."""
    untuned = fold_batch_norms(load_backbone("efficientnet_lite0", "cpu").network, torch.rand(1, 3, 64, 64))
    tuned = copy.deepcopy(untuned)
    with torch.no_grad():
        tuned.conv_head.weight.mul_(1.5)
    return untuned, tuned


RECIPE = Recipe(
    word="efficientnet_lite0",
    prepare=asdict(Transform(64, "bicubic", "center", 72)),
    mean=(0.4, 0.5, 0.6),
    std=(0.5, 0.4, 0.3),
    folded=True,
    mapped=False,
    tuned_size=64,
    embedding="tuned",
    weight=1.0,
    loss="ce",
    settings={"seed": 0, "val_share": 0.2},
    classes=["a", "b"],
    versions={},
    metrics={"untuned": {"top_1": 0.4}, "tuned": {"top_1": 0.5}},
    history=[],
    hub_config=None,
)


def images(size):
    return torch.randint(
        0, 256, (3, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def normalised(pixels):
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (RECIPE.mean, RECIPE.std))
    return (pixels / 255 - mean) / std


def test_it_prepares_and_embeds_as_its_recipe_says_and_not_as_the_table_of_words_does(networks, tmp_path):
    write_fine_tuned(tmp_path / "a.pth", RECIPE, networks[1].state_dict())
    backbone = load_fine_tuned(tmp_path / "a.pth", "cpu")
    assert backbone.transform == Transform(64, "bicubic", "center", 72)
    assert (backbone.mean, backbone.std, backbone.dimension) == (RECIPE.mean, RECIPE.std, 1280)
    assert backbone.model_name == "efficientnet_lite0 fine-tuned with ce (tuned)"
    with torch.inference_mode():
        wanted = networks[1](normalised(images(64)))
        torch.testing.assert_close(backbone.embed(images(64)), wanted, rtol=1e-4, atol=1e-4)


def test_joined_with_the_untuned_network_each_sees_its_own_size(networks, tmp_path):
    recipe = replace(RECIPE, prepare=asdict(Transform(96, "bilinear")), embedding=JOINED, weight=2.0)
    write_fine_tuned(tmp_path / "a.pth", recipe, networks[1].state_dict(), networks[0].state_dict())
    backbone = load_fine_tuned(tmp_path / "a.pth", "cpu")
    assert (backbone.dimension, backbone.transform.size) == (2560, 96)
    pixels = normalised(images(96))
    smaller = functional.interpolate(pixels, [64, 64], mode="bilinear", antialias=True)
    with torch.inference_mode():
        given = functional.normalize(backbone.embed(images(96)))
        untuned, tuned = functional.normalize(networks[0](pixels)), functional.normalize(networks[1](smaller))
    cosines = (untuned @ untuned.T + 4 * tuned @ tuned.T) / 5
    torch.testing.assert_close(given @ given.T, cosines, rtol=1e-4, atol=1e-4)


def test_a_linear_map_and_a_face_crop_are_part_of_it(networks, tmp_path):
    mapped = Mapped(copy.deepcopy(networks[0]), 1280)
    with torch.inference_mode():
        pixels = normalised(images(64))
        torch.testing.assert_close(mapped(pixels), networks[0](pixels))  # the identity
        mapped.map.weight.copy_(torch.eye(1280).flip(0))
    old = {"detector": "dlib", "size": 64, "margin": 0.2, "min_face_size": 0.08}  # of earlier versions
    recipe = replace(RECIPE, mapped=True, prepare=old)
    write_fine_tuned(tmp_path / "a.pth", recipe, mapped.state_dict())
    backbone = load_fine_tuned(tmp_path / "a.pth", "cpu")
    assert backbone.transform == FaceCrop("dlib", 64, 0.2, 0.08)
    assert backbone.transform.detects_faces
    with torch.inference_mode():
        torch.testing.assert_close(
            backbone.embed(images(64)), networks[0](pixels).flip(1), rtol=1e-4, atol=1e-4
        )


def test_the_tuned_network_alone_goes_on_at_its_own_size(networks, tmp_path):
    recipe = replace(RECIPE, prepare=asdict(Transform(96, "bilinear")), embedding=JOINED)
    write_fine_tuned(tmp_path / "a.pth", recipe, networks[1].state_dict(), networks[0].state_dict())
    alone, recipe = load_tuned_alone(tmp_path / "a.pth", "efficientnet_lite0", "cpu")
    assert (alone.transform.size, alone.dimension, recipe.embedding) == (64, 1280, JOINED)
    assert torch.equal(alone.network.conv_head.weight, networks[1].conv_head.weight)
    with pytest.raises(InputError, match="a fine-tuned efficientnet_lite0: give --model efficientnet_lite0"):
        load_tuned_alone(tmp_path / "a.pth", "resnet50")


def test_what_is_no_checkpoint_of_ours_is_a_sentence(networks, tmp_path):
    others = tmp_path / "others.pth"
    torch.save(networks[0].state_dict(), others)
    assert not is_fine_tuned(unpickle(others))
    with pytest.raises(InputError, match=r"was not written by fine_tuning\.py: for other weights run"):
        load_fine_tuned(others)
    write_fine_tuned(others, RECIPE, {"conv_head.weight": torch.zeros(1)})
    assert is_fine_tuned(unpickle(others))
    with pytest.raises(InputError, match="does not hold the weights of the efficientnet_lite0 of its recipe"):
        load_fine_tuned(others)
    fine_tuned.write_checkpoint(others, {"recipe": {"word": "x", "hue": 3}, "network": {}})
    with pytest.raises(InputError, match="written by a later version of this project: its recipe has hue"):
        load_fine_tuned(others)
    fine_tuned.write_checkpoint(others, {"recipe": {}, "network": {}})
    with pytest.raises(InputError, match=r"an earlier version .*: its recipe lacks .*; fine-tune again"):
        load_fine_tuned(others)
    others.write_bytes(b"")
    with pytest.raises(InputError, match=r"others\.pth is empty"):
        load_fine_tuned(others)


WRONG = (
    None,
    "x",
    "",
    -1,
    0,
    1e9,
    float("nan"),
    [],
    [1, 2],
    {},
    {"a": 1},
    {3: 4},
    True,
    b"x",
    torch.zeros(2),
)


@pytest.mark.slow
def test_a_recipe_that_was_changed_anywhere_loads_or_is_a_sentence(tmp_path):
    """Each field, and each of its transform, with each of many wrong values; of a small network."""
    file, state = tmp_path / "changed.pth", find_pretrained(SMALL).network(None).state_dict()
    recipe = asdict(replace(RECIPE, word=SMALL, folded=False))
    fine_tuned.write_checkpoint(file, {"recipe": recipe, "network": state})
    load_fine_tuned(file)
    changed = [recipe | {field: value} for field in recipe for value in WRONG]
    changed += [recipe | {"prepare": recipe["prepare"] | {field: value}} for field in recipe["prepare"]
                for value in WRONG]  # fmt: skip
    face = asdict(FaceCrop("mtcnn", 64, 0.1, 0.1))
    changed += [recipe | {"prepare": face | {field: value}} for field in face for value in WRONG]
    refused = 0
    for content in changed:
        fine_tuned.write_checkpoint(file, {"recipe": content, "network": state})
        try:
            load_fine_tuned(file)
        except InputError as error:
            refused += str(file) in str(error)
    assert refused > len(changed) / 2


@pytest.mark.parametrize("network", [None, [], {"conv_head.weight": 3}, {0: torch.zeros(1)}, "x"])
def test_weights_that_were_changed_are_a_sentence(network, tmp_path):
    fine_tuned.write_checkpoint(tmp_path / "a.pth", {"recipe": asdict(RECIPE), "network": network})
    with pytest.raises(InputError, match=r"a\.pth (was changed|does not hold the weights)"):
        load_fine_tuned(tmp_path / "a.pth")


def test_a_full_disk_leaves_the_checkpoint_before(networks, tmp_path, monkeypatch):
    write_fine_tuned(tmp_path / "a.pth", RECIPE, networks[0].state_dict())
    before = (tmp_path / "a.pth").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("retrieval.files.write_through", full)
    with pytest.raises(OSError, match="No space left"):
        write_fine_tuned(tmp_path / "a.pth", RECIPE, networks[1].state_dict())
    assert (tmp_path / "a.pth").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]
