"""dlib's weight file in; its face network, as a torch module that can also be trained, out.

The network: 29 convolutions in residual blocks, after He et al., "Deep Residual Learning for Image
Recognition", 2016; trained by Davis E. King (dlib's examples/dnn_face_recognition_ex.cpp), who gave the
weights into the public domain. The file's format: dlib's serialize.h and dnn/layers.h. When the network gives
other vectors, raise `version` of its row in zoo.py.
"""

from __future__ import annotations

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

    Checks every byte. Raises InputError with the position of the first wrong one.
    """
    data = _Data(file)
    data.expect("the head", [data.integer(), data.text()], [1, "loss_metric_2"])
    data.floats(2)  # margin and threshold of the loss
    # The versions of the layers from the output to the input: layers have 2, tags and skips 1, the first 3.
    block = {True: [2, 2, 2, 1, 1, 2, 2, 2, 2, 2, 1], False: [2] * 7 + [1]}
    versions = [2, 2, *(v for _, halves in reversed(BLOCKS) for v in block[halves]), 2, 2, 2, 3]
    data.expect("the versions", [data.integer() for _ in versions], versions)
    data.expect("the input", data.text(), "input_rgb_image_sized")
    data.expect("the mean", tuple(round(mean, 3) for mean in data.floats(3)), MEAN)
    data.expect("the input's size", [data.integer(), data.integer()], [150, 150])

    state = data.convolution("conv1", 3, 32, 7, stride=2, padding=0)
    data.expect("conv1's expansion", data.integer(), 1)
    state |= data.affine("affine1", 32)
    data.plain("relu_")
    data.plain("max_pool_2", 3, 3, 2, 2, 0, 0)
    inputs = 32
    for number, (channels, halves) in enumerate(BLOCKS):
        state |= data.block(f"blocks.{number}", inputs, channels, halves)
        inputs = channels
    data.plain("avg_pool_2", 0, 0, 1, 1, 0, 0)
    state |= data.linear("fc", 256, 128)
    data.expect("bytes after the end", len(data.bytes) - data.at, 0)
    return state


class _Data:
    """The bytes of the file and a reading position."""

    def __init__(self, file: Path) -> None:
        self.file, self.at = file, 0
        self.bytes = file.read_bytes()

    def demand(self, fine: bool, otherwise: str) -> None:
        """Raise InputError with the reason `otherwise` unless the file is `fine`."""
        if not fine:
            raise InputError(
                f"{self.file} does not hold dlib's face network: before byte {self.at}, {otherwise}"
            )

    def expect(self, what: str, found: object, wanted: object) -> None:
        """Raise InputError unless `found` equals `wanted`; `what` names the values."""
        self.demand(found == wanted, f"{what}: {str(found)[:60]!r} instead of {str(wanted)[:60]!r}")

    def take(self, count: int) -> bytes:
        """Read the next bytes."""
        self.demand(len(self.bytes) - self.at >= count, "it ends too early")
        self.at += count
        return self.bytes[self.at - count : self.at]

    def integer(self) -> int:
        """Read an integer: a control byte (sign, number of bytes), then the bytes, the lowest first."""
        control = self.take(1)[0]
        self.demand((control & 0x7F) <= 8, "an integer of more than eight bytes")
        value = int.from_bytes(self.take(control & 0x0F), "little")
        return -value if control & 0x80 else value

    def floats(self, count: int) -> tuple[float, ...]:
        """Read floats, each a mantissa and a power of two."""
        pairs = [(self.integer(), self.integer()) for _ in range(count)]
        self.demand(all(abs(power) < 1000 for _, power in pairs), "a number beyond all bounds")
        return tuple(mantissa * 2.0**power for mantissa, power in pairs)

    def text(self) -> str:
        """Read a text: its length, then its letters."""
        return self.take(self.integer()).decode("ascii", "replace")

    def numbers(self, *wanted: int) -> None:
        """Read integers and check them."""
        self.expect("a layer's numbers", [self.integer() for _ in wanted], list(wanted))

    def tensor(self, *shape: int) -> Tensor:
        """Read a tensor: a version, four sizes, then float32."""
        self.numbers(2, *shape)
        values = np.frombuffer(self.take(4 * int(np.prod(shape))), dtype="<f4")
        self.demand(bool(np.isfinite(values).all()), "weights that are no numbers")
        return torch.from_numpy(values.astype(np.float32))

    def layer_ends(self) -> None:
        """Read the end of a layer: three flags and three empty tensors, which dlib uses in training."""
        self.expect("flags other than 0 and 1", set(self.take(3)) - {ord("0"), ord("1")}, set())
        for _ in range(3):
            self.tensor(0, 0, 0, 0)

    def plain(self, name: str, *numbers: int) -> None:
        """Read a layer without weights."""
        self.expect("a layer", self.text(), name)
        self.numbers(*numbers)
        self.layer_ends()

    def convolution(self, ours: str, inputs: int, filters: int, side: int, stride: int, padding: int) -> dict:
        """Read con_4: all filters in torch's layout, then the biases."""
        self.expect("a layer", self.text(), "con_4")
        size = filters * inputs * side * side
        values = self.tensor(size + filters, 1, 1, 1)
        self.numbers(filters, side, side, stride, stride, padding, padding)
        self.numbers(1, filters, inputs, side, side, 1, 1, filters, 1, 1)
        self.floats(4)  # factors of the learning rate and of the weight decay
        self.layer_ends()
        return {
            f"{ours}.weight": values[:size].view(filters, inputs, side, side),
            f"{ours}.bias": values[size:],
        }

    def affine(self, ours: str, channels: int) -> dict:
        """Read affine_: gamma, then beta."""
        self.expect("a layer", self.text(), "affine_")
        values = self.tensor(2 * channels, 1, 1, 1)
        self.numbers(1, 1, channels, 1, 1, 1, 1, channels, 1, 1, 0)
        self.layer_ends()
        return {f"{ours}.weight": values[:channels], f"{ours}.bias": values[channels:]}

    def block(self, ours: str, inputs: int, channels: int, halves: bool) -> dict:
        """Read the layers of a residual block."""
        stride, padding = (2, 0) if halves else (1, 1)
        state = self.convolution(f"{ours}.conv1", inputs, channels, 3, stride, padding)
        state |= self.affine(f"{ours}.affine1", channels)
        self.plain("relu_")
        state |= self.convolution(f"{ours}.conv2", channels, channels, 3, 1, 1)
        state |= self.affine(f"{ours}.affine2", channels)
        if halves:
            self.plain("avg_pool_2", 2, 2, 2, 2, 0, 0)
        self.plain("add_prev_")
        self.plain("relu_")
        return state

    def linear(self, ours: str, inputs: int, outputs: int) -> dict:
        """Read fc_2: inputs × outputs, without biases."""
        self.expect("a layer", self.text(), "fc_2")
        self.numbers(outputs, inputs)
        values = self.tensor(inputs, outputs, 1, 1)
        self.numbers(1, inputs, outputs, 1, 1, 1, 0, 0, 0, 0, 1)
        self.floats(4)
        self.layer_ends()
        return {f"{ours}.weight": values.view(inputs, outputs).T.contiguous()}
