"""Which other image's gradient helps mine most: pure tensors, no processes, exact in fp32."""

from tracekin.influence.diagnostics import hit_and_chance, in_degree
from tracekin.influence.gradients import Factors, gradient_factors, normalised, self_influence
from tracekin.influence.mining import Mined, mine
from tracekin.influence.policies import POLICIES, USES_FACTORS, Candidates, choose
from tracekin.influence.similarity import pairwise_feature, pairwise_random, pairwise_tracin, shares_label

__all__ = [
    "POLICIES",
    "USES_FACTORS",
    "Candidates",
    "Factors",
    "Mined",
    "choose",
    "gradient_factors",
    "hit_and_chance",
    "in_degree",
    "mine",
    "normalised",
    "pairwise_feature",
    "pairwise_random",
    "pairwise_tracin",
    "self_influence",
    "shares_label",
]
