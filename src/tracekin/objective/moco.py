"""MoCo v2 (Chen et al., arXiv 2003.04297) and v3 (Chen, Xie and He, arXiv 2104.02057): queries against a target's keys.

In v2 the negatives are the keys of past batches, in v3 those of the other images of the global batch. Both directions
are compared, as v3 does and the authors of v2 in their own small-scale code; the target's decay rises as in v3.

Shape suffixes: B images of this rank, V views, k mined an image, N images whose keys are compared, D projection width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tracekin.config import Config, ModelConfig
from tracekin.distributed import collectives
from tracekin.influence.gradients import through_unit, unit
from tracekin.influence.precision import exact, widen
from tracekin.model.networks import Heads, Online, Outputs, hidden_block, normed_linear
from tracekin.objective.objective import Comparison, Objective, Parts, permutation


class Memory(nn.Module):
    """The keys of the last images, the same on every rank, in the order of the global batch; the oldest go first.

    Keys are unit vectors of both views. An image's own older keys are no negatives of it, nor are empty places.
    """

    keys_NVD: Tensor
    ids_N: Tensor
    written: Tensor

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("keys_NVD", torch.zeros(size, 2, width))
        self.register_buffer("ids_N", torch.full((size,), -1, dtype=torch.int64))
        self.register_buffer("written", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def write(self, keys_BVD: Tensor, ids_B: Tensor) -> None:
        """Keep this rank's images and those of all others. Collective."""
        keys, ids = collectives.gather(keys_BVD), collectives.gather(ids_B)
        places = (self.written + torch.arange(len(ids), device=ids.device)) % len(self.ids_N)
        self.keys_NVD.index_copy_(0, places, keys)
        self.ids_N.index_copy_(0, places, ids)
        self.written += len(ids)


class Queried(Comparison):
    """InfoNCE: -log softmax of cos(q, k) / T over the image's own key, the other view's, and the negatives'.

    Keys take no gradient: an image's loss is its own.

    Args:
        output_BVD: queries.
        projection_BVD: keys of the same images.
        ids_B: of the images.
        negative_NVD: unit vectors; those of a query are the keys of its positive's view.
        negative_ids_N: -1 where there is none.
        temperature: T.
        scale: of the sum over both directions.
    """

    def __init__(
        self,
        output_BVD: Tensor,
        projection_BVD: Tensor,
        ids_B: Tensor,
        negative_NVD: Tensor,
        negative_ids_N: Tensor,
        temperature: float,
        scale: float,
    ) -> None:
        self.output_BVD, self.seen_BVD = output_BVD, projection_BVD
        self.key_BVD = F.normalize(projection_BVD[:, :2], dim=-1).flip(1)
        self.negative_NVD, self.negative_ids_N = negative_NVD, negative_ids_N
        self.temperature, self.scale = temperature, scale
        self.none_BN = (ids_B[:, None] == negative_ids_N) | (negative_ids_N < 0)
        self.log_sum_BV: Tensor | None = None

    def loss(self, avoid_Bk: Tensor | None = None) -> Parts:
        none_BN = self.none_BN
        if avoid_Bk is not None:
            none_BN = none_BN | (avoid_Bk[:, :, None] == self.negative_ids_N).any(1)
        own_BV, logit_BVN = self._logits(F.normalize(self.output_BVD, dim=-1), none_BN)
        self.log_sum_BV = torch.cat((own_BV[:, :, None], logit_BVN), 2).logsumexp(2)
        return Parts(self.scale * (self.log_sum_BV - own_BV).sum(1).mean(), {})

    def delta(self) -> Tensor:
        """At the unit query (scale / T) [sum over keys of P k - k_own], with P the softmax."""
        with exact(self.output_BVD.device):
            output_BVD = widen(self.output_BVD)
            own_BV, logit_BVN = self._logits(unit(output_BVD), self.none_BN)
            share = torch.cat((own_BV[:, :, None], logit_BVN), 2).softmax(2)
            pull_BVD = torch.einsum("bvn,nvd->bvd", share[:, :, 1:].flip(1), self.negative_NVD).flip(1)
            pull_BVD += (share[:, :, :1] - 1) * self.key_BVD
            return through_unit(output_BVD, self.scale / self.temperature * pull_BVD)

    def attraction(self, positive_BkVD: Tensor, weight_Bk: Tensor) -> Tensor:
        """The same with the positive's key in the numerator; the denominator stays (FNC's attraction)."""
        assert self.log_sum_BV is not None, "loss first"
        positive_BkVD = F.normalize(positive_BkVD, dim=-1).flip(2)
        cosine_BkV = (F.normalize(self.output_BVD, dim=-1)[:, None] * positive_BkVD).sum(-1)
        each_Bk = self.scale * (self.log_sum_BV[:, None] - cosine_BkV / self.temperature).sum(2)
        return (weight_Bk * each_Bk).sum(1).mean()

    def _logits(self, query_BVD: Tensor, none_BN: Tensor) -> tuple[Tensor, Tensor]:
        """Of the image's own key, and of the negatives; -inf where there is none."""
        own_BV = (query_BVD * self.key_BVD).sum(-1) / self.temperature
        # Each query meets the keys of its positive's view; the small side is turned round, not the queue.
        logit_BVN = torch.einsum("bvd,nvd->bvn", query_BVD.flip(1), self.negative_NVD).flip(1) / self.temperature
        return own_BV, logit_BVN.masked_fill(none_BN[:, None], -torch.inf)


class MoCo(Objective):
    def __init__(self, config: Config, online: Online) -> None:
        super().__init__(config, online)
        self.temperature: float = config.objective.option("temperature")
        self.seed, self.shuffled = config.seed, config.objective.norm == "shuffled"
        self.memory: Memory | None = None
        if config.objective.queue:
            weight = next(online.parameters())
            self.memory = Memory(config.objective.queue, config.model.projection).to(weight)
        # v2: the mean of both directions. v3: their sum, times 2 T (its algorithm 1).
        self.scale = 0.5 if config.objective.version == 2 else 2 * self.temperature

    @staticmethod
    def heads(model: ModelConfig, features: int) -> Heads:
        """v2: two layers without batch norm. v3: BYOL's, but keys leave through a batch norm (its authors' ResNet)."""
        width = model.projector_hidden
        if not model.predictor_hidden:
            block = nn.Sequential(nn.Linear(features, width), nn.ReLU(inplace=True))
            return Heads(nn.Sequential(block, nn.Linear(width, model.projection)))
        projector = nn.Sequential(hidden_block(features, width, bias=False), normed_linear(width, model.projection))
        predictor = hidden_block(model.projection, model.predictor_hidden, bias=False)
        return Heads(projector, predictor, nn.Linear(model.predictor_hidden, model.projection))

    @torch.no_grad()
    def project(self, views_VBCSS: Tensor, online: Outputs, step: int) -> Tensor:
        if not self.shuffled:
            return super().project(views_VBCSS, online, step)
        # Keys are normalised among other images than their queries, or batch norm gives the pairs away (MoCo, 3.3).
        everyones = collectives.gather(views_VBCSS.transpose(0, 1).contiguous())
        order_N = permutation(len(everyones), self.seed, step).to(everyones.device)
        size = views_VBCSS.shape[1]
        mine = slice(collectives.rank() * size, (collectives.rank() + 1) * size)
        keys_BVD = super().project(everyones[order_N[mine]].transpose(0, 1), online, step)
        return collectives.gather(keys_BVD)[order_N.argsort()[mine]]

    def compare(self, output_BVD: Tensor, projection_BVD: Tensor, ids_B: Tensor, step: int) -> Comparison:
        if self.memory is not None:
            negatives = self.memory.keys_NVD, self.memory.ids_N
        else:
            keys_BVD = F.normalize(projection_BVD[:, :2], dim=-1)
            negatives = collectives.gather(keys_BVD), collectives.gather(ids_B)
        return Queried(output_BVD, projection_BVD, ids_B, *negatives, self.temperature, self.scale)

    def remember(self, projection_BVD: Tensor, ids_B: Tensor) -> None:
        if self.memory is not None:
            self.memory.write(F.normalize(projection_BVD[:, :2], dim=-1), ids_B)

    @property
    def kept(self) -> dict[str, nn.Module]:
        return super().kept | ({} if self.memory is None else {"memory": self.memory})


OBJECTIVE = MoCo
