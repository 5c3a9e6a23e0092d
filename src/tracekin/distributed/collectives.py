"""Collectives that also work in a world of one; the only caller of ``torch.distributed`` beside group.py.

Nothing here carries gradients: mined targets are stop-gradients, and the loss needs no gather.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class Traffic:
    """Bytes of the gathered buffers handed to collectives so far."""

    bytes: int = 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


@torch.no_grad()
def gather(tensor: Tensor, dim: int = 0, traffic: Traffic | None = None) -> Tensor:
    """Concatenate the ranks' tensors (same shape and dtype everywhere) along ``dim`` in rank order, on every rank."""
    size = world_size()
    if size == 1:
        return tensor.detach()
    if tensor.numel() == 0:  # an unlabelled set has labels of no column; gloo refuses to send nothing
        return torch.cat([tensor.detach()] * size, dim)
    local = tensor.detach().contiguous()
    gathered = local.new_empty((size, *local.shape))
    if traffic is not None:
        traffic.bytes += gathered.numel() * gathered.element_size()
    dist.all_gather_into_tensor(gathered.flatten(0, 1) if local.dim() else gathered, local)
    if local.dim() == 0:
        return gathered
    return gathered.movedim(0, dim).flatten(dim, dim + 1)


@torch.no_grad()
def total(tensor: Tensor) -> Tensor:
    """Sum over ranks, as a new tensor on every rank."""
    summed = tensor.detach().clone()
    if world_size() > 1:
        dist.all_reduce(summed)
    return summed


def broadcast_object(value: Any) -> Any:
    """Rank 0's picklable value, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()
