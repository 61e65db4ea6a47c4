"""A network in; the same network with its batch norms folded into its convolutions out."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

VERSION = 1  # part of the cache key: raise it when a folded network gives other vectors


def fold_batch_norms(network: nn.Module, images: Tensor) -> nn.Module:
    """Return a copy of a network in inference mode with batch norms folded into the convolutions before.

    A batch norm with fixed statistics scales and shifts each channel, which the convolution can do itself. A
    pass of `images` (images, 3, size, size) shows which batch norm follows which convolution. Raises
    ValueError if the copy gives other outputs, as it does if a convolution also feeds another layer.
    """
    folded = copy.deepcopy(network)
    with torch.no_grad():
        for convolution, norm in _pairs(folded, images):
            fused = nn.utils.fuse_conv_bn_eval(folded.get_submodule(convolution), folded.get_submodule(norm))
            folded.set_submodule(convolution, fused)
            # timm's batch norms include the activation
            folded.set_submodule(norm, getattr(folded.get_submodule(norm), "act", nn.Identity()))
        wanted, given = network(images), folded(images)
    if not torch.allclose(given, wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item()):
        raise ValueError("the folded network computes something else")
    return folded


def _pairs(network: nn.Module, images: Tensor) -> list[tuple[str, str]]:
    """Return the names of each convolution and the batch norm that takes its output, in the order of use."""
    names = {module: name for name, module in network.named_modules()}
    outputs: dict[Tensor, str] = {}  # tensors are compared by identity
    pairs: list[tuple[str, str]] = []

    def _after_convolution(module: nn.Module, inputs: Any, output: Tensor) -> None:
        outputs[output] = names[module]

    def _before_norm(module: nn.Module, inputs: Any) -> None:
        if inputs[0] in outputs:
            pairs.append((outputs[inputs[0]], names[module]))

    hooks = []
    for module in names:
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(_after_convolution))
        elif isinstance(module, nn.BatchNorm2d):
            hooks.append(module.register_forward_pre_hook(_before_norm))
    network(images)
    for hook in hooks:
        hook.remove()
    return pairs
