"""Each process's shard of a joint batch in; the loss and the gradients of the joint batch, everywhere, out.

All processes have the same network, head and images, and draw the same random numbers. Each sends its shard
of a batch through the network. The features of all shards are gathered, so that each process computes the
loss of the joint batch, and its gradient in every feature, and propagates its own rows of that gradient. The
sum of these gradients is that of one process with the joint batch, as no image's features depend on another
image. (DistributedDataParallel would average gradients of separate losses, and a contrastive loss compares
all images of the batch.)
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from retrieval import distributed
from retrieval.machine import local_world_size, out_of_memory


@contextmanager
def agree_on_memory() -> Iterator[None]:
    """Raise RuntimeError in every process if one runs out of memory inside: all of them try again.

    Otherwise they would wait for each other. A collective may only come first in the block.
    """
    fits = True
    try:
        yield
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        fits = False
    if not distributed.all_agree(fits):
        raise RuntimeError("out of memory in one of the processes")


def gather_features(own: Tensor, views: int) -> Tensor:
    """Gather the features (views × own rows, dimension) of every process as (views × rows, dimension).

    They carry no gradient. The order is that of one process: the first view of all rows, then the second.
    """
    if not distributed.several():
        return own.detach()
    shares = distributed.all_gather(own.detach().cpu().unflatten(0, (views, -1)))
    return torch.cat(shares, 1).flatten(0, 1).to(own.device)


def own_rows(joint: Tensor, views: int) -> Tensor:
    """Take this process's (views × own rows, dimension) of a joint (views × rows, dimension)."""
    joint = joint.unflatten(0, (views, -1))
    return joint[:, distributed.shard(joint.shape[1])].flatten(0, 1)


def sum_gradients(of_shard: list[Tensor], of_batch: list[Tensor]) -> None:
    """Replace the gradients of each process by those of the joint batch, in place.

    Gradients `of_shard` are summed. Gradients `of_batch` are already those of the joint batch, but for the
    order of additions: they are averaged, so that the weights of no two processes drift apart.
    """
    if not distributed.several():
        return
    gradients = of_shard + of_batch
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    group = _nccl_group() if flat.device.type == "cuda" else None
    travelling = flat if group else flat.cpu()
    with distributed.explain_lost_process():
        distributed.process_group().all_reduce(travelling, group=group)
    summed = travelling.to(flat.device).split([gradient.numel() for gradient in gradients])
    for row, (gradient, total) in enumerate(zip(gradients, summed, strict=True)):
        gradient.copy_(total.view_as(gradient) / (1 if row < len(of_shard) else distributed.world_size()))


@functools.cache
def _nccl_group() -> Any:
    """Connect the processes by NCCL; return None, for gloo on the CPU, if one has no GPU of its own."""
    if not distributed.all_agree(torch.cuda.device_count() >= local_world_size()):
        return None
    with distributed.explain_lost_process():
        return distributed.process_group().new_group(backend="nccl", timeout=distributed.TIMEOUT)
