"""A file of weights in; the torch network of a row in zoo.py, filled with them, out."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from retrieval.backbones.filling import load_weights

if TYPE_CHECKING:
    from torch import nn

# ---- EfficientNet-Lite ----------------------------------------------------------------------------


def lite(number: int) -> Callable[[Path | None], nn.Module]:
    """Return the builder of timm's tf_efficientnet_lite, whose weights have efficientnet_pytorch's names."""

    def network(file: Path | None) -> nn.Module:
        import timm

        network = timm.create_model(f"tf_efficientnet_lite{number}", pretrained=False)
        blocks = [(stage, i) for stage, depth in enumerate(network.blocks) for i in range(len(depth))]
        if file:
            title = f"EfficientNet-Lite{number}"
            load_weights(network, file, title, lambda name: lite_name_in_timm(name, blocks))
        network.reset_classifier(0)
        return network

    return network


def lite_name_in_timm(name: str, blocks: list[tuple[int, int]]) -> str:
    """Return timm's name for a tensor of efficientnet_pytorch; `blocks` are timm's (stage, block) in order.

    >>> lite_name_in_timm("_blocks.1._expand_conv.weight", [(0, 0), (1, 0)])
    'blocks.1.0.conv_pw.weight'
    """
    part, _, rest = name.partition(".")
    outer = {
        "_conv_stem": "conv_stem",
        "_bn0": "bn1",
        "_conv_head": "conv_head",
        "_bn1": "bn2",
        "_fc": "classifier",
    }
    if part in outer:
        return f"{outer[part]}.{rest}"
    inside = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(.+)", name)
    if not inside or int(inside[1]) >= len(blocks):
        return name  # of another network: load_weights refuses it
    stage, block = blocks[int(inside[1])]
    if stage == 0:  # has no expansion: depthwise, then pointwise
        layers = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    else:  # pointwise expansion, depthwise, pointwise linear projection
        layers = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
                  "_project_conv": "conv_pwl", "_bn2": "bn3"}  # fmt: skip
    return f"blocks.{stage}.{block}.{layers.get(inside[2], inside[2])}.{inside[3]}"


# ---- ResNet-50, ImageNet and SimCLR ---------------------------------------------------------------


def resnet50(file: Path | None) -> nn.Module:
    """Build torchvision's ResNet-50 without its last layer: the pooled features, 2048-d."""
    from torch.nn import Identity
    from torchvision.models import resnet50

    network = resnet50(weights=None)
    network.fc = Identity()
    if file:
        load_weights(network, file, "ResNet-50", resnet_name_in_torchvision)
    return network


# lightly's backbone is nn.Sequential over the children of a ResNet, without the last.
CHILDREN = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}


def resnet_name_in_torchvision(name: str) -> str:
    """Return torchvision's name for a tensor of lightly's numbered children, or of SupContrast's ResNet.

    >>> (
    ...     resnet_name_in_torchvision("4.0.conv1.weight"),
    ...     resnet_name_in_torchvision("layer1.0.shortcut.0.weight"),
    ... )
    ('layer1.0.conv1.weight', 'layer1.0.downsample.0.weight')
    """
    first, dot, rest = name.partition(".")
    return f"{CHILDREN.get(first, first)}{dot}{rest}".replace(".shortcut.", ".downsample.")


# ---- faces ----------------------------------------------------------------------------------------


def facenet(file: Path | None) -> nn.Module:
    """Build FaceNet, facenet-pytorch's InceptionResnetV1, without its classifier: 512-d."""
    from facenet_pytorch import InceptionResnetV1

    network = InceptionResnetV1()
    if file:
        load_weights(network, file, "FaceNet")
    return network


def dlib(file: Path | None) -> nn.Module:
    """Build dlib's face network from dlib's file (.dat), or from a state dict: 128-d."""
    from retrieval.backbones.dlib_network import DlibFaceNetwork, read_dlib_weights

    network = DlibFaceNetwork()
    if file and file.suffix == ".dat":
        network.load_state_dict(read_dlib_weights(file))
    elif file:
        load_weights(network, file, "dlib's face network")
    return network
