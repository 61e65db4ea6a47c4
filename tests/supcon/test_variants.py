"""supcon/variants.py and supcon/heads.py: each row learns, and its settings reach its head."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from retrieval.errors import InputError
from supcon import heads
from supcon.heads import Memory, remember
from supcon.variants import CHOICES, VARIANTS, choices_of, known_loss


def settings(loss, **given):
    return SimpleNamespace(loss=loss, **({"batch_size": 48} | dict.fromkeys(CHOICES) | given))


def head_of(loss, dimension=16, classes=4, **given):
    torch.manual_seed(0)
    return getattr(heads, VARIANTS[loss].head)(dimension, classes, choices_of(settings(loss, **given)))


@pytest.mark.parametrize("loss", VARIANTS)
def test_every_head_pulls_free_embeddings_of_one_label_together(loss):
    """Embeddings as the only weights, a few per class: after training, each one's nearest is of its label."""
    head = head_of(loss)
    features = torch.randn(24, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
    labels = torch.arange(4).repeat(6)
    optimizer = torch.optim.Adam([features, *head.parameters()], lr=0.05)
    losses = []
    for _ in range(150):
        loss_now = head(features, labels)
        optimizer.zero_grad()
        loss_now.backward()
        optimizer.step()
        losses.append(loss_now.item())
    assert losses[-1] < 0.75 * losses[0]
    z = functional.normalize(features.detach())
    similarity = (z @ z.T).fill_diagonal_(-2)
    assert torch.equal(labels[similarity.argmax(1)], labels)


def test_each_choice_reaches_the_head():
    features = torch.randn(12, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(4).repeat(3)

    def loss(word, **given):
        return head_of(word, **given).eval()(features, labels).item()

    for word, name, value in [
        ("ce", "label_smoothing", 0.4), ("supcon", "temperature", 0.5), ("arcface", "scale", 8.0),
        ("arcface", "margin", 0.1), ("cosface", "margin", 0.4), ("cosface", "scale", 8.0),
        ("proxy_anchor", "scale", 8.0), ("proxy_anchor", "margin", 0.3), ("triplet", "margin", 0.9),
        ("ce+supcon", "supcon_weight", 2.0),
    ]:  # fmt: skip
        assert loss(word, **{name: value}) != loss(word), (word, name)
    assert head_of("ce", dropout=0.9).dropout.p == 0.9
    assert len(head_of("supcon", memory=32).memory.labels) == 32


def test_margins_are_those_of_the_papers():
    """One image at an angle of 60° to its class and at right angles to the other, by hand."""
    features, labels = torch.tensor([[0.5, math.sqrt(0.75)]]), torch.tensor([0])
    for word, target in [
        ("arcface", math.cos(math.radians(60) + 0.3)),
        ("cosface", 0.5 - 0.2),
    ]:
        head = head_of(word, 2, 2, scale=10.0)
        head.loss.W.data = torch.tensor([[1.0, -math.sqrt(0.75)], [0.0, 0.5]])
        wanted = math.log(1 + math.exp(10 * (0 - target)))
        assert head(features, labels).item() == pytest.approx(wanted, rel=1e-4), word


def test_a_setting_of_another_loss_is_a_sentence():
    with pytest.raises(
        InputError, match="--temperature changes nothing for --loss ce: it is for supcon, nt_xent"
    ):
        choices_of(settings("ce", temperature=0.2))
    assert choices_of(settings("supcon", temperature=0.2))["temperature"] == 0.2


@pytest.mark.parametrize(
    ("loss", "given", "sentence"),
    [
        ("ce", {"batch_size": 1}, "--batch_size 1 holds one image"),
        ("supcon", {"batch_size": 4}, "--batch_size 4 holds one class of --images_per_class 4 images"),
        ("triplet", {"images_per_class": 48}, "--batch_size 48 holds one class of --images_per_class 48"),
    ],
)
def test_a_batch_of_one_class_is_a_sentence(loss, given, sentence):
    with pytest.raises(InputError, match=sentence):
        choices_of(settings(loss, **given))


def test_an_unknown_loss_is_a_sentence():
    with pytest.raises(InputError, match="there is no such loss; did you mean supcon"):
        known_loss("SupCon2")


def test_the_projection_has_the_widths_of_the_paper_and_no_part_in_the_embedding():
    head = head_of("supcon", 2048)
    assert [layer.out_features for layer in head.layers if hasattr(layer, "out_features")] == [512, 128]


def test_a_memory_keeps_the_last_and_forgets_the_oldest():
    memory = Memory(5, 2)
    assert [len(part) for part in memory.entries()] == [0, 0]
    for start in (0, 2, 4):
        memory.add(torch.full((2, 2), float(start)), torch.tensor([start, start + 1]))
    vectors, labels = memory.entries()
    assert sorted(labels.tolist()) == [1, 2, 3, 4, 5]
    assert len(vectors) == 5
    memory.add(torch.zeros(9, 2), torch.arange(10, 19))
    assert sorted(memory.entries()[1].tolist()) == [14, 15, 16, 17, 18]


def test_a_memory_gives_more_to_compare_with():
    head = head_of("supcon", memory=64)
    features, labels = torch.randn(8, 16), torch.arange(4).repeat(2)
    first = head(features, labels).item()
    assert not len(head.memory.entries()[1])  # a step that fails leaves no trace
    remember(head)
    assert len(head.memory.entries()[1]) == 8
    assert head(features, labels).item() > first  # the same again: more others below the line
