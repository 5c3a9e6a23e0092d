"""Nearest by features: the cosine of target projections, summed over the pairs of views. A control of all influence."""

from tracekin.influence.candidates import Pool
from tracekin.influence.mining import Score
from tracekin.influence.policies.policy import Policy
from tracekin.influence.similarity import pairwise_feature


def score(pool: Pool) -> Score:
    return lambda part: pairwise_feature(pool.rows.target, pool.columns.target[part])


POLICY = Policy(score)
