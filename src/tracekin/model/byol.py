"""BYOL (Grill et al., arXiv 2006.07733): the online and the target network, the loss, and the EMA between them.

Shape suffixes: B images, V views, C channels, S side, H predictor's hidden width, D projection width.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tracekin.config import ModelConfig
from tracekin.model.backbone import build_backbone
from tracekin.model.batch_norm import CrossRankBatchNorm


class Online(nn.Module):
    """Backbone, projector and predictor. Each view is a forward pass with batch statistics of its own."""

    def __init__(self, config: ModelConfig, channels: int, autocast: bool = False) -> None:
        super().__init__()
        self.backbone = build_backbone(config, channels)
        width = int(self.backbone.num_features)  # type: ignore[arg-type]
        self.projector = nn.Sequential(
            _hidden(width, config.projector_hidden), nn.Linear(config.projector_hidden, config.projection)
        )
        self.predictor = _hidden(config.projection, config.predictor_hidden)
        self.predictor_last = nn.Linear(config.predictor_hidden, config.projection)
        self.autocast = autocast

    def forward(self, views_VBCSS: Tensor) -> tuple[Tensor, Tensor]:
        """Predict each view.

        Returns:
            hidden_BVH, the input of the predictor's last layer, without graph, and prediction_BVD, its output; in the
            weights' dtype.
        """
        hidden = []
        for view_BCSS in views_VBCSS:
            with _autocast(view_BCSS.device, self.autocast):
                first_BH = self.predictor[0](self.projector(self.backbone(_channels_last(view_BCSS))))
            # Influence is exact only in fp32: rounding h or p to bf16 flips the arg max of anchors at high cosine.
            with _autocast(view_BCSS.device, False):
                hidden.append(self.predictor[1:](first_BH.to(self.predictor_last.weight.dtype)))
        hidden_BVH = torch.stack(hidden, 1)
        with _autocast(hidden_BVH.device, False):
            return hidden_BVH.detach(), self.predictor_last(hidden_BVH)


class Target(nn.Module):
    """The online network's slow copy of backbone and projector; it takes no gradient and keeps its own buffers."""

    def __init__(self, online: Online) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(online.backbone)
        self.projector = copy.deepcopy(online.projector)
        self.autocast = online.autocast
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, views_VBCSS: Tensor) -> Tensor:
        """Project each view: target_BVD in the weights' dtype."""
        targets = []
        for view_BCSS in views_VBCSS:
            with _autocast(view_BCSS.device, self.autocast):
                features = self.backbone(_channels_last(view_BCSS))
            with _autocast(view_BCSS.device, False):
                targets.append(self.projector(features.to(self.projector[-1].weight.dtype)))
        return torch.stack(targets, 1)

    @torch.no_grad()
    def follow(self, online: Online, tau: float) -> None:
        """Move each parameter to tau target + (1 - tau) online, in fp32 (in bf16 the increments vanish)."""
        theirs: list[Tensor] = [*online.backbone.parameters(), *online.projector.parameters()]
        torch._foreach_lerp_([*self.parameters()], theirs, 1 - tau)


def byol_loss(prediction_BVD: Tensor, target_BVD: Tensor) -> Tensor:
    """BYOL's loss of each image, sum over views of 2 - 2 cos(p, t): [..., V, D] -> [...], shapes that broadcast.

    ``target[:, u]`` is what ``prediction[:, u]`` is compared with: the other view's projection.
    """
    return (2 - 2 * F.cosine_similarity(prediction_BVD, target_BVD, dim=-1)).sum(-1)


def tau_at(step: int, num_steps: int, base: float) -> float:
    """EMA decay of a step: 1 - (1 - base)(cos(pi step / num_steps) + 1) / 2 (BYOL, section 3.2)."""
    return 1 - (1 - base) * (math.cos(math.pi * step / num_steps) + 1) / 2


def _hidden(inputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, width), CrossRankBatchNorm(width), nn.ReLU(inplace=True))


def _autocast(device: torch.device, enabled: bool) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def _channels_last(view_BCSS: Tensor) -> Tensor:
    # The activations, not the weights: DeepSpeed's first broadcast over gloo refuses channels-last weights.
    return view_BCSS.contiguous(memory_format=torch.channels_last)
