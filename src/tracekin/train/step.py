"""One step of an objective with mined positives: the method (docs: README, "The method"), and nothing else.

Our reading of Zeng et al., "Additional Positive Enables Better Representation Learning for Medical Images" (arXiv
2306.00112), on top of BYOL (arXiv 2006.07733) and TracIn (arXiv 2002.08484). It is told for BYOL; what another
objective does instead stands in its file of ``tracekin.objective``.

Shape suffixes: V views, B images of this rank, k mined an image, D projection width.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tracekin.data.batch import Batch
from tracekin.influence.candidates import Candidates
from tracekin.influence.mining import Mined
from tracekin.influence.selection import positive_weights
from tracekin.model.networks import Outputs
from tracekin.monitor.metrics import Clock
from tracekin.objective.objective import Objective
from tracekin.train.miner import Miner

TWO = slice(2)  # the views that are predicted; further ones vote (policy fnc)


class Found(NamedTuple):
    """What mining found in a step."""

    mined: Mined
    """The positives, [B, k]."""
    best: Mined
    """The best-scored columns before any was dropped, at least [B, k]."""
    rows: Candidates
    columns: Candidates
    """All images of the pool and the queue, without factors."""

    @property
    def chosen_ids(self) -> Tensor:
        """[B, k] int64 ids of the positives; -1 where there is none."""
        return torch.where(self.mined.index >= 0, self.columns.ids[self.mined.index.clamp(min=0)], -1)


class Losses(NamedTuple):
    """What a step computes before its backward pass; means over ranks are the global batch's, targets are local."""

    loss: Tensor
    parts: dict[str, Tensor]
    """The objective's own loss by its name, the named parts of it, and the ``mined`` term."""
    projection_BVD: Tensor
    """What predictions are compared with, as it left the network."""
    found: Found | None


def loss_with_mined_positives(
    predict: Callable[[Tensor], Outputs],
    objective: Objective,
    batch: Batch,
    miner: Miner,
    *,
    weight: float,
    step: int,
    lr: float,
    clock: Clock,
) -> Losses:
    """The losses of one batch; ``predict`` is the online network or the engine around it.

    The mean over ranks of ``loss`` is the global batch's loss: images without a proponent add 0, the divisor stays B.
    """
    # 1. Predict both views with the online network; project both with the target; each prediction is compared with the
    #    other view's target.
    with clock.phase("online"), miner.watching():
        online = predict(batch.views[TWO])
        miner.send(online.hidden)  # the large factor travels while the target network computes
    with clock.phase("target"):
        projection_BVD = objective.project(batch.views, online, step)
    with clock.phase("loss"):
        compared = objective.compare(online.output, projection_BVD, batch.index, step)

    found = None
    if miner.policy:
        with clock.phase("mining"):
            # 2. The loss gradients' factors at the last layer, in closed form, gathered over ranks.
            target_BVD = compared.seen_BVD
            factors = miner.gradients(online.hidden, compared, batch, step, lr)
            rows = Candidates(factors, target_BVD[:, TWO], batch.index, batch.group, batch.label, support=target_BVD)
            columns, blocks = miner.gather(rows, step)
            # 3. TracIn of my images against every image; each takes the best that is not itself as its positive.
            best = miner.choose(rows, columns, blocks, step)
            found = Found(miner.select(best), best, rows, columns)

    # 4. The objective's loss on the two views, plus the weighted one towards the mined positives' targets; or the loss
    #    without the mined images among its negatives.
    with clock.phase("loss"):
        eliminate = found is not None and miner.mining.mode == "eliminate"
        own = compared.loss(found.chosen_ids if found and eliminate and weight else None)
        loss_mined = torch.zeros_like(own.loss)
        if found and not eliminate:
            positive_BkVD = found.columns.target[found.mined.index.clamp(min=0)]
            loss_mined = compared.attraction(positive_BkVD, positive_weights(found.mined))
    parts = {objective.name: own.loss, **own.parts, "mined": loss_mined}
    return Losses(own.loss + weight * loss_mined, parts, projection_BVD, found)


def train_step(
    engine: Any,
    objective: Objective,
    batch: Batch,
    miner: Miner,
    *,
    tau: float | None,
    accept: Callable[[Tensor], bool] = lambda loss: True,
    **context: Any,
) -> Losses:
    """One optimiser step, unless ``accept`` refuses the loss; ``context`` is for ``loss_with_mined_positives``."""
    losses = loss_with_mined_positives(engine, objective, batch, miner, **context)
    if not accept(losses.loss):
        return losses
    # 5. Backward and step through DeepSpeed; the target follows by an exponential moving average.
    with context["clock"].phase("backward"):
        engine.backward(losses.loss)
    with context["clock"].phase("update"):
        engine.step()
        objective.follow(engine.module, tau)
        objective.remember(losses.projection_BVD, batch.index)
    return losses
