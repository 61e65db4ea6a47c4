"""What each of several processes makes of its share of a batch in; what it is for the whole batch, out.

Every process has the same network, head and images, and draws the same numbers. Each sends its share of a
joint batch through the network; the features of all are gathered, so that each computes the loss of the joint
batch and its gradient in every feature, sends its own part of that back, and the gradients in the weights are
added up. They are those of one process with the joint batch: nothing in the network depends on other images.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch import distributed as torch_distributed

from retrieval import distributed
from retrieval.machine import on_this_machine, out_of_memory


class NoRoomError(RuntimeError):
    """The memory of one of the processes is too small: all of them try again."""


def share(rows: int) -> slice:
    """The rows of a joint batch of so many that are this process's: as many for each, but for one at most.

    >>> share(8)
    slice(0, 8, None)
    """
    return _shares(rows)[distributed.number()]


def most_of_a_share(rows: int) -> int:
    """The rows of the largest share.

    >>> most_of_a_share(8)
    8
    """
    return max(part.stop - part.start for part in _shares(rows))


def _shares(rows: int) -> list[slice]:
    parts = np.array_split(np.arange(rows), distributed.count())
    return [slice(int(part[0]), int(part[-1]) + 1) if len(part) else slice(rows, rows) for part in parts]


@contextmanager
def together() -> Iterator[None]:
    """Around what each process does alone: memory that is too small for one is NoRoomError for all.

    So all of them try again, and none waits for one that has gone another way.
    """
    if not distributed.several():
        yield
        return
    fits = True
    try:
        yield
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        fits = False
    if not distributed.all_say(fits):
        raise NoRoomError("out of memory in one of the processes")


def gather(own: Tensor, views: int, rows: int) -> Tensor:
    """The features (own views, dimension) of every process's share, as (views × rows, dimension).

    Without a gradient. The order is that of one process: all rows as their first views, then as their second.
    Shares that are smaller than others travel with zeros behind them.
    """
    parts = [part.stop - part.start for part in _shares(rows)]
    own = own.view(views, -1, own.shape[1])
    padded = own.new_zeros(views, max(parts), own.shape[2])
    padded[:, : own.shape[1]] = own
    group, travelling = _travelling(padded)
    found = [torch.empty_like(travelling) for _ in parts]
    with distributed.a_sentence():
        torch_distributed.all_gather(found, travelling, group=group)
    cut = [features[:, :size] for features, size in zip(found, parts, strict=True)]
    return torch.cat(cut, 1).flatten(0, 1).to(own.device)


def own_part(joint: Tensor, views: int, rows: int) -> Tensor:
    """Of (views × rows, dimension) the part that is this process's (own views, dimension)."""
    return joint.view(views, rows, -1)[:, share(rows)].flatten(0, 1)


def add_up(of_shares: list[Tensor], of_the_batch: list[Tensor]) -> None:
    """Put gradients of the joint batch into every process, in the place of its own.

    `of_shares` are each of its share, and their sum is meant. `of_the_batch` are the same in every process
    already, but for the order of additions: their mean is meant, so that no two processes ever drift apart.
    """
    gradients = of_shares + of_the_batch
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    group, travelling = _travelling(flat)
    with distributed.a_sentence():
        torch_distributed.all_reduce(travelling, group=group)
    summed = travelling.to(flat.device).split([gradient.numel() for gradient in gradients])
    for number, (gradient, part) in enumerate(zip(gradients, summed, strict=True)):
        times = 1 if number < len(of_shares) else distributed.count()
        gradient.copy_(part.view(gradient.shape) / times)


def from_the_first(value: float) -> float:
    """The first process's number, in every process; a flag travels as 0 or 1."""
    if not distributed.several():
        return value
    told = torch.tensor([value], dtype=torch.float64)
    with distributed.a_sentence():
        torch_distributed.broadcast(told, 0)
    return told.item()


# ---- devices --------------------------------------------------------------------------------------


def _travelling(tensor: Tensor) -> tuple[Any, Tensor]:
    """The group of processes in which it travels, and what does: the tensor on the GPU, or one on the CPU."""
    if tensor.device.type == "cuda" and (group := _gpus()):
        return group, tensor.contiguous()
    return torch_distributed.group.WORLD, tensor.cpu().contiguous()


@functools.cache
def _gpus() -> Any:
    """NCCL's group of the processes; None where one of them has no GPU of its own."""
    if not distributed.all_say(torch.cuda.device_count() >= on_this_machine()):
        return None
    return torch_distributed.new_group(backend="nccl", timeout=distributed.LONGEST_WAIT)
