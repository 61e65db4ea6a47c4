"""A network in; its stages from the input to the output, what of them is trained, and how fast, out."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import nn

from retrieval.backbones.fine_tuned import Mapped
from retrieval.errors import InputError
from supcon.settings import Freeze

STACKS = ("blocks", "stages", "layers", "levels", "features", "body")  # what libraries call a list of stages
DEPTH = 8  # steps of the layer-wise decay from the output to the input, as EfficientNet has
MOST_OF_A_WEIGHT = 0.05  # that a step may change: AdamW moves every weight by the rate, however small it is


def stages(network: nn.Module) -> list[list[nn.Parameter]]:
    """The parameters of each stage of a network, from the input to the output.

    A stage is a part of the network, or a part of its STACKS. What holds only vectors, such as a norm,
    belongs to the stage before.
    """
    if isinstance(network, Mapped):
        return [*stages(network.network), list(network.map.parameters())]
    found: list[list[nn.Parameter]] = []
    for part in _parts(network):
        parameters = list(part.parameters())
        if not found or any(parameter.ndim > 1 for parameter in parameters):
            found.append([])
        found[-1] += parameters
    found[0] += network.parameters(recurse=False)  # such as a transformer's position embedding
    return [stage for stage in found if stage]


def _parts(network: nn.Module) -> Iterator[nn.Module]:
    for name, part in network.named_children():
        if name in STACKS and isinstance(part, nn.Sequential | nn.ModuleList):
            yield from part
        else:
            yield part


def freeze(network: nn.Module, how: Freeze, word: str) -> list[list[nn.Parameter]]:
    """Let only a part of the network learn: the stages that do, from the input to the output.

    "bn" freezes nothing but the statistics of batch normalisations, which are always frozen; "stem" the first
    two fifths of the stages; "all_but_last" all but the last; "backbone" all but the linear map on it.
    Raises InputError for a network that has nothing to learn.
    """
    every = stages(network)
    count = len(every)
    frozen = {"bn": 0, "stem": round(count * 0.4), "all_but_last": count - 1, "backbone": count - 1}[how]
    for number, stage in enumerate(every):
        for parameter in stage:
            parameter.requires_grad_(number >= frozen and parameter.is_floating_point())
    learned = [[p for p in stage if p.requires_grad] for stage in every[frozen:]]
    if not any(learned):
        raise InputError(f"--model {word} has no weights to train: give another word, or another --freeze")
    return learned


def parameter_groups(
    learned: list[list[nn.Parameter]], head: nn.Module, stages_in_all: int, settings: object
) -> list[dict]:
    """What AdamW takes: each stage with its rate, the head with its own, and no decay of vectors.

    The rate falls by `layer_decay` eight times from the output to the input. No stage's is above a share
    MOST_OF_A_WEIGHT of the root mean square of its smallest matrix (a trust region, as in You et al. 2020):
    networks differ, and the weights of dlib's are a tenth of those of EfficientNet.
    """
    groups = []
    step = DEPTH / max(1, stages_in_all - 1)
    for from_the_end, stage in enumerate(reversed(learned)):
        sizes = [p.detach().square().mean().sqrt().item() for p in stage if p.ndim > 1]
        rate = settings.lr * settings.layer_decay ** (step * from_the_end)
        rate = min([rate, *(MOST_OF_A_WEIGHT * size for size in sizes if size)])
        groups += _with_and_without_decay(stage, rate, settings.weight_decay)
    return groups + _with_and_without_decay(list(head.parameters()), settings.head_lr, settings.weight_decay)


def _with_and_without_decay(parameters: list[nn.Parameter], rate: float, decay: float) -> list[dict]:
    matrices = [p for p in parameters if p.ndim > 1]
    vectors = [p for p in parameters if p.ndim < 2]
    groups = [
        {"params": matrices, "lr": rate, "rate": rate, "weight_decay": decay},
        {"params": vectors, "lr": rate, "rate": rate, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def share_of_rate(progress: float, warmup: float) -> float:
    """The share of the highest learning rate at a share `progress` of the training: warm-up, then cosine.

    >>> [round(share_of_rate(p, 0.1), 3) for p in (0.0, 0.05, 0.1, 0.55, 1.0)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    if progress < warmup:
        return progress / warmup
    return (1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup)))) / 2
