"""TracIn (Pruthi et al., arXiv 2002.08484) of one step: the inner product of two images' loss gradients.

Prefers images with large gradients, which become hubs. Controls: ``tracin_cosine``, ``feature``, ``random``.
"""

from functools import reduce

import torch

from tracekin.influence.candidates import Pool
from tracekin.influence.mining import Score
from tracekin.influence.policies.policy import Policy
from tracekin.influence.similarity import pairwise_tracin


def score(pool: Pool) -> Score:
    """Inner products of gradients, summed over the layers or checkpoints that the candidates carry."""

    def block(part: slice) -> torch.Tensor:
        layers = zip(pool.rows.factors, pool.columns.part(part).factors, strict=True)
        return reduce(torch.add, (pairwise_tracin(rows, columns) for rows, columns in layers))

    return block


POLICY = Policy(score, gradients="last")
