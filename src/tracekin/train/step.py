"""One step of BYOL with mined positives: the method (docs: README, "The method"), and nothing else.

Our reading of Zeng et al., "Additional Positive Enables Better Representation Learning for Medical Images" (arXiv
2306.00112), on top of BYOL (arXiv 2006.07733) and TracIn (arXiv 2002.08484).

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
from tracekin.model.byol import Target, byol_loss
from tracekin.monitor.metrics import Clock
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


class Losses(NamedTuple):
    """What a step computes before its backward pass; losses are means over this rank's images, targets local."""

    loss: Tensor
    loss_byol: Tensor
    loss_mined: Tensor
    target_BVD: Tensor
    found: Found | None


def byol_with_mined_positives(
    predict: Callable[[Tensor], tuple[Tensor, Tensor]],
    target: Target,
    batch: Batch,
    miner: Miner,
    *,
    weight: float,
    step: int,
    lr: float,
    clock: Clock,
) -> Losses:
    """Both losses of one batch; ``predict`` is the online network or the engine around it.

    The mean over ranks of ``loss`` is the global batch's loss: images without a proponent add 0, the divisor stays B.
    """
    # 1. Predict both views with the online network; project both with the target.
    with clock.phase("online"), miner.watching():
        hidden_BVH, prediction_BVD = predict(batch.views[TWO])
        miner.send(hidden_BVH)  # the large factor travels while the target network computes
    with clock.phase("target"):
        target_BVD = target(batch.views)
    other_BVD = target_BVD[:, TWO].flip(1)  # each view's prediction is compared with the other view's target
    loss_byol = byol_loss(prediction_BVD, other_BVD).mean()
    if miner.policy is None:
        return Losses(loss_byol, loss_byol, torch.zeros_like(loss_byol), target_BVD, None)

    with clock.phase("mining"):
        # 2. The loss gradients' factors at the predictor's last layer, in closed form, gathered over ranks.
        factors = miner.gradients(hidden_BVH, prediction_BVD, other_BVD, batch.views[TWO], lr)
        rows = Candidates(factors, target_BVD[:, TWO], batch.index, batch.group, batch.label, support=target_BVD)
        columns, blocks = miner.gather(rows, step)
        # 3. TracIn of my images against every image; each takes the best that is not itself as its positive.
        best = miner.choose(rows, columns, blocks, step)
        mined = miner.select(best)
        weight_Bk = positive_weights(mined)

    # 4. BYOL's loss on the two views, plus the weighted one towards the mined positives' targets.
    positive_BkVD = columns.target[mined.index.clamp(min=0)].flip(2)
    loss_mined = (weight_Bk * byol_loss(prediction_BVD[:, None], positive_BkVD)).sum(1).mean()
    found = Found(mined, best, rows, columns)
    return Losses(loss_byol + weight * loss_mined, loss_byol, loss_mined, target_BVD, found)


def train_step(
    engine: Any,
    target: Target,
    batch: Batch,
    miner: Miner,
    *,
    tau: float,
    accept: Callable[[Tensor], bool] = lambda loss: True,
    **context: Any,
) -> Losses:
    """One optimiser step, unless ``accept`` refuses the loss; ``context`` is for ``byol_with_mined_positives``."""
    losses = byol_with_mined_positives(engine, target, batch, miner, **context)
    if not accept(losses.loss):
        return losses
    # 5. Backward and step through DeepSpeed; the target follows by an exponential moving average.
    with context["clock"].phase("backward"):
        engine.backward(losses.loss)
    with context["clock"].phase("update"):
        engine.step()
        target.follow(engine.module, tau)
    return losses
