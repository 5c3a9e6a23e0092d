"""A training step of each objective as a user of lightly writes it: the peer of ``benchmarks.objectives``.

The form is that of lightly's own examples (examples/pytorch): a torchvision ResNet, each view a forward pass, the slow
copies moved first, then loss, backward and optimiser. Where these leave the forms unequal, it is another of lightly's:

- heads: ``ProjectionHead`` with our layers and widths, biases included, so that the nets are equal;
- byol: the loss of its ImageNet benchmark, four times that of its example;
- moco: both directions, halved, as its CIFAR-10 benchmark; each has a memory bank of its own, so that no query meets
  its own key among the negatives. Only v2 without shuffling: lightly has no v3, and shuffles among GPUs;
- wmse, of which there is no example: ``WMSELoss`` of both views, one after the other, as its docstring does.
"""

import copy
from collections.abc import Callable
from typing import TypeVar

import torch
from lightly.loss import BarlowTwinsLoss, NegativeCosineSimilarity, NTXentLoss, VICRegLoss, WMSELoss
from lightly.models.modules.heads import ProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from torch import Tensor, nn

from tracekin.config import Config, UserError
from tracekin.model.backbone import plain_backbone
from tracekin.model.networks import Online
from tracekin.train.optimiser import build_optimiser

Module = TypeVar("Module", bound=nn.Module)


class Net(nn.Module):
    """Backbone, heads and, with ``momentum``, slow copies; of the weights of ``online``."""

    def __init__(self, config: Config, online: Online, momentum: bool) -> None:
        super().__init__()
        self.backbone = _with_weights(plain_backbone(config.model, config.data.channels), online.backbone)
        self.projection_head = _head(online.projector)
        if online.predictor is not None and online.predictor_last is not None:
            self.prediction_head = _head(nn.Sequential(online.predictor, online.predictor_last))
        if momentum:
            self.backbone_momentum = copy.deepcopy(self.backbone)
            self.projection_head_momentum = copy.deepcopy(self.projection_head)
            deactivate_requires_grad(self.backbone_momentum)
            deactivate_requires_grad(self.projection_head_momentum)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.projection_head(self.backbone(x).flatten(start_dim=1))
        return z

    def forward_momentum(self, x: Tensor) -> Tensor:
        z: Tensor = self.projection_head_momentum(self.backbone_momentum(x).flatten(start_dim=1))
        return z.detach()


def byol(net: Net, criteria: nn.ModuleList, x0: Tensor, x1: Tensor) -> Tensor:
    (criterion,) = criteria
    p0 = net.prediction_head(net(x0))
    z0 = net.forward_momentum(x0)
    p1 = net.prediction_head(net(x1))
    z1 = net.forward_momentum(x1)
    loss: Tensor = 2 * criterion(z0, p1) + 2 * criterion(z1, p0)
    return loss


def simsiam(net: Net, criteria: nn.ModuleList, x0: Tensor, x1: Tensor) -> Tensor:
    (criterion,) = criteria
    z0 = net(x0)
    p0 = net.prediction_head(z0)
    z1 = net(x1)
    p1 = net.prediction_head(z1)
    loss: Tensor = 0.5 * (criterion(z0.detach(), p1) + criterion(z1.detach(), p0))
    return loss


def moco(net: Net, criteria: nn.ModuleList, x0: Tensor, x1: Tensor) -> Tensor:
    towards_x1, towards_x0 = criteria
    loss: Tensor = 0.5 * (towards_x1(net(x0), net.forward_momentum(x1)) + towards_x0(net(x1), net.forward_momentum(x0)))
    return loss


def of_projections(net: Net, criteria: nn.ModuleList, x0: Tensor, x1: Tensor) -> Tensor:
    (criterion,) = criteria
    loss: Tensor = criterion(net(x0), net(x1))
    return loss


def wmse(net: Net, criteria: nn.ModuleList, x0: Tensor, x1: Tensor) -> Tensor:
    (criterion,) = criteria
    loss: Tensor = criterion(torch.cat([net(x0), net(x1)]))
    return loss


LOSSES: dict[str, Callable[[Net, nn.ModuleList, Tensor, Tensor], Tensor]] = {
    "byol": byol,
    "simsiam": simsiam,
    "moco": moco,
    "simclr": of_projections,
    "barlow_twins": of_projections,
    "vicreg": of_projections,
    "wmse": wmse,
}


class LightlyStep:
    """Net, criteria and optimiser of a training; a call is one step.

    Args:
        config: of objective, model and optimiser; the precision is fp32.
        online: whose weights are taken over.
        momentum: the objective has slow copies.
        lr: of every step.
    """

    def __init__(self, config: Config, online: Online, *, momentum: bool, lr: float) -> None:
        objective = config.objective
        device = next(online.parameters()).device
        self.net = Net(config, online, momentum).to(device).train()
        self.criteria = _criteria(config).to(device)
        self.loss_of = LOSSES[objective.name]
        self.tau = objective.tau_base if momentum else None
        self.optimiser = build_optimiser(self.net, config.optimiser, zero_stage=0)
        for group in self.optimiser.param_groups:
            group["lr"] = lr

    def loss(self, views_VBCSS: Tensor) -> Tensor:
        x0, x1 = views_VBCSS
        return self.loss_of(self.net, self.criteria, x0, x1)

    def __call__(self, views_VBCSS: Tensor) -> Tensor:
        if self.tau is not None:
            update_momentum(self.net.backbone, self.net.backbone_momentum, m=self.tau)
            update_momentum(self.net.projection_head, self.net.projection_head_momentum, m=self.tau)
        loss = self.loss(views_VBCSS)
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad()
        return loss.detach()


def refuse_unequal(config: Config) -> None:
    """Refuse what lightly has no equal of.

    Raises:
        UserError: MoCo v3, shuffled batch norms, sub-batches of fewer images than twice the dimensions.
    """
    objective, width = config.objective, config.model.projection
    if objective.version == 3 or objective.norm == "shuffled":
        key = "version=3" if objective.version == 3 else "norm=shuffled"
        raise UserError(
            f"objective.{key}: lightly has neither MoCo v3 nor shuffling on one device; accepted are version=2 and"
            " norm=cross_rank. Leave it out."
        )
    if objective.sub_batch is not None and objective.sub_batch < 2 * width:
        raise UserError(
            f"model.projection={width}: lightly whitens at least twice as many images as dimensions; accepted with"
            f" objective.sub_batch={objective.sub_batch} is 1 to {objective.sub_batch // 2}."
        )


def _criteria(config: Config) -> nn.ModuleList:
    """The losses, as many as a step calls, with our config's constants."""
    objective, width = config.objective, config.model.projection
    match objective.name:
        case "moco":
            bank = objective.queue, width
            found = [NTXentLoss(temperature=objective.temperature, memory_bank_size=bank) for _ in range(2)]
        case "simclr":
            found = [NTXentLoss(temperature=objective.temperature)]
        case "barlow_twins":
            found = [BarlowTwinsLoss(lambda_param=objective.redundancy)]
        case "vicreg":
            found = [VICRegLoss(objective.invariance, objective.variance, objective.covariance)]
        case "wmse":
            found = [WMSELoss(embedding_dim=width, w_size=objective.sub_batch)]
        case _:
            found = [NegativeCosineSimilarity()]
    return nn.ModuleList(found)


def _head(ours: nn.Module) -> ProjectionHead:
    """lightly's head of the same layers and weights."""
    blocks: list[list[object]] = []
    for layer in ours.modules():
        if isinstance(layer, nn.Linear):
            blocks.append([layer.in_features, layer.out_features, None, None, layer.bias is not None])
        elif isinstance(layer, nn.SyncBatchNorm):
            blocks[-1][2] = nn.BatchNorm1d(layer.num_features, affine=layer.affine)
        elif isinstance(layer, nn.ReLU):
            blocks[-1][3] = nn.ReLU()
    return _with_weights(ProjectionHead(blocks), ours)


def _with_weights(module: Module, ours: nn.Module) -> Module:
    """``module`` with the weights and buffers of ``ours``, which has the same in the same order."""
    values = ours.state_dict().values()
    module.load_state_dict(dict(zip(module.state_dict(), values, strict=True)))
    return module
