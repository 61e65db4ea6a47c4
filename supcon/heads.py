"""What is trained on a backbone's features, and thrown away afterwards: each head gives its own loss.

A head is called with `features` (views, dimension) and `labels` (views,) and gives the loss of the batch;
`chance(views)` is about what a network gives that tells nothing apart.
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
        """Each class as likely as the other."""
        return math.log(self.linear.out_features)


class Projection(nn.Module):
    """An MLP, whose output the supervised contrastive loss compares; the embedding is what goes into it.

    The widths are Khosla et al.'s 2048 → 512 → 128, the first being the backbone's.
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
        """All views equally alike."""
        return math.log(views - 1 + (len(self.memory.labels) if self.memory else 0))


class Memory(nn.Module):
    """The last embeddings and labels that went by (cross-batch memory, Wang et al. 2020)."""

    def __init__(self, entries: int, dimension: int) -> None:
        super().__init__()
        self.register_buffer("vectors", torch.zeros(entries, dimension))
        self.register_buffer("labels", torch.zeros(entries, dtype=torch.long))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.coming: tuple[Tensor, Tensor] | None = None  # of a step that may still fail

    def entries(self) -> tuple[Tensor, Tensor]:
        """What there is: (entries, dimension) and (entries,)."""
        there = min(int(self.seen), len(self.labels))
        return self.vectors[:there], self.labels[:there]

    def add(self, vectors: Tensor, labels: Tensor) -> None:
        """Put these in the place of the oldest."""
        rows = (self.seen + torch.arange(len(labels), device=labels.device)) % len(self.labels)
        rows, vectors, labels = (part[-len(self.labels) :] for part in (rows, vectors.float(), labels))
        self.vectors[rows], self.labels[rows] = vectors, labels
        self.seen += len(labels)


def remember(head: nn.Module) -> None:
    """Let the memories of a head, if it has any, take in the batch of the step that was done."""
    for part in head.modules():
        if isinstance(part, Memory) and part.coming:
            part.add(*part.coming)
            part.coming = None


class MetricLearning(nn.Module):
    """A loss of pytorch-metric-learning, with its own weights if it has any, straight on the features."""

    def __init__(self, loss: nn.Module, chance: Callable[[int], float], miner: Any = None) -> None:
        super().__init__()
        self.loss, self.miner, self.chance = loss, miner, chance

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        if self.miner is None:
            return self.loss(features, labels)
        return self.loss(features, labels, self.miner(features, labels))


class Sum(nn.Module):
    """Several heads, and how much each one's loss counts."""

    def __init__(self, heads: list[nn.Module], weights: list[float]) -> None:
        super().__init__()
        self.heads, self.weights = nn.ModuleList(heads), weights

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        losses = [head(features, labels) for head in self.heads]
        return sum(weight * loss for weight, loss in zip(self.weights, losses, strict=True))

    def chance(self, views: int) -> float:
        """The sum of theirs."""
        return sum(w * head.chance(views) for w, head in zip(self.weights, self.heads, strict=True))
