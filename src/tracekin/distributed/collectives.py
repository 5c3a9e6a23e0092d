"""Collectives that also work in a world of one; the only caller of ``torch.distributed`` beside group.py.

Two carry gradients, ``gather_with_gradient`` and ``total_with_gradient``: for losses of the global batch, of which each
rank computes the whole or its share, such that their mean over ranks is the loss. Mining needs none.
"""

import re
import secrets
from collections import deque
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


class Calls:
    """This rank's collectives, in the order in which every rank starts them: what the watchdog tells of."""

    def __init__(self) -> None:
        self.started = 0
        """Number of the last one that was started; they count from 1."""
        self.names: deque[str] = deque(maxlen=1024)
        """Of the last ones: of a step and more, as far as ranks can be apart (ResNet-152: 930 batch norms)."""
        self.current: _Call | None = None
        """What the host waits for just now. NCCL's are waited for by the device."""


class _Call:
    """A collective: numbered where it is started; ``with`` notes that the host waits for it. A fraction of 1 us."""

    __slots__ = ("name", "number")

    def __init__(self, name: str) -> None:
        CALLS.started += 1
        CALLS.names.append(name)
        self.number, self.name = CALLS.started, name

    def __enter__(self) -> "_Call":
        CALLS.current = self
        return self

    def __exit__(self, *error: object) -> None:
        CALLS.current = None


CALLS = Calls()


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
    with _Call("new group"):
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
    with _Call("all-gather") as call:
        work = dist.all_gather_into_tensor(_bytes(whole), _bytes(local), group=group.handle, async_op=True)
    return partial(_arrived, call, [work], whole, local)


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
    with _Call("ring shift") as call:
        works = dist.batch_isend_irecv(operations)
    return partial(_arrived, call, works, received, sent)


@torch.no_grad()
def total(tensor: Tensor) -> Tensor:
    """Sum over ranks, as a new tensor on every rank."""
    # In the order of its indices: gloo adds up what lies in memory, and a gradient may lie transposed on some ranks.
    summed = tensor.detach().clone(memory_format=torch.contiguous_format)
    if world_size() > 1:
        with _Call("all-reduce"):
            dist.all_reduce(summed)
    return summed


def gather_with_gradient(tensor: Tensor) -> Tensor:
    """``gather`` over all ranks whose backward pass brings every rank's gradient home: the sum of what ranks want."""
    return tensor if world_size() == 1 else _Gather.apply(tensor)


def total_with_gradient(tensor: Tensor) -> Tensor:
    """``total`` whose backward pass sums the ranks' gradients too: what is computed from it may differ by rank."""
    return tensor if world_size() == 1 else _Total.apply(tensor)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return gather(tensor)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        # An all-reduce and not a reduce-scatter, which gloo lacks; what travels is as wide as a projection.
        return total(grad_outputs[0]).chunk(world_size())[rank()]


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return total(tensor)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        return total(grad_outputs[0])


def gather_objects(value: Any) -> list[Any]:
    """Every rank's picklable value, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    with _Call("all-gather of objects"):
        dist.all_gather_object(found, value)
    return found


def broadcast_object(value: Any) -> Any:
    """Rank 0's picklable value, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    with _Call("broadcast of objects"):
        dist.broadcast_object_list(box, src=0)
    return box[0]


def open_host_group() -> Any:
    """A group of all ranks whose collectives run on the host, so that no rank waits for its device. Collective."""
    if world_size() == 1:
        return None
    with _Call("new group"):
        return dist.new_group(backend="gloo", timeout=TIMEOUT)


def maxima(values: Sequence[int], group: Any) -> list[int]:
    """The ranks' largest value at each place; ``group`` is of ``open_host_group``."""
    box = torch.tensor([int(value) for value in values])
    if world_size() > 1:
        with _Call("all-reduce of maxima"):
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
        with _Call("barrier"):
            dist.barrier()


def open_store() -> Any:
    """A connection of its own to where the ranks met, for a thread that speaks while the main one waits. Collective.

    No call is bounded in time: with its server stopped, even ``check`` waits for ever.
    """
    token = broadcast_object(secrets.token_hex(8))  # torchrun's store remembers the keys of a start before
    assert dist.group.WORLD is not None
    mine = dist.group.WORLD.get_group_store().clone()
    return dist.PrefixStore(token, mine)  # type: ignore[attr-defined]  # documented, but not in its __all__


def _arrived(call: _Call, works: Sequence[Any], received: Tensor, sent: Tensor) -> Tensor:
    """Wait for the works; ``sent`` is named so that it lives as long as it travels."""
    with call:
        for work in works:
            work.wait()
    return received


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8) if tensor.dim() else tensor.view(1).view(torch.uint8)
