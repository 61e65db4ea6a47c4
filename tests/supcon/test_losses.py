"""supcon/losses.py against the naive double loop, against pytorch-metric-learning, and by hand."""

import math

import pytest
import torch
from torch.nn import functional

from supcon import losses
from supcon.losses import supcon_loss


def naive(embeddings, labels, temperature):
    """Equation 2 of Khosla et al. 2020, one anchor and one positive after the other."""
    z = functional.normalize(embeddings)
    losses = []
    for i in range(len(z)):
        positives = [p for p in range(len(z)) if p != i and labels[p] == labels[i]]
        if not positives:
            continue
        below = sum(torch.exp(z[i] @ z[a] / temperature) for a in range(len(z)) if a != i)
        terms = [torch.log(torch.exp(z[i] @ z[p] / temperature) / below) for p in positives]
        losses.append(-sum(terms) / len(positives))
    return sum(losses) / len(losses)


def value_and_gradient(loss, embeddings, *more):
    embeddings = embeddings.clone().requires_grad_()
    value = loss(embeddings, *more)
    value.backward()
    return value.detach(), embeddings.grad


@pytest.mark.parametrize("temperature", [0.05, 0.1, 1.0])
@pytest.mark.parametrize("classes", [2, 5, 20])
def test_value_and_gradient_are_those_of_the_double_loop(temperature, classes):
    random = torch.Generator().manual_seed(classes)
    embeddings = torch.randn(24, 16, generator=random)
    labels = torch.randint(0, classes, (24,), generator=random)  # with 20 classes some have no positive
    ours = value_and_gradient(supcon_loss, embeddings, labels, temperature)
    wanted = value_and_gradient(naive, embeddings, labels, temperature)
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_value_and_gradient_are_those_of_pytorch_metric_learning():
    from pytorch_metric_learning.losses import NTXentLoss, SupConLoss

    random = torch.Generator().manual_seed(0)
    embeddings = torch.randn(32, 16, generator=random)
    labels = torch.arange(8).repeat(4)
    ours = value_and_gradient(supcon_loss, embeddings, labels, 0.1)
    theirs = value_and_gradient(SupConLoss(temperature=0.1), embeddings, labels)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    pairs = torch.arange(16).repeat(2)  # each image and its other view: NT-Xent
    ours = value_and_gradient(supcon_loss, embeddings, pairs, 0.5)
    theirs = value_and_gradient(NTXentLoss(temperature=0.5), embeddings, pairs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_an_anchor_without_a_positive_is_left_out_and_none_at_all_gives_zero():
    embeddings = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    value, _ = value_and_gradient(supcon_loss, embeddings, torch.tensor([0, 0, 1, 1, 2]))
    torch.testing.assert_close(value, naive(embeddings, torch.tensor([0, 0, 1, 1, 2]), 0.1))
    for count in (1, 5):
        value, gradient = value_and_gradient(supcon_loss, embeddings[:count], torch.arange(count))
        assert value == 0
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_it_stays_finite_where_everything_is_alike_or_opposite():
    for embeddings in (torch.ones(6, 4), torch.ones(6, 4) * torch.tensor([1, -1] * 3)[:, None]):
        value, gradient = value_and_gradient(supcon_loss, embeddings, torch.tensor([0, 0, 0, 1, 1, 1]), 0.01)
        assert value.isfinite()
        assert gradient.isfinite().all()


def test_of_equal_embeddings_the_loss_is_the_logarithm_of_their_number():
    value = supcon_loss(torch.ones(10, 3), torch.arange(5).repeat(2))
    assert value.item() == pytest.approx(math.log(9))


def test_a_memory_is_more_to_compare_with_and_gets_no_gradient():
    random = torch.Generator().manual_seed(0)
    embeddings, memory = torch.randn(8, 4, generator=random), torch.randn(12, 4, generator=random)
    labels, memory_labels = torch.arange(4).repeat(2), torch.arange(6).repeat(2)
    memory.requires_grad_()
    value, _ = value_and_gradient(supcon_loss, embeddings, labels, 0.2, memory, memory_labels)
    assert memory.grad is None
    z = functional.normalize(torch.cat([embeddings, memory]).detach())
    every = torch.cat([labels, memory_labels])
    wanted = []
    for i in range(8):
        others = [j for j in range(20) if j != i]
        below = sum(torch.exp(z[i] @ z[j] / 0.2) for j in others)
        terms = [torch.log(torch.exp(z[i] @ z[j] / 0.2) / below) for j in others if every[j] == every[i]]
        wanted.append(-sum(terms) / len(terms))
    torch.testing.assert_close(value, sum(wanted) / 8)


def test_the_gradient_is_that_of_the_differences_with_and_without_a_memory_and_in_parts(monkeypatch):
    random = torch.Generator().manual_seed(0)
    z = torch.randn(9, 4, generator=random, dtype=torch.float64, requires_grad=True)
    memory = torch.randn(5, 4, generator=random, dtype=torch.float64)
    labels, more = torch.tensor([7, 7, -3, 0, 0, 0, 10**12, -3, 5]), torch.tensor([5, 7, 1, 1, 0])
    for at_once in (losses.PAIRS_AT_ONCE, 30, 1):  # all rows, two or three, one at a time
        monkeypatch.setattr(losses, "PAIRS_AT_ONCE", at_once)
        torch.autograd.gradcheck(lambda z: supcon_loss(z, labels, 0.2), z)
        torch.autograd.gradcheck(lambda z: supcon_loss(z, labels, 0.2, memory, more), z)


@pytest.mark.parametrize(("dtype", "close"), [("float32", 1e-5), ("float16", 2e-3), ("bfloat16", 2e-2)])
def test_few_digits_and_a_low_temperature_give_what_many_digits_give(dtype, close):
    """Two large classes, each nearly one point: the sum of a class is a thousand times its members."""
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(2).repeat(1000)
    embeddings = torch.eye(2, 8)[labels] + 0.1 * torch.randn(2000, 8, generator=random)
    embeddings = embeddings.to(getattr(torch, dtype))
    value, gradient = value_and_gradient(supcon_loss, embeddings, labels, 0.05)
    wanted, direction = value_and_gradient(supcon_loss, embeddings.double(), labels, 0.05)
    torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        gradient.double(), direction, rtol=0, atol=close * direction.abs().max().item()
    )
    alike = torch.ones(2000, 8, dtype=getattr(torch, dtype))
    value, gradient = value_and_gradient(supcon_loss, alike, labels, 0.01)
    assert value.item() == pytest.approx(math.log(1999), rel=1e-4)
    assert gradient.abs().max() < 1e-4


def equation_2(embeddings, labels, temperature):
    """Return L_out of Khosla et al. 2020, eq. 2, in float64, with the whole matrix of cosines."""
    z = functional.normalize(embeddings.double())
    s = (z @ z.T / temperature).fill_diagonal_(-math.inf)
    same = (labels[:, None] == labels) & ~torch.eye(len(z), dtype=torch.bool)
    log_p = s - s.logsumexp(1, keepdim=True)
    anchors = same.any(1)  # those with a positive
    return (-log_p.where(same, 0).sum(1)[anchors] / same.sum(1)[anchors]).mean()


@pytest.mark.parametrize("temperature", [0.07, 0.1, 0.3])  # each is rounded by float32
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_in_float64_value_and_gradient_have_the_digits_of_float64(temperature, seed):
    random = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(20, 8, dtype=torch.float64, generator=random)
    labels = torch.randint(0, 6, (20,), generator=random)
    ours = value_and_gradient(supcon_loss, embeddings, labels, temperature)
    wanted = value_and_gradient(equation_2, embeddings, labels, temperature)
    for a, b in zip(ours, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [0.01, 0.03, 0.07])
def test_the_loss_is_never_negative(temperature, dtype):
    """Two classes far apart, two views each: the loss is exp(−1/τ), and rounding alone decides its sign."""
    random = torch.Generator().manual_seed(0)
    for spread in (0, 1e-6, 1e-3, 1e-2):
        embeddings = torch.eye(2, 8).repeat(2, 1) + spread * torch.randn(4, 8, generator=random)
        assert supcon_loss(embeddings.to(dtype), [0, 1, 0, 1], temperature) >= 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_inside_autocast_the_loss_is_that_of_float32(dtype):
    random = torch.Generator().manual_seed(0)
    embeddings, labels = torch.randn(24, 16, generator=random), torch.arange(6).repeat(4)
    weights = torch.randn(16, 8, generator=random)

    def inside(embeddings, labels, *more):
        with torch.autocast("cpu", dtype):
            return supcon_loss(embeddings, labels, 0.07, *more)

    memory = torch.randn(10, 16, generator=random), torch.arange(10)
    for more in ((), memory):
        ours = value_and_gradient(inside, embeddings, labels, *more)
        wanted = value_and_gradient(supcon_loss, embeddings, labels, 0.07, *more)
        assert torch.equal(ours[0], wanted[0])
        assert torch.equal(ours[1], wanted[1])
    with torch.autocast("cpu", dtype):
        half = embeddings @ weights  # a layer inside autocast gives half precision
        value = supcon_loss(half, labels, 0.07)
    assert half.dtype == dtype
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), equation_2(half, labels, 0.07), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("images", "views"), [(5, 1), (6, 2), (4, 3)])
def test_the_shapes_of_supcontrast_are_taken(images, views):
    random = torch.Generator().manual_seed(images)
    embeddings = torch.randn(images, views, 8, generator=random)
    labels = torch.arange(images) % 3
    flat, of_each_view = embeddings.flatten(0, 1), labels.repeat_interleave(views)
    wanted = equation_2(flat, of_each_view, 0.1).float()
    for given in (labels, labels.tolist(), labels.numpy()):
        torch.testing.assert_close(supcon_loss(embeddings, given), wanted)
    for given in (of_each_view, of_each_view.tolist(), tuple(of_each_view.tolist())):
        torch.testing.assert_close(supcon_loss(flat, given), wanted)


@pytest.mark.parametrize(
    ("shape", "labels"), [((4, 8), [0, 1]), ((4, 2, 8), [0, 1] * 4), ((4,), [0] * 4), ((4, 2, 2, 8), [0] * 4)]
)
def test_other_shapes_are_a_sentence(shape, labels):
    with pytest.raises(ValueError, match=r"give \(views, dimension\) with \(views,\), or \(images, v"):
        supcon_loss(torch.ones(shape), labels)


def test_the_matrix_of_all_pairs_is_never_made():
    """The plain way has several of 4096 × 4096 numbers, 67 MB each; no tensor of ours comes near one."""
    embeddings = torch.randn(4096, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    with torch.profiler.profile(profile_memory=True) as profile:
        supcon_loss(embeddings, torch.arange(64).repeat(64)).backward()
    assert max(event.self_cpu_memory_usage for event in profile.events()) < 4096 * 4096 * 4 / 2
