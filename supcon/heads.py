"""The features and labels of a batch in; the loss of each head out.

A head is trained on a backbone's features and thrown away afterwards. It takes `features` (views, dimension)
and `labels` (views,) and returns the loss of the batch. `chance(views)` is the approximate loss of a network
that cannot tell any classes apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from supcon.losses import supcon_loss


class Classifier(nn.Module):
    """Dropout, one linear layer, cross-entropy with label smoothing."""

    def __init__(self, dimension: int, classes: int, label_smoothing: float, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(dimension, classes)
        self.label_smoothing = label_smoothing

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        logits = self.linear(self.dropout(features))
        return functional.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)

    def chance(self, views: int) -> float:
        """Return the loss of equal probabilities for all classes."""
        return math.log(self.linear.out_features)


class Projection(nn.Module):
    """An MLP whose output the supervised contrastive loss compares; the embedding is the MLP's input.

    The hidden and the output width, 512 and 128, are those of Khosla et al. 2020.
    """

    def __init__(self, dimension: int, temperature: float, memory: int = 0) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(dimension, 512), nn.ReLU(), nn.Linear(512, 128))
        self.temperature = temperature
        self.memory = Memory(memory, 128) if memory else None

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        z = self.layers(features)
        if self.memory is None:
            return supcon_loss(z, labels, self.temperature)
        self.memory.coming = z.detach(), labels
        return supcon_loss(z, labels, self.temperature, *self.memory.entries())

    def chance(self, views: int) -> float:
        """Return the loss of equal similarities between all views."""
        return math.log(views - 1 + (len(self.memory.labels) if self.memory else 0))


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


class MetricLearning(nn.Module):
    """A loss of pytorch-metric-learning, with its own weights if it has any, applied to the features."""

    def __init__(self, loss: nn.Module, chance: Callable[[int], float], miner: Any = None) -> None:
        super().__init__()
        self.loss, self.miner, self.chance = loss, miner, chance

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        if self.miner is None:
            return self.loss(features, labels)
        return self.loss(features, labels, self.miner(features, labels))


class Sum(nn.Module):
    """A weighted sum of the losses of several heads."""

    def __init__(self, heads: list[nn.Module], weights: list[float]) -> None:
        super().__init__()
        self.heads, self.weights = nn.ModuleList(heads), weights

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        losses = [head(features, labels) for head in self.heads]
        return sum(weight * loss for weight, loss in zip(self.weights, losses, strict=True))

    def chance(self, views: int) -> float:
        """Return the weighted sum of the heads' chance levels."""
        return sum(w * head.chance(views) for w, head in zip(self.weights, self.heads, strict=True))
