"""Barlow Twins (Zbontar et al., arXiv 2103.03230): the views' cross-correlation over the global batch becomes identity.

Shape suffixes: B images of this rank, V views, k mined an image, D projection width.
"""

import torch
from torch import Tensor

from tracekin.config import Config, ModelConfig
from tracekin.influence.precision import exact
from tracekin.model.networks import Heads, Online
from tracekin.objective.objective import Comparison, Objective, Parts
from tracekin.objective.statistics import batch_mean, batch_product, three_layers

EPSILON = 1e-5
"""Added to variances, as the authors' code does."""


class Correlated(Comparison):
    """L = sum over d of (1 - C_dd)^2 + redundancy x the sum over d != e of C_de^2 (equation 1).

    C = mean over the global batch of z^a (z^b)^T, with each coordinate of each view standardised over that batch.
    """

    def __init__(self, output_BVD: Tensor, projection_BVD: Tensor, redundancy: float) -> None:
        self.redundancy = redundancy
        self.standard_BVD, self.scale_VD = _standardised(output_BVD)
        with torch.no_grad():
            self.seen_BVD, _ = _standardised(projection_BVD)
        self.correlation_DD = batch_product(self.standard_BVD[:, 0], self.standard_BVD[:, 1])

    def loss(self, avoid_Bk: Tensor | None = None) -> Parts:
        diagonal_D = self.correlation_DD.diagonal()
        invariance = (1 - diagonal_D).square().sum()
        redundancy = (self.correlation_DD - diagonal_D.diag()).square().sum()
        return Parts(invariance + self.redundancy * redundancy, {"invariance": invariance, "redundancy": redundancy})

    def delta(self) -> Tensor:
        """At z^a: (E z^b - diag(C E^T) z^a) / sigma^a, with E = dL/dC, from which standardising takes its own part."""
        with exact(self.standard_BVD.device):
            c_DD = self.correlation_DD
            e_DD = 2 * self.redundancy * c_DD
            e_DD.diagonal().copy_(-2 * (1 - c_DD.diagonal()))
            a_BD, b_BD = self.standard_BVD.unbind(1)
            own_D = (c_DD * e_DD).sum(1), (c_DD * e_DD).sum(0)
            at_views = b_BD @ e_DD.T - own_D[0] * a_BD, a_BD @ e_DD - own_D[1] * b_BD
            return torch.stack(at_views, 1) * self.scale_VD

    def attraction(self, positive_BkVD: Tensor, weight_Bk: Tensor) -> Tensor:
        """The invariance term: 1 - C_dd is half the mean squared distance of the standardised coordinates."""
        square_BkVD = (self.standard_BVD[:, None] - positive_BkVD.flip(2)).square()
        distance_BD = (weight_Bk[:, :, None] * square_BkVD.mean(2)).sum(1) / 2
        return batch_mean(distance_BD).square().sum()


class BarlowTwins(Objective):
    def __init__(self, config: Config, online: Online) -> None:
        super().__init__(config, online)
        self.redundancy: float = config.objective.option("redundancy")

    @staticmethod
    def heads(model: ModelConfig, features: int) -> Heads:
        """A projector of three layers, four times as wide as the features (section 2.2)."""
        return three_layers(model, features, bias=False)

    def compare(self, output_BVD: Tensor, projection_BVD: Tensor, ids_B: Tensor, step: int) -> Comparison:
        return Correlated(output_BVD, projection_BVD, self.redundancy)


def _standardised(z_BVD: Tensor) -> tuple[Tensor, Tensor]:
    """Mean 0 and variance 1 over the global batch, and the inverse standard deviations [V, D]."""
    centred_BVD = z_BVD - batch_mean(z_BVD)
    scale_VD = (batch_mean(centred_BVD.square()) + EPSILON).rsqrt()
    return centred_BVD * scale_VD, scale_VD


OBJECTIVE = BarlowTwins
