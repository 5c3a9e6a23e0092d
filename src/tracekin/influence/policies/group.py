"""Another image of the anchor's own group (patient, lesion), drawn uniformly; images without one are masked.

Positives by metadata as in MICLe (Azizi et al., arXiv 2101.05224) and MedAug (Vu et al., arXiv 2102.10663). Mates are
rare in a batch: ``mining.queue`` finds more. MedAug's best choice, the same study of the same patient, needs groups
that are studies. Control: ``random``.
"""

from torch import Tensor

from tracekin.influence.candidates import Pool
from tracekin.influence.mining import Score
from tracekin.influence.policies import random
from tracekin.influence.policies.policy import Policy


def score(pool: Pool) -> Score:
    draw = random.score(pool)

    def mates(part: slice) -> Tensor:
        return draw(part) * (pool.rows.groups[:, None] == pool.columns.groups[part])

    return mates


POLICY = Policy(score, same_group=True)
