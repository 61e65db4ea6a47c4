"""Model names in; how many images a second each network embeds on this machine, out.

    python benchmarks/backbones.py clip:base dinov2 --images 64
    python benchmarks/backbones.py arcface sface --device cuda --write /tmp/weights

Each network has random weights: speed does not depend on them. The runtime is the one that a run of many
images chooses, and its inputs are noise, so that reading does not count. Networks that are published as ONNX
are made here: `arcface` and `adaface` as their authors describe them, InsightFace's ResNets of 50 and 100
layers; `sface` and `arcface:small` as MobileNetV2, and `lvface` as a vision transformer, of about the same
number of parameters. `--write FOLDER` keeps them, so that `model_not_tuned.py --model_type arcface --weights
FOLDER/arcface.onnx` can be timed as a whole.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from retrieval.backbones.backbone import LazyBackbone, find_backbone, find_pretrained
from retrieval.backbones.weights import InPackage
from retrieval.backbones.zoo import PRETRAINED
from retrieval.embedding.loader import Batch
from retrieval.embedding.runtime import Runtime, choose_runtime

# ---- networks that are published as ONNX ----------------------------------------------------------


class Residual(nn.Module):
    """A block of InsightFace's ResNet (arcface_torch/backbones/iresnet.py)."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.BatchNorm2d(channels), nn.Conv2d(channels, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out),
            nn.PReLU(out), nn.Conv2d(out, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out),
        )  # fmt: skip
        self.shortcut = nn.Identity()
        if stride > 1:
            conv = nn.Conv2d(channels, out, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (images, channels, side, side) to (images, out, side / stride, side / stride)."""
        return self.layers(x) + self.shortcut(x)


def iresnet(*depths: int) -> nn.Module:
    """InsightFace's ResNet for 112 pixels, 512-d, with so many blocks in each of its four stages."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.PReLU(64)]
    channels = 64
    for depth, out in zip(depths, (64, 128, 256, 512), strict=True):
        for block in range(depth):
            layers.append(Residual(channels, out, 1 if block else 2))
            channels = out
    end = [nn.BatchNorm2d(512), nn.Flatten(), nn.Linear(512 * 7 * 7, 512), nn.BatchNorm1d(512)]
    return nn.Sequential(*layers, *end)


def of_timm(name: str, dimension: int, **settings: int) -> nn.Module:
    """A network of timm, as a stand-in."""
    import timm

    return timm.create_model(name, num_classes=dimension, **settings)


ONNX = {
    "arcface": lambda: iresnet(3, 4, 14, 3),
    "adaface": lambda: iresnet(3, 13, 30, 3),
    "lvface": lambda: of_timm("vit_base_patch16_224", 512, img_size=112, patch_size=8),
    "arcface:small": lambda: of_timm("mobilenetv2_110d", 512),
    "sface": lambda: of_timm("mobilenetv2_140", 128),
}


def write_onnx(name: str, folder: Path) -> Path:
    """Write the network of a name with random weights."""
    file = folder / f"{name.replace(':', '_')}.onnx"
    if not file.exists():
        torch.manual_seed(0)
        torch.onnx.export(ONNX[name]().eval(), (torch.zeros(2, 3, 112, 112),), file, dynamo=False,
                          opset_version=17, input_names=["data"], output_names=["embedding"],
                          dynamic_axes={"data": {0: "n"}, "embedding": {0: "n"}})  # fmt: skip
    return file


# ---- speed ----------------------------------------------------------------------------------------


def random_backbone(name: str, device: str, folder: Path) -> LazyBackbone:
    """Return the backbone of a name with random weights, unless a package carries its own."""
    if isinstance(find_pretrained(name).weights, InPackage):
        file = None
    elif name in ONNX:
        file = write_onnx(name, folder)
    else:
        torch.manual_seed(0)
        file = folder / f"{name.replace(':', '_')}.pth"
        torch.save(find_pretrained(name).network(None).state_dict(), file)
    return find_backbone(name, device, file, crop="none")


def images_per_second(runtime: Runtime, images: int) -> float:
    """Embed batches of noise until there are so many images; return the images a second."""
    size = runtime.backbone.transform.size
    noise = np.random.default_rng(0).integers(0, 256, (runtime.batch_size, 3, size, size), np.uint8)
    names = list(map(str, range(len(noise))))

    def _results(count: int) -> Iterator[np.ndarray]:
        waiting = []
        for _ in range(count):
            waiting.append(runtime.start(Batch(names, noise, [None] * len(names))))
            if len(waiting) > 2 * runtime.threads:
                yield waiting.pop(0)()
        yield from (wait() for wait in waiting)

    batches = max(1, round(images / len(noise)))
    for _ in _results(2 * runtime.threads):  # the first batches allocate memory
        pass
    start = time.perf_counter()
    for _ in _results(batches):
        pass
    return batches * len(noise) / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(PRETRAINED))
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.write or Path(temporary)
        folder.mkdir(exist_ok=True)
        for name in arguments.names:
            lazy = random_backbone(name, arguments.device, folder)
            runtime = choose_runtime(lazy, "auto", 10_000, None, None)
            runtime.settle()
            speeds = [images_per_second(runtime, arguments.images) for _ in range(arguments.rounds)]
            spread = f"{min(speeds):.1f} to {max(speeds):.1f}, n {len(speeds)}"
            speed = f"{statistics.median(speeds):.1f} images/s ({spread})"
            print(f"{name}: {speed}, {runtime.name} on {lazy.device}", flush=True)


if __name__ == "__main__":
    main()
