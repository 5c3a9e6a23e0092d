"""Influence and features agree: the cosine of gradients times the summed cosines of features, both positive.

An image that helps by its gradient but looks unlike the anchor, or the reverse, scores 0. Controls: ``tracin_cosine``
and ``feature``, the two parts.
"""

from torch import Tensor

from tracekin.influence.candidates import Pool
from tracekin.influence.mining import Score
from tracekin.influence.policies import feature, tracin
from tracekin.influence.policies.policy import Policy


def score(pool: Pool) -> Score:
    influence, look = tracin.score(pool), feature.score(pool)

    def both(part: slice) -> Tensor:
        return influence(part).clamp(min=0) * look(part).clamp(min=0)

    return both


POLICY = Policy(score, gradients="last", normalise=True)
