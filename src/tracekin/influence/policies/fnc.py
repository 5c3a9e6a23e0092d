"""Support views that vote, after false-negative cancellation (FNC; Huynh et al., arXiv 2011.11765).

Each support view of the anchor votes for the images whose target projection, in any of their views, it resembles with a
cosine above THRESHOLD. The score is the number of votes, ties decided by the mean cosine; an image without a vote is no
positive. Support views are the anchor's two views and ``mining.support_views`` more. FNC's public code compares eight
support views and both views by their largest cosine, above 0.7 and among the ten best; counting votes is our reading.
Control: ``feature``.
"""

import torch
from torch import Tensor

from tracekin.influence.candidates import Pool
from tracekin.influence.gradients import unit
from tracekin.influence.mining import Score
from tracekin.influence.policies.policy import Policy
from tracekin.influence.precision import exact, widen

THRESHOLD = 0.7


def score(pool: Pool) -> Score:
    views = pool.rows.target if pool.rows.support is None else pool.rows.support
    with exact(views.device):
        support_RSD = unit(widen(views))

    def votes(part: slice) -> Tensor:
        with exact(views.device):
            column_CVD = unit(widen(pool.columns.target[part]))
            cosine_RSCV = torch.einsum("rsd,cvd->rscv", support_RSD, column_CVD)
            nearest_RSC = cosine_RSCV.amax(3)
            count_RC = (nearest_RSC > THRESHOLD).sum(1)
            # Cosines lie in -1..1: half their mean, shifted to 0..1/2, never weighs as much as a vote.
            return torch.where(count_RC > 0, count_RC + (nearest_RSC.mean(1) + 1) / 4, 0)

    return votes


POLICY = Policy(score)
