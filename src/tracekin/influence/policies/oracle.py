"""An eligible image of the same label, drawn uniformly: an upper bound, as it sees the labels."""

from tracekin.config import UserError
from tracekin.influence.candidates import Pool
from tracekin.influence.mining import Score
from tracekin.influence.policies import random
from tracekin.influence.policies.policy import Policy
from tracekin.influence.similarity import shares_label


def score(pool: Pool) -> Score:
    if pool.rows.labels.shape[1] == 0:
        raise UserError("mining.policy=oracle needs labels, and this dataset has none; choose another mining.policy.")
    draw = random.score(pool)
    return lambda part: draw(part) * shares_label(pool.rows.labels, pool.columns.labels[part])


POLICY = Policy(score)
