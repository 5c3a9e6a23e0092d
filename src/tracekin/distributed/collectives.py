"""Collectives that also work in a world of one; the only caller of ``torch.distributed`` beside group.py.

Nothing here carries gradients: mined targets are stop-gradients, and the loss needs no gather.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tracekin.config import UserError

TIMEOUT = timedelta(minutes=30)
_LOST = re.compile(
    "closed by peer|reset by peer|broken pipe|connection refused|no route to host|timed out|gloo|nccl|killed by signal",
    re.IGNORECASE,
)


@dataclass
class Traffic:
    """Bytes that this rank's mining received: of the buffers handed to collectives, this rank's own share included."""

    bytes: int = 0

    def count(self, tensor: Tensor) -> None:
        self.bytes += tensor.numel() * tensor.element_size()


@dataclass(frozen=True)
class Group:
    """Ranks that exchange among themselves, on a communicator of their own, so that nothing else waits for them.

    Every rank starts the collectives of all groups in the same order, which group.py has NCCL keep to.
    """

    rank: int = 0
    """My place in the group."""
    size: int = 1
    handle: Any = None
    """torch.distributed's; None for a group of one."""


def open_group(extent: str, local_size: int) -> Group:
    """A new group: of this rank alone (``rank``), of the ranks of its node (``node``) or of all (``global``).

    Collective: every rank calls it. Nodes hold ``local_size`` consecutive ranks each.
    """
    if extent == "rank" or world_size() == 1 or (extent == "node" and local_size == 1):
        return Group()
    if extent == "global":
        return Group(rank(), world_size(), dist.new_group(timeout=TIMEOUT))
    assert world_size() % local_size == 0, (world_size(), local_size)
    handle, _ = dist.new_subgroups(local_size, timeout=TIMEOUT)
    return Group(rank() % local_size, local_size, handle)


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def gather(tensor: Tensor, traffic: Traffic | None = None, group: Group | None = None) -> Tensor:
    """Concatenate the ranks' tensors (same shape and dtype everywhere) along the first dimension in rank order.

    Scalars are stacked. Every rank gets the whole; without ``group``, that of all ranks.
    """
    return start_gather(tensor, traffic, group)()


@torch.no_grad()
def start_gather(tensor: Tensor, traffic: Traffic | None = None, group: Group | None = None) -> Callable[[], Tensor]:
    """``gather`` that returns at once; call what it returns, once, to wait for the whole."""
    group = group or Group(rank(), world_size())
    local = tensor.detach()
    if group.size == 1:
        return lambda: local
    if local.numel() == 0:  # an unlabelled set has labels of no column; gloo refuses to send nothing
        return lambda: torch.cat([local] * group.size)
    local = local.contiguous()
    whole = local.new_empty((group.size * local.shape[0], *local.shape[1:]) if local.dim() else (group.size,))
    if traffic is not None:
        traffic.count(whole)
    # As bytes: what travels is not summed, and gloo does not know every dtype.
    work = dist.all_gather_into_tensor(_bytes(whole), _bytes(local), group=group.handle, async_op=True)
    return partial(_arrived, [work], whole, local)


@torch.no_grad()
def start_shift(tensor: Tensor, traffic: Traffic, group: Group) -> Callable[[], Tensor]:
    """Send a tensor to the group's next rank, receive that of the rank before, of the same shape; wait by calling."""
    sent = tensor.detach().contiguous()
    received = torch.empty_like(sent)
    traffic.count(received)
    to, source = (group.rank + 1) % group.size, (group.rank - 1) % group.size
    operations = [
        dist.P2POp(dist.isend, _bytes(sent), group=group.handle, group_peer=to),
        dist.P2POp(dist.irecv, _bytes(received), group=group.handle, group_peer=source),
    ]
    return partial(_arrived, dist.batch_isend_irecv(operations), received, sent)


@torch.no_grad()
def total(tensor: Tensor) -> Tensor:
    """Sum over ranks, as a new tensor on every rank."""
    summed = tensor.detach().clone()
    if world_size() > 1:
        dist.all_reduce(summed)
    return summed


def gather_objects(value: Any) -> list[Any]:
    """Every rank's picklable value, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found


def broadcast_object(value: Any) -> Any:
    """Rank 0's picklable value, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def open_host_group() -> Any:
    """A group of all ranks whose collectives run on the host, so that no rank waits for its device. Collective."""
    return dist.new_group(backend="gloo", timeout=TIMEOUT) if world_size() > 1 else None


def maxima(values: Sequence[int], group: Any) -> list[int]:
    """The ranks' largest value at each place; ``group`` is of ``open_host_group``."""
    box = torch.tensor([int(value) for value in values])
    if world_size() > 1:
        dist.all_reduce(box, dist.ReduceOp.MAX, group)
    return box.tolist()


def lost_a_rank(error: BaseException | None) -> bool:
    """Whether an error, or its cause, says that another process of the run went away or fell silent.

    Gloo, NCCL and torch's loader tell it in words: ``torch.distributed`` has a type for it in some places only.
    """
    if error is None or isinstance(error, UserError):
        return False
    if isinstance(error, dist.DistNetworkError | dist.DistBackendError | dist.DistStoreError):
        return True
    return (isinstance(error, RuntimeError) and bool(_LOST.search(str(error)))) or lost_a_rank(error.__cause__)


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def _arrived(works: Sequence[Any], received: Tensor, sent: Tensor) -> Tensor:
    """Wait for the works; ``sent`` is named so that it lives as long as it travels."""
    for work in works:
        work.wait()
    return received


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8) if tensor.dim() else tensor.view(1).view(torch.uint8)
