"""The miner: what mining keeps from step to step, and what it does around the step's four lines.

Shape suffixes: B images of this rank, k mined an image, V views, H and D widths.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import chain

import torch
from torch import Tensor

from tracekin.config import MiningConfig
from tracekin.data.batch import Batch
from tracekin.distributed import collectives
from tracekin.distributed.collectives import Traffic, open_group
from tracekin.influence.candidates import Block, Candidates
from tracekin.influence.gradients import Factors, normalised
from tracekin.influence.mining import Mined
from tracekin.influence.policies import POLICIES, choose
from tracekin.influence.precision import widen
from tracekin.influence.queue import Queue
from tracekin.influence.selection import keep_above, keep_mutual
from tracekin.objective.objective import Comparison, Objective
from tracekin.train.exchange import Exchange
from tracekin.train.layers import History, Recorder, scaled


class Miner:
    """Chooses each image's positives among those of all ranks of the pool, and of the queue.

    Args:
        mining: what and how.
        objective: whose gradients are compared, and whose online network's layers policy ``ghost`` watches.
        seed: of random draws.
        local_size: ranks a node, for ``mining.pool=node``.
    """

    def __init__(self, mining: MiningConfig, objective: Objective, seed: int, local_size: int = 1) -> None:
        self.mining, self.objective, self.seed = mining, objective, seed
        self.policy = POLICIES.get(mining.policy)
        self.gradients_of = self.policy.gradients if self.policy else "none"
        group = open_group(mining.pool if self.policy else "rank", local_size)
        self.exchange = Exchange(mining, group)
        self.queue = Queue(mining.queue, mining.queue_half_life) if mining.queue and self.policy else None
        several = self.gradients_of == "layers" and mining.layers > 1
        self.recorder = Recorder(objective.online, mining.layers - 1) if several else None
        self.history = History(mining.checkpoints) if self.gradients_of == "checkpoints" else None
        # Between ``send`` and ``gradients``: inputs of the watched layers, and what the rows' own factors must hold.
        self.recorded: list[Tensor] = []
        self.own_hidden: list[Tensor] = []
        self.exclude_group = mining.exclude_group and not (self.policy and self.policy.same_group)

    @property
    def traffic(self) -> Traffic:
        return self.exchange.traffic

    def watching(self) -> AbstractContextManager[None]:
        """Around the online network's forward pass."""
        return self.recorder.watching() if self.recorder else nullcontext()

    def send(self, hidden_BVH: Tensor) -> None:
        """Let the activations in front of the last layer travel, as soon as they are known."""
        if self.gradients_of == "none":
            return
        self.recorded = self.recorder.hidden() if self.recorder else []
        self.own_hidden = [self.exchange.send(layer) for layer in (hidden_BVH, *self.recorded)]

    def gradients(
        self, hidden_BVH: Tensor, compared: Comparison, batch: Batch, step: int, lr: float
    ) -> tuple[Factors, ...]:
        """Factors of each image's loss gradient, as the policy wants them.

        Args:
            hidden_BVH: input of the last layer, which ``send`` was given.
            compared: what the objective makes of its output.
            batch: the same images.
            step: of random draws.
            lr: learning rate of this step, the weight of the current weights in TracInCP.
        """
        if self.policy is None or self.gradients_of == "none":
            return ()
        layers = [Factors(widen(hidden_BVH), compared.delta())]
        if self.recorder:
            deltas = self.recorder.deltas(layers[0].delta)
            layers += [Factors(*pair) for pair in zip(self.recorded, deltas, strict=True)]
        if self.history:
            older = self.history.gradients(self.objective, batch.views[:2], batch.index, step)
            layers = [scaled(layers[0], lr), *older]
            self.own_hidden += [self.exchange.send(layer.hidden) for layer in layers[1:]]
        if self.policy.normalise:
            layers = list(normalised(*layers))
        own, self.own_hidden, self.recorded = self.own_hidden, [], []
        return tuple(layer._replace(hidden=hidden) for layer, hidden in zip(layers, own, strict=True))

    def gather(self, rows: Candidates, step: int) -> tuple[Candidates, Iterator[Block]]:
        """Everyone's candidates: all columns without their factors, and the blocks that hold them, to be read once.

        The pool's columns come first, in rank order, then those of the queue; the blocks' reading fills the queue.
        """
        columns = self.exchange.gather(rows)
        blocks = self.exchange.blocks(columns)
        old = self.queue.columns(step, columns.ids) if self.queue else None
        if self.queue:
            blocks = self.queue.recording(blocks, step)
        if old is None:
            return columns, blocks
        assert old.weight is not None
        both = zip(columns.small, old.small, strict=True)
        target, ids, groups, labels = (torch.cat((new, past)) for new, past in both)
        weight = torch.cat((torch.ones_like(columns.ids, dtype=old.weight.dtype), old.weight))
        # What is remembered comes first: it is scored before it is overwritten.
        return Candidates((), target, ids, groups, labels, weight), chain([Block(len(columns.ids), old)], blocks)

    def forget(self, step: int) -> None:
        """Do as if a step had not been."""
        if self.queue:
            self.queue.forget(step)

    def choose(self, rows: Candidates, columns: Candidates, blocks: Iterator[Block], step: int) -> Mined:
        """The best columns of my rows: [B, k + 1] where the pool has as many, so that the runner-up is known."""
        k = self.mining.k
        return choose(
            self.mining.policy,
            rows,
            blocks,
            seed=self.seed,
            step=step,
            exclude_group=self.mining.exclude_group,
            k=min(k + 1, max(k, len(columns.ids))),
            chunk=self.mining.chunk,
        )

    def select(self, best: Mined) -> Mined:
        """The positives that the loss pulls towards: the k best, less those that ``mining.keep`` drops."""
        mined = Mined(best.index[:, : self.mining.k].contiguous(), best.score[:, : self.mining.k].contiguous())
        group, traffic = self.exchange.group, self.traffic
        if self.mining.keep == "mutual":
            everyones = collectives.gather(mined.index, traffic, group)
            return keep_mutual(mined, everyones, group.rank * len(mined.index))
        if self.mining.keep == "quantile":
            return keep_above(mined, collectives.gather(mined.score, traffic, group), self.mining.quantile)
        return mined
