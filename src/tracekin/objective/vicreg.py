"""VICReg (Bardes, Ponce and LeCun, arXiv 2105.04906): views agree, coordinates vary over the global batch, and apart.

Shape suffixes: B images of this rank, V views, k mined an image, D projection width.
"""

import torch
from torch import Tensor

from tracekin.config import Config, ModelConfig
from tracekin.influence.precision import exact
from tracekin.model.networks import Heads, Online
from tracekin.objective.objective import Comparison, Objective, Parts
from tracekin.objective.statistics import batch_mean, batch_product, batch_size, three_layers

EPSILON = 1e-4
"""Added to variances (section 4.1)."""


class Regularised(Comparison):
    """Equation 6, as the authors' code weighs it.

    invariance x mean squared distance of the views + variance x mean over views and coordinates of max(0, 1 - std)
    + covariance x sum over views of (sum of squared covariances off the diagonal) / D. Statistics are unbiased.
    """

    def __init__(self, output_BVD: Tensor, projection_BVD: Tensor, weights: tuple[float, float, float]) -> None:
        self.output_BVD, self.seen_BVD, self.weights = output_BVD, projection_BVD, weights
        self.size = batch_size(output_BVD)
        self.centred_BVD = output_BVD - batch_mean(output_BVD)
        unbiased = self.size / (self.size - 1)
        self.covariance_VDD = unbiased * torch.stack([batch_product(z_BD, z_BD) for z_BD in self.centred_BVD.unbind(1)])
        self.std_VD = (self.covariance_VDD.diagonal(dim1=1, dim2=2) + EPSILON).sqrt()

    def loss(self, avoid_Bk: Tensor | None = None) -> Parts:
        invariance = (self.output_BVD[:, 0] - self.output_BVD[:, 1]).square().mean()
        variance = (1 - self.std_VD).relu().mean()
        covariance = self._apart().square().sum() / self.output_BVD.shape[-1]
        parts = {"invariance": invariance, "variance": variance, "covariance": covariance}
        return Parts(sum(w * part for w, part in zip(self.weights, parts.values(), strict=True)), parts)  # type: ignore[arg-type]

    def delta(self) -> Tensor:
        """The three terms' gradients, times the images of the batch."""
        with exact(self.output_BVD.device):
            invariance, variance, covariance = self.weights
            width, unbiased = self.output_BVD.shape[-1], self.size / (self.size - 1)
            agree_BVD = 2 * invariance / width * (self.output_BVD - self.output_BVD.flip(1))
            low_VD = (self.std_VD < 1) / self.std_VD
            vary_BVD = -variance / (2 * width) * unbiased * low_VD * self.centred_BVD
            product_BVD = torch.einsum("bvd,vde->bve", self.centred_BVD, self._apart())
            return agree_BVD + vary_BVD + 4 * covariance / width * unbiased * product_BVD

    def attraction(self, positive_BkVD: Tensor, weight_Bk: Tensor) -> Tensor:
        """The invariance term, with its weight."""
        distance_Bk = (self.output_BVD[:, None] - positive_BkVD.flip(2)).square().mean((2, 3))
        return self.weights[0] * (weight_Bk * distance_Bk).sum(1).mean()

    def _apart(self) -> Tensor:
        """Covariances with a diagonal of 0."""
        return self.covariance_VDD - torch.diag_embed(self.covariance_VDD.diagonal(dim1=1, dim2=2))


class VICReg(Objective):
    def __init__(self, config: Config, online: Online) -> None:
        super().__init__(config, online)
        option = config.objective.option
        self.weights = (option("invariance"), option("variance"), option("covariance"))

    @staticmethod
    def heads(model: ModelConfig, features: int) -> Heads:
        """A projector (expander) of three layers, four times as wide as the features (section 4.2)."""
        return three_layers(model, features)

    def compare(self, output_BVD: Tensor, projection_BVD: Tensor, ids_B: Tensor, step: int) -> Comparison:
        return Regularised(output_BVD, projection_BVD, self.weights)


OBJECTIVE = VICReg
