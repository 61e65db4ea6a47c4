"""Seven images of one colour each, and a network that counts what it sees: for the tests of the cache."""

import os

import torch
from conftest import by_torch
from PIL import Image
from torch import nn

from get_images import find_images
from retrieval.backbones.backbone import Backbone
from retrieval.backbones.transform import Transform
from retrieval.embedding.cache import Cache
from retrieval.embedding.embed import embed


class Corner(nn.Module):
    """The channels of the first pixel, times a weight; it counts the images it sees."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.seen = 0

    def forward(self, images):
        self.seen += len(images)
        return images[:, :, 0, 0] * self.weight


def corner():
    return Backbone(Corner(), 3, Transform(2, "bicubic"), (0, 0, 0), (1, 1, 1), "corner")


def painted(folder):
    """Write the images into a new folder, and find them."""
    folder.mkdir()
    for name in range(7):
        paint(folder / f"{name}.png", name + 1)
    return find_images(folder)


def paint(path, level):
    """An image of one colour, written long ago."""
    Image.new("RGB", (3, 5), (level, 2 * level, 200)).save(path)
    os.utime(path, (1e9, 1e9))


def runtime_of(backbone, batch=1):
    return by_torch(backbone, batch, repr(backbone.network.weight.tolist()).encode())


def embedded(files, backbone, folder, **how):
    """The vectors, and how many images the network saw for them."""
    before = backbone.network.seen
    vectors = embed(files, runtime_of(backbone), cache=Cache(folder, **how)).vectors
    return vectors, backbone.network.seen - before
