"""Each objective told once more: lightly's losses where there are some, else the paper's formula; and drawn cases.

Shape suffixes: B images, V views, k mined an image, N images in a queue, D projection width.
"""

from typing import Any
from unittest import mock

import torch
from lightly.loss import BarlowTwinsLoss, NegativeCosineSimilarity, NTXentLoss, VICRegLoss, WMSELoss
from torch import Tensor
from torch.nn import functional as F

from tests.train.tiny_run import tiny_backbone
from tracekin.config import Config, ModelConfig, ObjectiveConfig, TrainConfig, own
from tracekin.objective import Objective, build_objective, build_online
from tracekin.objective.objective import Comparison, permutation

CASES: dict[str, dict[str, Any]] = {
    "byol": {"name": "byol"},
    "simsiam": {"name": "simsiam"},
    "simclr": {"name": "simclr"},
    "moco2": {"name": "moco"},
    "moco3": {"name": "moco", "version": 3},
    "barlow_twins": {"name": "barlow_twins"},
    "vicreg": {"name": "vicreg"},
    "wmse": {"name": "wmse"},
}
"""Every loss that ``objective.name`` and ``version`` choose between."""
OWN_GRADIENT = ("byol", "simsiam", "moco2", "moco3")
"""Those whose images have losses of their own, which ``each`` tells."""
STEP = 5
MEMORY = 3
"""Batches that moco's queue holds in drawn cases."""


class Drawn:
    """Float64 outputs of a drawn batch, and the objective that compares them.

    Args:
        case: of ``CASES``.
        seed: of all numbers.
        size: images.
        width: of the outputs.
        remembered: past batches that moco's queue has seen; it holds ``MEMORY``.
        options: of the objective.
    """

    def __init__(
        self, case: str, seed: int, size: int = 8, width: int = 3, remembered: int = MEMORY + 1, **options: Any
    ) -> None:
        self.case, self.generator = case, torch.Generator().manual_seed(seed)
        self.objective = objective_of(case, size, width, **options)
        self.size, self.width = size, width
        # Some coordinates vary less than 1 and some more: VICReg's hinge has two sides. Views of an image are alike.
        self.scale_D = 0.2 + 2 * self.numbers(width).abs()
        common_BVD = self.numbers(size, 1, width)
        self.output_BVD = (self.scale_D * (common_BVD + self.numbers(size, 2, width))).requires_grad_()
        self.projection_BVD = self.output_BVD.detach()
        if "predictor_hidden" in own(**CASES[case]).widths or self.objective.target is not None:
            self.projection_BVD = self.scale_D * (common_BVD + self.numbers(size, 2, width))
        # An image may have been in the queue's batches too.
        self.ids_B = self.order(3 * size)
        for _ in range(remembered):
            self.objective.remember(self.numbers(size, 2, width), self.order(3 * size))

    def numbers(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def order(self, of: int) -> Tensor:
        return torch.randperm(of, generator=self.generator)[: self.size]

    def compare(self) -> Comparison:
        return self.objective.compare(self.output_BVD, self.projection_BVD, self.ids_B, STEP)

    def truth(self, avoid_Bk: Tensor | None = None) -> Tensor:
        return truth(self.objective, self.output_BVD, self.projection_BVD, self.ids_B, avoid_Bk)

    def gradient(self, loss: Tensor) -> Tensor:
        """At the outputs, [B, 2, D]."""
        return torch.autograd.grad(loss, self.output_BVD)[0]


def objective_of(case: str, size: int, width: int, **options: Any) -> Objective:
    """A float64 objective for batches of ``size`` images with outputs of some width."""
    if case == "moco2":
        options = {"queue": MEMORY * size} | options
    predicts = "predictor_hidden" in own(**CASES[case]).widths
    config = Config(
        model=ModelConfig(projector_hidden=4, projection=width, predictor_hidden=4 if predicts else 0),
        objective=ObjectiveConfig(**CASES[case], **options),
        train=TrainConfig(global_batch=size, precision="fp32"),
    )
    with tiny_backbone():
        objective = build_objective(config, build_online(config))
    for net in objective.kept.values():
        net.double()
    return objective


def truth(
    objective: Any, output_BVD: Tensor, projection_BVD: Tensor, ids_B: Tensor, avoid_Bk: Tensor | None = None
) -> Tensor:
    """The loss of a batch; ``avoid_Bk`` are ids of images that each image is not compared with."""
    a_BD, b_BD = output_BVD.unbind(1)
    match objective.name:
        case "simclr" if avoid_Bk is None:
            loss: Tensor = NTXentLoss(objective.temperature)(a_BD, b_BD)
            return loss
        case "simclr":
            return without_some(output_BVD, ids_B, avoid_Bk, objective.temperature)
        case "barlow_twins":
            return BarlowTwinsLoss(objective.redundancy)(a_BD, b_BD)
        case "vicreg":
            return VICRegLoss(*objective.weights)(a_BD, b_BD)
        case "wmse":
            return whitened(objective, output_BVD)
    return each(objective, output_BVD, projection_BVD, ids_B, avoid_Bk).mean()


def each(
    objective: Any, output_BVD: Tensor, projection_BVD: Tensor, ids_B: Tensor, avoid_Bk: Tensor | None = None
) -> Tensor:
    """[B] losses of the images of objectives in ``OWN_GRADIENT``."""
    other_BVD = projection_BVD[:, :2].flip(1)
    if objective.name in ("byol", "simsiam"):
        cosine = NegativeCosineSimilarity()
        found = [sum(cosine(p[None], t[None]) for p, t in zip(*pair)) for pair in zip(output_BVD, other_BVD)]  # noqa: B905
        negative_B = torch.stack(found)  # type: ignore[arg-type]
        # (2 - 2 cos) of each of two views, or the mean of minus the cosines.
        return 4 + 2 * negative_B if objective.name == "byol" else negative_B / 2
    avoid_Bk = ids_B[:, None] if avoid_Bk is None else torch.cat((ids_B[:, None], avoid_Bk), 1)
    if objective.memory is None:
        return moco3(objective.temperature, output_BVD, other_BVD, ids_B, avoid_Bk)
    losses = []
    for query_VD, key_VD, avoid_k in zip(output_BVD, other_BVD, avoid_Bk, strict=True):
        kept_N = ~torch.isin(objective.memory.ids_N, avoid_k) & (objective.memory.ids_N >= 0)
        for view in range(2):
            bank_ND = objective.memory.keys_NVD[kept_N, 1 - view]
            entropy = NTXentLoss(objective.temperature, memory_bank_size=(len(bank_ND), bank_ND.shape[1]))
            entropy.memory_bank.bank = bank_ND.clone()
            # It learns keys where queries have a gradient, after it was asked.
            losses.append(entropy(query_VD[view][None], key_VD[view][None]) if len(bank_ND) else query_VD.sum() * 0)
    return torch.stack(losses).view(-1, 2).mean(1)


def moco3(temperature: float, output_BVD: Tensor, other_BVD: Tensor, ids_B: Tensor, avoid_Bk: Tensor) -> Tensor:
    """arXiv 2104.02057, algorithm 1: ``ctr(q1, k2) + ctr(q2, k1)``, ctr = 2 tau x the cross-entropy of q k^T / tau."""
    losses = []
    for i, avoid_k in enumerate(avoid_Bk):
        kept_B = ~torch.isin(ids_B, avoid_k)
        kept_B[i] = True
        label = kept_B[:i].sum()
        for view in range(2):
            query_D, key_BD = F.normalize(output_BVD[i, view], dim=0), F.normalize(other_BVD[kept_B, view], dim=1)
            losses.append(2 * temperature * F.cross_entropy(key_BD @ query_D / temperature, label))
    return torch.stack(losses).view(-1, 2).sum(1)


def without_some(output_BVD: Tensor, ids_B: Tensor, avoid_Bk: Tensor, temperature: float) -> Tensor:
    """NT-Xent with both views of some images deleted from the denominators of both views of an anchor."""
    columns, ids = F.normalize(output_BVD.flatten(0, 1), dim=1), ids_B.repeat_interleave(2)
    losses = []
    for anchor in range(len(columns)):
        kept = ~torch.isin(ids, avoid_Bk[anchor // 2])
        kept[anchor] = False
        label = kept[: anchor ^ 1].sum()  # the other view stands beside the anchor
        losses.append(F.cross_entropy(columns[kept] @ columns[anchor] / temperature, label))
    return torch.stack(losses).mean()


def whitened(objective: Any, output_BVD: Tensor) -> Tensor:
    """W-MSE over the sub-batches that our objective draws."""
    size, _, width = output_BVD.shape
    theirs = WMSELoss(embedding_dim=width, w_size=objective.sub_batch, track_running_stats=False)
    with mock.patch("torch.randperm", return_value=permutation(size, objective.seed, STEP)):
        loss: Tensor = theirs(torch.cat(output_BVD.unbind(1)))
    assert loss.dtype == output_BVD.dtype
    return loss


def attracted(
    objective: Any,
    output_BVD: Tensor,
    projection_BVD: Tensor,
    ids_B: Tensor,
    positive_BkVD: Tensor,
    weight_Bk: Tensor,
) -> Tensor:
    """The loss towards positives, image by image: mean over all images of the weighted sum over each one's positives.

    ``positive_BkVD`` are rows of what the comparison shows the miner.
    """
    terms = []
    size = len(output_BVD)
    match objective.name:
        case "barlow_twins":  # the only one whose mean over images stands within the formula
            deviation_VD = (output_BVD.var(0, unbiased=False) + 1e-5).sqrt()
            standard_BVD = (output_BVD - output_BVD.mean(0)) / deviation_VD
            for (i, k), weight in _numbered(weight_Bk):
                crossed_VD = positive_BkVD[i, k][[1, 0]]
                terms.append(weight * (standard_BVD[i] - crossed_VD).square().mean(0) / 2)
            return (torch.stack(terms).sum(0) / size).square().sum()
        case "wmse":
            seen_BVD = _whiten(objective, output_BVD)
        case _:
            seen_BVD = output_BVD
    denominators_BV = _log_sums(objective, output_BVD, projection_BVD, ids_B)
    for (i, k), weight in _numbered(weight_Bk):
        for view in range(2):
            mine, theirs = seen_BVD[i, view], positive_BkVD[i, k, 1 - view]
            cosine = torch.dot(mine, theirs) / (mine.norm() * theirs.norm())
            match objective.name:
                case "byol":
                    term = 2 - 2 * cosine
                case "simsiam" | "wmse":
                    term = (2 - 2 * cosine) / (4 if objective.name == "simsiam" else 2)
                case "simclr":
                    term = (denominators_BV[i, view] - cosine / objective.temperature) / 2
                case "moco":
                    scale = 1 / 2 if objective.memory is not None else 2 * objective.temperature
                    term = scale * (denominators_BV[i, view] - cosine / objective.temperature)
                case "vicreg":
                    term = objective.weights[0] * (mine - theirs).square().mean() / 2
            terms.append(weight * term)
    return torch.stack(terms).sum() / size


def _numbered(weight_Bk: Tensor) -> list[tuple[tuple[int, int], Tensor]]:
    return [((i, k), weight_Bk[i, k]) for i in range(len(weight_Bk)) for k in range(weight_Bk.shape[1])]


def _log_sums(objective: Any, output_BVD: Tensor, projection_BVD: Tensor, ids_B: Tensor) -> Tensor:
    """[B, V] logarithms of the plain losses' denominators: -log softmax of the own positive, and its logit."""
    if objective.name not in ("simclr", "moco"):
        return torch.zeros(output_BVD.shape[:2])
    unit_BVD = F.normalize(output_BVD, dim=-1)
    if objective.name == "simclr":
        logit = unit_BVD.flatten(0, 1) @ unit_BVD.flatten(0, 1).T / objective.temperature
        return logit.masked_fill(torch.eye(len(logit), dtype=torch.bool), -torch.inf).logsumexp(1).view(-1, 2)
    key_BVD = F.normalize(projection_BVD[:, :2], dim=-1)
    pool_NVD, pool_ids = (
        (objective.memory.keys_NVD, objective.memory.ids_N) if objective.memory is not None else (key_BVD, ids_B)
    )
    rows = []
    for i, identity in enumerate(ids_B):
        others_NVD = torch.cat((key_BVD[i][None], pool_NVD[(pool_ids != identity) & (pool_ids >= 0)]))
        rows.append([(others_NVD[:, 1 - v] @ unit_BVD[i, v] / objective.temperature).logsumexp(0) for v in range(2)])
    return torch.stack([torch.stack(row) for row in rows])


def _whiten(objective: Any, output_BVD: Tensor) -> Tensor:
    white_BVD = torch.empty_like(output_BVD)
    for part in permutation(len(output_BVD), objective.seed, STEP).view(-1, objective.sub_batch):
        for view in range(2):
            centred = output_BVD[part, view] - output_BVD[part, view].mean(0)
            factor = torch.linalg.cholesky(centred.T @ centred / (len(part) - 1))
            white_BVD[part, view] = (torch.linalg.inv(factor) @ centred.T).T
    return white_BVD


def relative(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over that of what is expected."""
    return float(torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected))
