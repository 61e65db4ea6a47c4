"""Embeddings and labels in; the supervised contrastive loss out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

PAIRS_AT_ONCE = 2**22  # pairs of views that are compared at a time


def supcon_loss(
    embeddings: Tensor,
    labels: Tensor | Sequence[int],
    temperature: float = 0.1,
    memory: Tensor | None = None,
    memory_labels: Tensor | Sequence[int] | None = None,
) -> Tensor:
    """Return the supervised contrastive loss, L_out of Khosla et al. 2020 (eq. 2), a mean over the anchors.

        L = mean over i of  −1/|P(i)| Σ_{p ∈ P(i)} log( exp(z_i·z_p / τ) / Σ_{a ≠ i} exp(z_i·z_a / τ) )

    `embeddings` (views, dimension) need not be of unit length: z are the normalised embeddings. `labels`
    (views,): P(i) are the other views with the label of i. If each image has a label of its own, this is
    SimCLR's NT-Xent (Chen et al. 2020). SupContrast's shapes are taken too: (images, views, dimension) with a
    label per image. `memory` (entries, dimension) with `memory_labels` are views of earlier batches to
    compare with: no anchors, without a gradient (cross-batch memory, Wang et al. 2020).

    An anchor without a positive is left out; if no anchor has a positive, the loss and its gradient are 0.
    Embeddings in half precision are compared in float32, also inside autocast. SupContrast multiplies this
    loss by τ/τ_base, 1.43 at its defaults for τ = 0.1; there is no such factor here. Raises ValueError for
    embeddings and labels of other shapes.

    Three points on the circle, two of one label: each of the two sees the other at cosine 0 and the third at
    cosine −1 or 0, so that with τ = 1 the losses are log(1 + e⁻¹) and log(1 + 1), 0.5032 in the mean.

    >>> points = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    >>> round(supcon_loss(points, [0, 0, 1], temperature=1.0).item(), 4)
    0.5032
    """
    labels = torch.as_tensor(labels, device=embeddings.device)
    if embeddings.ndim not in (2, 3) or labels.shape != embeddings.shape[:1]:
        raise ValueError(
            f"embeddings of shape {tuple(embeddings.shape)} and labels of shape {tuple(labels.shape)}: give "
            "(views, dimension) with (views,), or (images, views, dimension) with (images,)"
        )
    if embeddings.ndim == 3:
        labels = labels.repeat_interleave(embeddings.shape[1])
        embeddings = embeddings.flatten(0, 1)
    if embeddings.dtype in (torch.float16, torch.bfloat16):
        embeddings = embeddings.float()
    memory = embeddings[:0] if memory is None else memory
    if memory_labels is not None:
        labels = torch.cat([labels, torch.as_tensor(memory_labels, device=labels.device)])
    with torch.autocast(embeddings.device.type, enabled=False):
        return _mean_loss(embeddings, memory.detach().to(embeddings.dtype), labels, temperature)


def _mean_loss(embeddings: Tensor, memory: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Return the loss; `labels` (views + entries,) are those of the embeddings, then those of the memory."""
    z, memory = functional.normalize(embeddings), functional.normalize(memory)
    # Σ_p z_i·z_p = z_i · (the sum over the class of i − z_i): only the denominator compares all pairs.
    classes, of = torch.unique(labels, return_inverse=True)
    own = of[: len(z)]  # (views,) the row of each anchor's class
    positives = torch.bincount(of, minlength=len(classes))[own] - 1  # |P(i)|
    wide = z if z.device.type == "mps" else z.double()  # for sums of thousands; MPS has no float64
    sums = wide.new_zeros(len(classes), z.shape[1]).index_add(0, of, torch.cat([wide, memory.to(wide.dtype)]))
    mean = (wide * (sums[own] - wide)).sum(1) / positives.clamp(min=1).to(wide.dtype) / temperature
    weights = (positives > 0).to(z.dtype)
    weights = weights / weights.sum().clamp(min=1)
    loss = _LogSums.apply(z, memory, weights, temperature) - weights @ mean.to(z.dtype)
    return loss.clamp(min=0)  # rounding may leave a difference of equal terms below 0


class _LogSums(torch.autograd.Function):
    """Σ_i w_i log Σ_{a ≠ i} exp(z_i·z_a / τ), over the views z and the memory beside them.

    The forward pass also computes the gradient, some rows at a time: the matrix of all pairs never exists,
    and each exponential is computed once. For 8192 views of dimension 128 this takes half the time of
    autograd, and blocks of 16 MB instead of matrices of 268 MB.
    """

    @staticmethod
    def forward(
        context: torch.autograd.function.FunctionCtx,
        z: Tensor,
        memory: Tensor,
        weights: Tensor,
        temperature: float,
    ) -> Tensor:
        keys = torch.cat([z, memory])
        total, gradient = z.new_zeros(()), torch.zeros_like(z)
        size = max(1, PAIRS_AT_ONCE // max(1, len(keys)))
        for start in range(0, len(z), size):
            rows = slice(start, start + size)
            parts = (z[rows] / temperature) @ keys.T  # (rows, views + entries)
            parts[:, rows].fill_diagonal_(torch.finfo(z.dtype).min)  # a view is not compared with itself
            highest = parts.amax(1, keepdim=True)
            below = parts.sub_(highest).exp_().sum(1, keepdim=True)
            total += weights[rows] @ (highest + below.log()).squeeze(1)
            parts *= weights[rows, None] / (below * temperature)
            gradient[rows] += parts @ keys  # as an anchor
            gradient.addmm_(parts[:, : len(z)].T, z[rows])  # as what an anchor is compared with
        context.save_for_backward(gradient)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        context: torch.autograd.function.FunctionCtx, scale: Tensor
    ) -> tuple[Tensor, None, None, None]:
        """Return the gradient in z, the only argument that has one."""
        (gradient,) = context.saved_tensors
        return gradient * scale, None, None, None
