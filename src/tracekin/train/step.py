"""One step of BYOL with mined positives: the method (docs: README, "The method"), and nothing else.

Our reading of Zeng et al., "Additional Positive Enables Better Representation Learning for Medical Images" (arXiv
2306.00112), on top of BYOL (arXiv 2006.07733) and TracIn (arXiv 2002.08484).

Shape suffixes: V views, B images of this rank, P images of all ranks (the pool), D projection width.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tracekin.config import MiningConfig
from tracekin.data.stream import Batch
from tracekin.distributed import collectives
from tracekin.influence.gradients import Factors, gradient_factors
from tracekin.influence.mining import Mined
from tracekin.influence.policies import USES_FACTORS, Candidates, choose
from tracekin.model.byol import Target, byol_loss
from tracekin.monitor.metrics import Clock


class Losses(NamedTuple):
    """What a step computes before its backward pass; losses are means over this rank's images, targets local."""

    loss: Tensor
    loss_byol: Tensor
    loss_mined: Tensor
    target_VBD: Tensor
    mined: Mined | None
    rows: Candidates | None
    pool: Candidates | None


def byol_with_mined_positives(
    predict: Callable[[Tensor], tuple[Tensor, Tensor]],
    target: Target,
    batch: Batch,
    mining: MiningConfig,
    *,
    weight: float,
    seed: int,
    step: int,
    clock: Clock,
    traffic: collectives.Traffic,
) -> Losses:
    """Both losses of one batch; ``predict`` is the online network or the engine around it.

    The mean over ranks of ``loss`` is the global batch's loss: images without a proponent add 0, the divisor stays B.
    """
    # 1. Predict both views with the online network; project both with the target.
    with clock.phase("online"):
        hidden_VBH, prediction_VBD = predict(batch.views)
    with clock.phase("target"):
        target_VBD = target(batch.views)
    other_VBD = target_VBD.flip(0)  # each view's prediction is compared with the other view's target
    loss_byol = byol_loss(prediction_VBD, other_VBD).mean()
    if mining.policy == "none":
        return Losses(loss_byol, loss_byol, torch.zeros_like(loss_byol), target_VBD, None, None, None)

    with clock.phase("mining"):
        # 2. The loss gradients' factors at the predictor's last layer, in closed form, gathered over ranks.
        influence = mining.policy in USES_FACTORS
        factors = gradient_factors(hidden_VBH, prediction_VBD, other_VBD) if influence else None
        rows = Candidates(factors, target_VBD, batch.index, batch.group, batch.label)
        pool = gather_candidates(rows, traffic)
        # 3. TracIn of my images against every image; each takes the best that is not itself as its positive.
        mined = choose(mining.policy, rows, pool, seed=seed, step=step, exclude_group=mining.exclude_group)
        mined_B = mined.index[:, 0]

    # 4. BYOL's loss on the two views, plus the weighted one towards the mined positive's target.
    positive_VBD = pool.target[:, mined_B.clamp(min=0)].flip(0)
    loss_mined = (byol_loss(prediction_VBD, positive_VBD) * (mined_B >= 0)).mean()
    return Losses(loss_byol + weight * loss_mined, loss_byol, loss_mined, target_VBD, mined, rows, pool)


def train_step(
    engine: Any, target: Target, batch: Batch, mining: MiningConfig, *, tau: float, **context: Any
) -> Losses:
    """One optimiser step; ``context`` is passed to ``byol_with_mined_positives``."""
    losses = byol_with_mined_positives(engine, target, batch, mining, **context)
    # 5. Backward and step through DeepSpeed; the target follows by an exponential moving average.
    with context["clock"].phase("backward"):
        engine.backward(losses.loss)
    with context["clock"].phase("update"):
        engine.step()
        target.follow(engine.module, tau)
    return losses


def gather_candidates(rows: Candidates, traffic: collectives.Traffic) -> Candidates:
    """Every rank's candidates, in rank order; nothing gathered carries a gradient."""
    factors = rows.factors and Factors(*(collectives.gather(factor, 1, traffic) for factor in rows.factors))
    return Candidates(
        factors,
        collectives.gather(rows.target, 1, traffic),
        *(collectives.gather(column, 0, traffic) for column in (rows.ids, rows.groups, rows.labels)),
    )
