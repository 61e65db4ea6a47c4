"""The features and labels of a batch in; the loss of each head out.

A head is trained on a backbone's features and thrown away afterwards. It takes `features` (views, dimension)
and `labels` (views,) and returns the loss of the batch.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pytorch_metric_learning import losses, miners
from torch import Tensor, nn
from torch.nn import functional

from supcon.losses import supcon_loss
from supcon.variants import Choices


class Classifier(nn.Module):
    """Dropout, one linear layer, cross-entropy with label smoothing."""

    def __init__(self, dimension: int, classes: int, choices: Choices) -> None:
        super().__init__()
        self.dropout = nn.Dropout(choices["dropout"])
        self.linear = nn.Linear(dimension, classes)
        self.label_smoothing = choices["label_smoothing"]

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        logits = self.linear(self.dropout(features))
        return functional.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)


class Projection(nn.Module):
    """An MLP whose output the supervised contrastive loss compares; the embedding is the MLP's input.

    The hidden and the output width, 512 and 128, are those of Khosla et al. 2020.
    """

    def __init__(self, dimension: int, classes: int, choices: Choices) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(dimension, 512), nn.ReLU(), nn.Linear(512, 128))
        self.temperature = choices["temperature"]
        self.memory = Memory(choices["memory"], 128) if choices["memory"] else None

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        z = self.layers(features)
        if self.memory is None:
            return supcon_loss(z, labels, self.temperature)
        self.memory.coming = z.detach(), labels
        return supcon_loss(z, labels, self.temperature, *self.memory.entries())


class Memory(nn.Module):
    """The projections and labels of the latest batches (cross-batch memory, Wang et al. 2020)."""

    def __init__(self, entries: int, dimension: int) -> None:
        super().__init__()
        self.register_buffer("vectors", torch.zeros(entries, dimension))
        self.register_buffer("labels", torch.zeros(entries, dtype=torch.long))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.coming: tuple[Tensor, Tensor] | None = None  # from a step that may still fail

    def entries(self) -> tuple[Tensor, Tensor]:
        """Return the filled entries: (entries, dimension) and (entries,)."""
        filled = min(int(self.seen), len(self.labels))
        return self.vectors[:filled], self.labels[:filled]

    def add(self, vectors: Tensor, labels: Tensor) -> None:
        """Replace the oldest entries."""
        rows = (self.seen + torch.arange(len(labels), device=labels.device)) % len(self.labels)
        rows, vectors, labels = (part[-len(self.labels) :] for part in (rows, vectors.float(), labels))
        self.vectors[rows], self.labels[rows] = vectors, labels
        self.seen += len(labels)


def remember(head: nn.Module) -> None:
    """Add the batch of a completed step to the memories of a head, if it has any."""
    for part in head.modules():
        if isinstance(part, Memory) and part.coming:
            part.add(*part.coming)
            part.coming = None


class Both(nn.Module):
    """Cross-entropy plus `supcon_weight` times the contrastive loss."""

    def __init__(self, dimension: int, classes: int, choices: Choices) -> None:
        super().__init__()
        self.classifier = Classifier(dimension, classes, choices)
        self.projection = Projection(dimension, classes, choices)
        self.weight = choices["supcon_weight"]

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        return self.classifier(features, labels) + self.weight * self.projection(features, labels)


# ---- losses of pytorch-metric-learning ------------------------------------------------------------


class MetricLearning(nn.Module):
    """A loss of pytorch-metric-learning, with its own weights if it has any, applied to the features."""

    def __init__(self, loss: nn.Module, miner: Any = None) -> None:
        super().__init__()
        self.loss, self.miner = loss, miner

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        mined = self.miner(features, labels) if self.miner else None
        return self.loss(features, labels, mined)


def arcface(dimension: int, classes: int, choices: Choices) -> nn.Module:
    """Deng et al. 2019: the margin is added to the angle, in radians."""
    margin, scale = math.degrees(choices["margin"]), choices["scale"]
    return MetricLearning(losses.ArcFaceLoss(classes, dimension, margin=margin, scale=scale))


def cosface(dimension: int, classes: int, choices: Choices) -> nn.Module:
    """Wang et al. 2018: the margin is subtracted from the cosine."""
    margin, scale = choices["margin"], choices["scale"]
    return MetricLearning(losses.CosFaceLoss(classes, dimension, margin=margin, scale=scale))


def proxy_anchor(dimension: int, classes: int, choices: Choices) -> nn.Module:
    """Kim et al. 2020."""
    return MetricLearning(losses.ProxyAnchorLoss(classes, dimension, choices["margin"], choices["scale"]))


def triplet(dimension: int, classes: int, choices: Choices) -> nn.Module:
    """Hermans et al. 2017: for each anchor the farthest positive and the nearest negative of the batch."""
    return MetricLearning(losses.TripletMarginLoss(choices["margin"]), miners.BatchHardMiner())
