"""What travels between ranks for mining: each rank scores its own rows against the columns of every rank of the pool.

The hidden activations are almost all of the bytes (their width against the projection's): they leave as soon as they
are known, on a communicator of their own, while the target network still computes. Up to ``mining.ring_above`` columns
every rank holds them all; above, they go round a ring of ranks block by block, and no rank holds more than three beside
its own.

Shape suffixes: B images of this rank, P images of the pool, V views, H width of the activations.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from tracekin.config import MiningConfig
from tracekin.distributed import collectives
from tracekin.distributed.collectives import Group, Traffic
from tracekin.influence.candidates import Block, Candidates
from tracekin.influence.gradients import Factors
from tracekin.influence.sketch import sketch_matrix, sketched

HiddenBlocks = Iterator[tuple[int, Tensor]]
"""First column and hidden activations of each block, as they arrive."""


class Exchange:
    """One step after another: ``send`` hidden activations, ``gather`` the rest, read the pool's ``blocks``.

    Nothing that travels carries a gradient. Collective: every rank of the group makes the same calls.
    """

    def __init__(self, mining: MiningConfig, group: Group) -> None:
        self.mining, self.group, self.traffic = mining, group, Traffic()
        self.hidden: list[HiddenBlocks] = []
        self.deltas: list[Tensor] = []
        self.matrices: dict[tuple[int, int], Tensor] = {}

    def send(self, hidden_BVH: Tensor) -> Tensor:
        """Let a layer's activations leave; they arrive with ``blocks``.

        Returns:
            The activations that the rows' own factors must hold: the same, or sketched ones; never rounded.
        """
        own = self._sketch(hidden_BVH.detach())
        sent = self._narrow(own)
        if self.group.size * len(sent) > self.mining.ring_above:
            self.hidden.append(_start_ring(sent, self.traffic, self.group))
        else:
            self.hidden.append(_start_whole(sent, self.traffic, self.group))
        return own

    def gather(self, rows: Candidates) -> Candidates:
        """All that is small: the pool's columns without factors, in rank order; deltas are kept for ``blocks``."""
        deltas = [self._narrow(layer.delta) for layer in rows.factors]
        # All leave before the first is waited for.
        waiting = [collectives.start_gather(tensor, self.traffic, self.group) for tensor in (*rows.small, *deltas)]
        arrived = [wait() for wait in waiting]
        self.deltas = arrived[len(rows.small) :]
        return Candidates((), *arrived[: len(rows.small)])

    def blocks(self, columns: Candidates) -> Iterator[Block]:
        """The pool's columns with their factors, as the hidden activations arrive; to be read to the end.

        Args:
            columns: what ``gather`` returned.
        """
        layers, self.hidden = self.hidden, []
        deltas, self.deltas = self.deltas, []
        if not layers:
            yield Block(0, columns)
            return
        for start, first in layers[0]:
            hidden = [first, *(next(layer)[1] for layer in layers[1:])]  # zip would hold on to a block for longer
            part = slice(start, start + len(first))
            factors = tuple(Factors(h, delta[part]) for h, delta in zip(hidden, deltas, strict=True))
            yield Block(start, columns.part(part)._replace(factors=factors))

    def _sketch(self, hidden_BVH: Tensor) -> Tensor:
        dim, width = self.mining.sketch_dim, hidden_BVH.shape[-1]
        if not 0 < dim < width:
            return hidden_BVH
        key = (width, len(self.hidden))  # each layer of a step has its own signs
        if key not in self.matrices:
            self.matrices[key] = sketch_matrix(width, dim, hidden_BVH.device, len(self.hidden))
        return sketched(hidden_BVH, self.matrices[key])

    def _narrow(self, factor: Tensor) -> Tensor:
        return factor.to(torch.bfloat16) if self.mining.transport == "bf16" else factor


def _start_whole(own: Tensor, traffic: Traffic, group: Group) -> HiddenBlocks:
    arriving = collectives.start_gather(own, traffic, group)
    return ((0, whole()) for whole in (arriving,))


def _start_ring(own: Tensor, traffic: Traffic, group: Group) -> HiddenBlocks:
    arriving = collectives.start_shift(own, traffic, group) if group.size > 1 else None

    def blocks() -> HiddenBlocks:
        nonlocal arriving
        current = own
        for hop in range(group.size):
            if hop:
                assert arriving is not None
                current = arriving()
                # The next block travels while this one is scored.
                last = hop == group.size - 1
                arriving = None if last else collectives.start_shift(current, traffic, group)
            yield (group.rank - hop) % group.size * len(own), current

    return blocks()
