"""Embeddings and labels in; the loss that pulls equal labels together out."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def supcon_loss(
    embeddings: Tensor,
    labels: Tensor,
    temperature: float = 0.1,
    memory: Tensor | None = None,
    memory_labels: Tensor | None = None,
) -> Tensor:
    """The supervised contrastive loss, L_out of Khosla et al. 2020 (eq. 2), a mean over the anchors.

        L = mean over i of  −1/|P(i)| Σ_{p ∈ P(i)} log( exp(z_i·z_p / τ) / Σ_{a ≠ i} exp(z_i·z_a / τ) )

    `embeddings` (views, dimension) need not be of unit length: z are. `labels` (views,): P(i) are the other
    views with the label of i. With each image's own number as its label this is SimCLR's NT-Xent (Chen et al.
    2020). `memory` (entries, dimension) with `memory_labels` are more views to compare with, of earlier
    batches, which are no anchors and get no gradient (cross-batch memory, Wang et al. 2020).

    An anchor without a positive is left out; without any, the loss is 0 and so is its gradient.

    Three points on the circle, two of one label: each of the two sees the other at cosine 0 and the third at
    cosine −1 or 0, so that with τ = 1 the losses are log(1 + e⁻¹) and log(1 + 1), 0.5032 in the mean.

    >>> points = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    >>> round(supcon_loss(points, torch.tensor([0, 0, 1]), temperature=1.0).item(), 4)
    0.5032
    """
    z = functional.normalize(embeddings)
    keys, key_labels = z, labels
    if memory is not None:
        keys = torch.cat([z, functional.normalize(memory.detach())])
        key_labels = torch.cat([labels, memory_labels])
    similarity = z @ keys.T / temperature  # (views, views + entries)
    itself = torch.eye(len(z), len(keys), dtype=torch.bool, device=z.device)
    positive = (labels[:, None] == key_labels) & ~itself
    others = similarity.masked_fill(itself, torch.finfo(similarity.dtype).min)
    log_share = similarity - others.logsumexp(1, keepdim=True)
    counts = positive.sum(1)
    of_anchors = -(log_share * positive).sum(1) / counts.clamp(min=1)
    return of_anchors.sum() / (counts > 0).sum().clamp(min=1)
