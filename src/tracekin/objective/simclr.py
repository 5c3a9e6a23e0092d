"""SimCLR (Chen et al., arXiv 2002.05709): each view against its other view and all views of all other images.

Shape suffixes: B images of this rank, V views, k mined an image, A anchors (views of this rank's images), N columns
(all views of the global batch), D projection width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tracekin.config import Config, ModelConfig
from tracekin.distributed import collectives
from tracekin.influence.gradients import through_unit, unit
from tracekin.influence.precision import exact, widen
from tracekin.model.networks import Heads, Online, hidden_block
from tracekin.objective.objective import Comparison, Objective, Parts


class Contrasted(Comparison):
    """NT-Xent: l_i is the mean over its views of -log softmax of cos / temperature (equation 1).

    The softmax is over the views of the global batch but the anchor itself.
    """

    def __init__(self, output_BVD: Tensor, projection_BVD: Tensor, ids_B: Tensor, temperature: float) -> None:
        self.output_BVD, self.seen_BVD, self.temperature = output_BVD, projection_BVD, temperature
        self.ids_B, self.ids_N = ids_B, collectives.gather(ids_B).repeat_interleave(2)
        self.unit_BVD = F.normalize(output_BVD, dim=-1)
        self.unit_ND = collectives.gather_with_gradient(self.unit_BVD).flatten(0, 1)
        first = collectives.rank() * 2 * len(ids_B)
        self.own_A = torch.arange(first, first + 2 * len(ids_B), device=ids_B.device)
        self.log_sum_BV: Tensor | None = None

    def loss(self, avoid_Bk: Tensor | None = None) -> Parts:
        logit_AN = self.unit_BVD.flatten(0, 1) @ self.unit_ND.T / self.temperature
        logit_AN = logit_AN.scatter(1, self.own_A[:, None], -torch.inf)
        if avoid_Bk is not None:
            avoided_BN = (avoid_Bk[:, :, None] == self.ids_N).any(1)
            logit_AN = logit_AN.masked_fill(avoided_BN.repeat_interleave(2, 0), -torch.inf)
        self.log_sum_BV = logit_AN.logsumexp(1).view(-1, 2)
        cosine_B = (self.unit_BVD[:, 0] * self.unit_BVD[:, 1]).sum(-1)
        return Parts(self.log_sum_BV.mean() - cosine_B.mean() / self.temperature, {})

    def delta(self) -> Tensor:
        """At the unit vectors (1 / 2T) [sum over b of (P_ab + P_ba) u_b - 2 u_pos(a)], with P the softmax."""
        with exact(self.output_BVD.device):
            output_BVD = widen(self.output_BVD)
            unit_AD = unit(output_BVD).flatten(0, 1)
            unit_ND = collectives.gather(unit_AD)
            logit_AN = (unit_AD @ unit_ND.T / self.temperature).scatter_(1, self.own_A[:, None], -torch.inf)
            log_sum_A = logit_AN.logsumexp(1)
            both_AN = (logit_AN - log_sum_A[:, None]).exp_()
            both_AN += (logit_AN - collectives.gather(log_sum_A)).exp_()  # the logits are symmetric
            pull_AD = both_AN @ unit_ND - 2 * unit_AD.view(-1, 2, unit_AD.shape[1]).flip(1).flatten(0, 1)
            return through_unit(output_BVD, pull_AD.view_as(output_BVD) / (2 * self.temperature))

    def attraction(self, positive_BkVD: Tensor, weight_Bk: Tensor) -> Tensor:
        """The same with the positive's other view in the numerator; the denominator stays (FNC's attraction)."""
        assert self.log_sum_BV is not None, "loss first"
        positive_BkVD = F.normalize(positive_BkVD, dim=-1).flip(2)
        cosine_BkV = (self.unit_BVD[:, None] * positive_BkVD).sum(-1)
        each_Bk = (self.log_sum_BV[:, None] - cosine_BkV / self.temperature).mean(2)
        return (weight_Bk * each_Bk).sum(1).mean()


class SimCLR(Objective):
    def __init__(self, config: Config, online: Online) -> None:
        super().__init__(config, online)
        self.temperature: float = config.objective.option("temperature")

    @staticmethod
    def heads(model: ModelConfig, features: int) -> Heads:
        """A two-layer projector (section 2.1), batch norm between its layers as in the authors' code.

        That code ends in another batch norm. Left out: influence is exact where the last layer is Linear.
        """
        return Heads(
            nn.Sequential(
                hidden_block(features, model.projector_hidden), nn.Linear(model.projector_hidden, model.projection)
            )
        )

    def compare(self, output_BVD: Tensor, projection_BVD: Tensor, ids_B: Tensor, step: int) -> Comparison:
        return Contrasted(output_BVD, projection_BVD, ids_B, self.temperature)


OBJECTIVE = SimCLR
