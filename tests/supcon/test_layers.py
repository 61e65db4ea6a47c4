"""supcon/layers.py: which part of a network learns, and how fast."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from retrieval.backbones.backbone import find_pretrained
from retrieval.backbones.batch_norm_folding import fold_batch_norms
from retrieval.backbones.fine_tuned import Mapped
from retrieval.errors import InputError
from supcon.layers import freeze, parameter_groups, share_of_rate, stages

SETTINGS = SimpleNamespace(lr=1e-3, layer_decay=0.5, head_lr=5e-3, weight_decay=0.02)


def names_of(network, parameters):
    known = {id(parameter): name for name, parameter in network.named_parameters()}
    return {known[id(parameter)] for parameter in parameters}


def network_of(word, fold=True):
    network = find_pretrained(word).network(None).eval()
    return fold_batch_norms(network, torch.rand(1, 3, 96, 96)) if fold else network


@pytest.mark.parametrize(
    ("word", "first", "last", "count"),
    [
        ("efficientnet_lite0", "conv_stem.", "conv_head.", 9),
        ("resnet50", "conv1.", "layer4.", 5),
        ("facenet", "conv2d_1a.", "last_", 13),
        ("dlib", "conv1.", "fc.", 16),
        ("timm:vit_tiny_patch16_224.augreg_in21k_ft_in1k", "cls_token", "blocks.11", 13),
    ],
)
def test_stages_go_from_the_input_to_the_output_and_hold_every_weight_once(word, first, last, count):
    network = network_of(word, fold=word in ("efficientnet_lite0", "resnet50", "facenet"))
    found = stages(network)
    assert len(found) == count
    assert any(name.startswith(first) for name in names_of(network, found[0]))
    assert any(name.startswith(last) for name in names_of(network, found[-1]))
    every = [id(parameter) for stage in found for parameter in stage]
    assert len(every) == len(set(every)) == len(list(network.parameters()))
    assert all(any(parameter.ndim > 1 for parameter in stage) for stage in found)


@pytest.mark.parametrize(
    ("how", "frozen"),
    [
        ("bn", set()),
        ("stem", {"conv_stem", "blocks.0", "blocks.1", "blocks.2"}),
        ("all_but_last", {"conv_stem", *(f"blocks.{number}" for number in range(7))}),
    ],
)
def test_what_is_frozen_does_not_learn(how, frozen):
    network = network_of("efficientnet_lite0")
    learned = freeze(network, how, "efficientnet_lite0")
    still = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    assert {".".join(name.split(".")[: 2 if "blocks" in name else 1]) for name in still} == frozen
    assert names_of(network, [p for stage in learned for p in stage]) | still == {
        name for name, _ in network.named_parameters()
    }


def test_of_a_network_with_a_linear_map_only_the_map_learns():
    network = Mapped(network_of("efficientnet_lite0"), 1280)
    *frozen, learned = freeze(network, "backbone", "efficientnet_lite0")
    assert not any(frozen)
    assert names_of(network, learned) == {"map.weight"}
    assert [name for name, p in network.named_parameters() if p.requires_grad] == ["map.weight"]
    assert len(stages(network)) == 10


def test_no_rate_is_above_a_twentieth_of_a_weight():
    settings = SimpleNamespace(**vars(SETTINGS) | {"layer_decay": 1.0})
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    nn.init.constant_(network[0].weight, 0.002)
    nn.init.constant_(network[1].weight, 1.0)
    rates = [group["rate"] for group in parameter_groups(stages(network), nn.Linear(4, 2), settings)]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4, 5e-3, 5e-3])


def test_a_network_without_weights_cannot_be_trained():
    with pytest.raises(InputError, match="--model nothing has no weights to train"):
        freeze(nn.Sequential(nn.Flatten()), "bn", "nothing")


def test_rates_fall_towards_the_input_and_vectors_do_not_decay():
    network, head = network_of("efficientnet_lite0"), nn.Linear(8, 2)
    learned = freeze(network, "bn", "efficientnet_lite0")
    groups = parameter_groups(learned, head, SETTINGS)
    rates = [group["rate"] for group in groups]
    assert rates[:4] == [
        1e-3,
        1e-3,
        5e-4,
        5e-4,
    ]  # matrices and vectors of the last stage and the next
    assert rates[-4:-2] == pytest.approx([1e-3 * 0.5**8] * 2)
    assert rates[-2:] == [5e-3, 5e-3]
    for group in groups:
        assert group["weight_decay"] == (0.02 if group["params"][0].ndim > 1 else 0)
    given = [id(p) for group in groups for p in group["params"]]
    assert sorted(given) == sorted(id(p) for p in [*network.parameters(), *head.parameters()])


def test_the_decay_is_by_depth_whatever_the_number_of_stages():
    network, head = network_of("resnet50"), nn.Linear(8, 2)
    learned = freeze(network, "stem", "resnet50")
    rates = {group["rate"] for group in parameter_groups(learned, head, SETTINGS)}
    assert sorted(rates) == pytest.approx([1e-3 * 0.5**4, 1e-3 * 0.5**2, 1e-3, 5e-3])


def test_the_rate_rises_and_falls_to_nothing_and_not_below():
    shares = [share_of_rate(progress / 100, 0.08) for progress in range(101)]
    assert max(shares) == shares[8] == 1
    assert shares[:9] == sorted(shares[:9])
    assert shares[8:] == sorted(shares[8:], reverse=True)
    assert share_of_rate(1.0, 0.08) == share_of_rate(1.5, 0.08) == 0
    assert share_of_rate(0.0, 0.0) == 1
