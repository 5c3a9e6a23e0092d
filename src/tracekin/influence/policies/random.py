"""Any eligible image, drawn uniformly from (seed, step, ids): the control of every policy."""

from tracekin.influence.candidates import Pool
from tracekin.influence.mining import Score
from tracekin.influence.policies.policy import Policy
from tracekin.influence.similarity import pairwise_random


def score(pool: Pool) -> Score:
    return lambda part: pairwise_random(pool.rows.ids, pool.columns.ids[part], pool.seed, pool.step)


POLICY = Policy(score)
