"""dlib's weight file in; its face network, as a torch module that can also be trained, out.

The network: 29 convolutions in residual blocks, after He et al., "Deep Residual Learning for Image
Recognition", 2016; trained by Davis E. King (dlib's examples/dnn_face_recognition_ex.cpp), who gave the
weights into the public domain. The file's format: dlib's serialize.h and dnn/layers.h. When the network gives
other vectors, raise `version` of its row in zoo.py.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from retrieval.errors import InputError

# (channels, whether the block halves the sides), from the input to the output
BLOCKS = [(32, False)] * 3 + [(64, True)] + [(64, False)] * 3 + [(128, True)] + [(128, False)] * 2
BLOCKS += [(256, True), (256, False), (256, False), (256, True)]
MEAN = (122.782, 117.001, 104.298)  # of R, G, B, 0 to 255; the input is (pixel − mean) / 256
AROUND_TENSORS = "e2f5042ef6e91b64c0c41cd443e2a85ef13c9ce9853d581bcdc6b170687a1c29"  # SHA-256


# ---- the network ----------------------------------------------------------------------------------


class Affine(nn.Module):
    """Scale and shift each channel: a batch norm with fixed statistics."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:  # (images, channels, height, width)
        # Not addcmul: ONNX Runtime fuses a product and a sum into the convolution before them.
        return x * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)


class Block(nn.Module):
    """Two 3 × 3 convolutions and a shortcut; where they halve the sides, the shortcut is average-pooled."""

    def __init__(self, inputs: int, channels: int, halves: bool) -> None:
        super().__init__()
        self.halves = halves
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride=2 if halves else 1, padding=0 if halves else 1)
        self.affine1 = Affine(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.affine2 = Affine(channels)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.affine2(self.conv2(self.affine1(self.conv1(x)).relu()))
        if not self.halves:
            return (branch + x).relu()
        shortcut = functional.avg_pool2d(x, 2)
        # dlib adds tensors of unequal shape by padding channels, rows and columns with zeros.
        shape = [max(sides) for sides in zip(branch.shape, shortcut.shape, strict=True)]
        return (_with_zeros(branch, shape) + _with_zeros(shortcut, shape)).relu()


def _with_zeros(x: Tensor, shape: list[int]) -> Tensor:
    """Pad `x` to `shape` with zeros after the last channel, row and column."""
    lacks = [wanted - there for wanted, there in zip(shape, x.shape, strict=True)]
    return functional.pad(x, [side for lack in reversed(lacks[1:]) for side in (0, lack)])


class DlibFaceNetwork(nn.Module):
    """Map faces (faces, 3, 150, 150), (pixel − mean) / 256, to descriptors (faces, 128) of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, 7, stride=2)
        self.affine1 = Affine(32)
        inputs = [32, *(channels for channels, _ in BLOCKS[:-1])]
        self.blocks = nn.Sequential(*(Block(n, *block) for n, block in zip(inputs, BLOCKS, strict=True)))
        self.fc = nn.Linear(256, 128, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(self.affine1(self.conv1(x)).relu(), 3, stride=2)
        return self.fc(self.blocks(x).mean((2, 3)))


# ---- the file -------------------------------------------------------------------------------------


def read_dlib_weights(file: Path) -> dict[str, Tensor]:
    """Read the state dict of a DlibFaceNetwork.

    The file lists the layers from the input to the output. A tensor is a version, four sizes, then float32.
    Raises InputError unless each tensor has its place, and the bytes around the tensors are dlib's own.
    """
    data, at, around, state = file.read_bytes(), 0, hashlib.sha256(), {}

    def take(*sizes: int) -> Tensor:
        """Return the next tensor of these sizes."""
        nonlocal at
        head = b"".join(map(_packed, (2, *sizes)))
        start, length = data.find(head, at) + len(head), 4 * math.prod(sizes)
        if start < at + len(head) or len(data) < start + length:
            raise InputError(f"{file} does not hold dlib's face network: no {sizes} numbers after byte {at}")
        around.update(data[at:start])
        at = start + length
        return torch.from_numpy(np.frombuffer(data[start:at], "<f4").astype(np.float32))

    wanted = DlibFaceNetwork().state_dict()
    for name, like in wanted.items():
        if name == "fc.weight":  # inputs × outputs
            state[name] = take(*like.T.shape, 1, 1).view(like.T.shape).T.contiguous()
        elif name.endswith(".weight"):  # of a convolution or Affine, then its biases
            layer = name.removesuffix("weight")
            values = take(like.numel() + like.shape[0], 1, 1, 1)
            state[name] = values[: like.numel()].view(like.shape)
            state[f"{layer}bias"] = values[like.numel() :]
    around.update(data[at:])
    if around.hexdigest() != AROUND_TENSORS:
        raise InputError(f"{file} does not hold dlib's face network: its layers have other settings")
    return state


def _packed(number: int) -> bytes:
    """Return a positive integer as dlib writes it: the number of bytes, then the bytes, the lowest first."""
    count = (number.bit_length() + 7) // 8
    return bytes([count]) + number.to_bytes(count, "little")
