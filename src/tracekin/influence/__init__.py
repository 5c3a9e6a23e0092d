"""Which other image's gradient helps mine most: pure tensors, no processes, exact in fp32."""

from tracekin.influence.candidates import Block, Candidates, Pool
from tracekin.influence.diagnostics import agreement, hit_and_chance, in_degree, score_gap
from tracekin.influence.gradients import Factors, gradient_factors, normalised, self_influence
from tracekin.influence.mining import Best, Mined, mine
from tracekin.influence.policies import POLICIES, choose
from tracekin.influence.policies.policy import Policy
from tracekin.influence.queue import Queue
from tracekin.influence.selection import keep_above, keep_mutual, positive_weights
from tracekin.influence.similarity import pairwise_feature, pairwise_random, pairwise_tracin, shares_label
from tracekin.influence.sketch import sketch_matrix, sketched

__all__ = [
    "POLICIES",
    "Best",
    "Block",
    "Candidates",
    "Factors",
    "Mined",
    "Policy",
    "Pool",
    "Queue",
    "agreement",
    "choose",
    "gradient_factors",
    "hit_and_chance",
    "in_degree",
    "keep_above",
    "keep_mutual",
    "mine",
    "normalised",
    "pairwise_feature",
    "pairwise_random",
    "pairwise_tracin",
    "positive_weights",
    "score_gap",
    "self_influence",
    "shares_label",
    "sketch_matrix",
    "sketched",
]
