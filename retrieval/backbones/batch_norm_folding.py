"""A network with batch normalisations in; the same network with those inside its convolutions out."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn


def fold_batch_norms(network: nn.Module, images: Tensor) -> nn.Module:
    """A copy of a network in inference mode, its batch normalisations folded into the convolutions before.

    A normalisation by fixed statistics is a scale and a shift a channel, which the convolution can do itself.
    Which one lies behind which convolution is seen by sending `images` (images, 3, size, size) through.
    Raises ValueError if the copy does not compute the same, as where a convolution feeds something else too.
    """
    import torch

    folded = copy.deepcopy(network)
    with torch.no_grad():
        for convolution, norm in _pairs(folded, images):
            fused = torch.nn.utils.fuse_conv_bn_eval(
                folded.get_submodule(convolution), folded.get_submodule(norm)
            )
            folded.set_submodule(convolution, fused)
            # timm's normalisations do the activation too
            folded.set_submodule(norm, getattr(folded.get_submodule(norm), "act", torch.nn.Identity()))
        wanted, given = network(images), folded(images)
    if not torch.allclose(given, wanted, rtol=1e-3, atol=1e-3 * wanted.abs().max().item()):
        raise ValueError("the folded network computes something else")
    return folded


def _pairs(network: nn.Module, images: Tensor) -> list[tuple[str, str]]:
    """The names of each convolution and of the normalisation that takes its output, in order of use."""
    from torch import nn

    made: dict[int, tuple[str, Tensor]] = {}  # the tensors are kept, so that no two have one id
    pairs: list[tuple[str, str]] = []

    def keep(name: str) -> object:
        return lambda module, inputs, output: made.update({id(output): (name, output)})

    def find(name: str) -> object:
        return lambda module, inputs: (
            pairs.append((made[id(inputs[0])][0], name)) if id(inputs[0]) in made else None
        )

    hooks = []
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(keep(name)))
        elif isinstance(module, nn.BatchNorm2d):
            hooks.append(module.register_forward_pre_hook(find(name)))
    network(images)
    for hook in hooks:
        hook.remove()
    return pairs
