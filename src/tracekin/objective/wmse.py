"""W-MSE (Ermolov et al., arXiv 2007.06346): views agree after whitening, which leaves no room for collapse.

Shape suffixes: B images of this rank, N of all ranks, V views, k mined an image, D projection width, G sub-batches of S
images each.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tracekin.config import Config, ModelConfig
from tracekin.distributed import collectives
from tracekin.influence.gradients import through_unit, unit
from tracekin.influence.precision import exact
from tracekin.model.networks import Heads, Online, hidden_block
from tracekin.objective.objective import Comparison, Objective, Parts, permutation


class Whitened(Comparison):
    """l_i = 2 - 2 cos(w^a, w^b), with each view's projections whitened within random sub-batches (equation 5).

    Whitening is w = L^-1 (z - mean), with L the Cholesky factor of the sub-batch's unbiased covariance (section 3.1).
    All ranks whiten the same sub-batches of the global batch, in float64: they are small.
    """

    def __init__(self, output_BVD: Tensor, projection_BVD: Tensor, order_N: Tensor, sub_batch: int) -> None:
        self.order_N, self.sub_batch, self.dtype = order_N, sub_batch, output_BVD.dtype
        size = len(output_BVD)
        self.mine = slice(collectives.rank() * size, (collectives.rank() + 1) * size)
        everyones = collectives.gather_with_gradient(output_BVD)
        self.white_GVSD, self.factor_GVDD = _whiten(self._dealt(everyones))
        self.unit_BVD = F.normalize(self._undealt(self.white_GVSD), dim=-1)[self.mine].to(self.dtype)
        with torch.no_grad():
            self.seen_BVD = self.unit_BVD.detach()
            if projection_BVD.shape[1] > 2:
                more_GVSD, _ = _whiten(self._dealt(collectives.gather(projection_BVD[:, 2:])))
                more_BVD = unit(self._undealt(more_GVSD))[self.mine].to(self.dtype)
                self.seen_BVD = torch.cat((self.seen_BVD, more_BVD), 1)

    def loss(self, avoid_Bk: Tensor | None = None) -> Parts:
        return Parts((2 - 2 * (self.unit_BVD[:, 0] * self.unit_BVD[:, 1]).sum(-1)).mean(), {})

    def delta(self) -> Tensor:
        """L^-T (g + (P + P^T) w / (S - 1)) less its mean, with g the gradient at the whitened w.

        P is minus the lower triangle of the sum of g w^T, its diagonal halved: what the Cholesky factor takes.
        """
        with exact(self.order_N.device):
            white_GVSD, size = self.white_GVSD, self.sub_batch
            g_GVSD = through_unit(white_GVSD, -2 * unit(white_GVSD.flip(1)))
            taken_GVDD = -(g_GVSD.mT @ white_GVSD).tril()
            taken_GVDD.diagonal(dim1=-2, dim2=-1).mul_(0.5)
            at_white_GVSD = g_GVSD + white_GVSD @ (taken_GVDD + taken_GVDD.mT) / (size - 1)
            delta_GVSD = torch.linalg.solve_triangular(self.factor_GVDD, at_white_GVSD, upper=False, left=False)
            delta_GVSD = delta_GVSD - delta_GVSD.mean(2, keepdim=True)
            return self._undealt(delta_GVSD)[self.mine].to(self.dtype)

    def attraction(self, positive_BkVD: Tensor, weight_Bk: Tensor) -> Tensor:
        """The same distance, to the positive's other view as it was whitened in its own sub-batch."""
        cosine_BkV = (self.unit_BVD[:, None] * positive_BkVD.flip(2)).sum(-1)
        return (weight_Bk * (2 - 2 * cosine_BkV).mean(2)).sum(1).mean()

    def _dealt(self, z_NVD: Tensor) -> Tensor:
        """Into sub-batches, in float64: [G, V, S, D]."""
        return z_NVD.double()[self.order_N].view(-1, self.sub_batch, *z_NVD.shape[1:]).transpose(1, 2)

    def _undealt(self, z_GVSD: Tensor) -> Tensor:
        return z_GVSD.transpose(1, 2).flatten(0, 1)[self.order_N.argsort()]


class WMSE(Objective):
    def __init__(self, config: Config, online: Online) -> None:
        super().__init__(config, online)
        self.seed, self.sub_batch = config.seed, int(config.objective.option("sub_batch"))

    @staticmethod
    def heads(model: ModelConfig, features: int) -> Heads:
        """A two-layer projector with batch norm between its layers (section 4)."""
        width = model.projector_hidden
        return Heads(nn.Sequential(hidden_block(features, width), nn.Linear(width, model.projection)))

    def compare(self, output_BVD: Tensor, projection_BVD: Tensor, ids_B: Tensor, step: int) -> Comparison:
        order_N = permutation(len(ids_B) * collectives.world_size(), self.seed, step).to(ids_B.device)
        return Whitened(output_BVD, projection_BVD, order_N, self.sub_batch)


def _whiten(z_GVSD: Tensor) -> tuple[Tensor, Tensor]:
    """Whitened vectors, and the Cholesky factors [G, V, D, D]; not a number where there is none, for guards to see."""
    centred_GVSD = z_GVSD - z_GVSD.mean(2, keepdim=True)
    covariance_GVDD = centred_GVSD.mT @ centred_GVSD / (z_GVSD.shape[2] - 1)
    factor_GVDD, failed_GV = torch.linalg.cholesky_ex(covariance_GVDD)
    factor_GVDD = factor_GVDD.masked_fill((failed_GV > 0)[..., None, None], torch.nan)
    return torch.linalg.solve_triangular(factor_GVDD, centred_GVSD.mT, upper=False).mT, factor_GVDD


OBJECTIVE = WMSE
