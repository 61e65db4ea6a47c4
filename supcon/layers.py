"""A network in; its stages from the input to the output, its trained weights and their rates out."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import nn

from retrieval.backbones.fine_tuned import Mapped
from retrieval.errors import InputError
from supcon.settings import Freeze

STACKS = ("blocks", "stages", "layers", "levels", "features", "body")  # libraries' names of a list of stages
DEPTH = 8  # steps of the layer-wise decay from the output to the input, as EfficientNet has
MAX_CHANGE = 0.05  # of a weight in a step: AdamW moves every weight by the rate, however small the weight is


def stages(network: nn.Module) -> list[list[nn.Parameter]]:
    """Return the parameters of each stage of a network, from the input to the output.

    A stage is a child of the network, or a child of one of its STACKS. A child with vectors only, such as a
    norm, belongs to the stage before.
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


def freeze(network: nn.Module, how: Freeze, model_name: str) -> list[list[nn.Parameter]]:
    """Freeze a part of the network; return the weights of each stage that are trained, from the input on.

    "bn" freezes only the statistics of batch normalisations, which are always frozen; "stem" the first two
    fifths of the stages; "all_but_last" all stages but the last; "backbone" everything but the linear map on
    it. Raises InputError for a network without weights to train.
    """
    every = stages(network)
    count = len(every)
    frozen = {"bn": 0, "stem": round(count * 0.4), "all_but_last": count - 1, "backbone": count - 1}[how]
    for number, stage in enumerate(every):
        for parameter in stage:
            parameter.requires_grad_(number >= frozen and parameter.is_floating_point())
    trained = [[p for p in stage if p.requires_grad] for stage in every]
    if not any(trained):
        raise InputError(
            f"--model {model_name} has no weights to train: give another --model, or another --freeze"
        )
    return trained


def parameter_groups(trained: list[list[nn.Parameter]], head: nn.Module, settings: object) -> list[dict]:
    """Return AdamW's parameter groups: a rate for each stage and the head, and no weight decay of vectors.

    The rate falls by `layer_decay` eight times from the output to the input. No rate exceeds MAX_CHANGE times
    the root mean square of its stage's smallest matrix (a trust region, as in You et al. 2020): networks
    differ, and dlib's weights are a tenth of EfficientNet's.
    """
    groups = []
    step = DEPTH / max(1, len(trained) - 1)
    for from_the_end, stage in enumerate(reversed(trained)):
        sizes = [p.detach().square().mean().sqrt().item() for p in stage if p.ndim > 1]
        rate = settings.lr * settings.layer_decay ** (step * from_the_end)
        rate = min([rate, *(MAX_CHANGE * size for size in sizes if size)])
        groups += _with_and_without_decay(stage, rate, settings.weight_decay)
    return groups + _with_and_without_decay(list(head.parameters()), settings.head_lr, settings.weight_decay)


def _with_and_without_decay(parameters: list[nn.Parameter], rate: float, decay: float) -> list[dict]:
    kinds = ([p for p in parameters if p.ndim > 1], decay), ([p for p in parameters if p.ndim < 2], 0.0)
    return [{"params": kind, "lr": rate, "rate": rate, "weight_decay": d} for kind, d in kinds if kind]


def share_of_rate(progress: float, warmup: float) -> float:
    """Return the rate / the highest rate after a share `progress` of the training: warm-up, then cosine.

    >>> [round(share_of_rate(p, 0.1), 3) for p in (0.0, 0.05, 0.1, 0.55, 1.0)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    if progress < warmup:
        return progress / warmup
    return (1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup)))) / 2
