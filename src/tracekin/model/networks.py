"""The networks of every objective: online (trained) and target (its exponential moving average).

Shape suffixes: B images, V views, C channels, S side, F features, H width of the last layer's input, D of its output.
"""

import copy
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tracekin.model.batch_norm import CrossRankBatchNorm


class Heads(NamedTuple):
    """What stands on the backbone."""

    projector: nn.Sequential
    """Hidden blocks, and a last layer: Linear if there is no predictor."""
    predictor: nn.Sequential | None = None
    """A hidden block."""
    predictor_last: nn.Linear | None = None


class Outputs(NamedTuple):
    """What the online network makes of some views, in the weights' dtype."""

    hidden: Tensor
    """[B, V, H] input of the last Linear layer, without graph."""
    output: Tensor
    """[B, V, D] output of that layer: the prediction, or without a predictor the projection."""
    projection: Tensor
    """[B, V, D] output of the projector, without graph."""


class Online(nn.Module):
    """Backbone, projector and, in some objectives, a predictor. Each view is a forward pass with its own batch norms.

    Args:
        backbone: [B, C, S, S] -> [B, F].
        heads: on it; without a predictor the projector ends in a Linear layer.
        autocast: compute the backbone and all but the last layers of the heads in bf16.
    """

    def __init__(self, backbone: nn.Module, heads: Heads, autocast: bool = False) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector, self.predictor, self.predictor_last = heads
        self.autocast = autocast

    def forward(self, views_VBCSS: Tensor) -> Outputs:
        """Embed each view."""
        hidden, projections = [], []
        for view_BCSS in views_VBCSS:
            with _autocast(view_BCSS.device, self.autocast):
                features_BF = self.backbone(_channels_last(view_BCSS))
            *blocks, last = self.projector
            hidden_BH = self._hidden(blocks, features_BF)
            if self.predictor is not None:
                with _autocast(view_BCSS.device, False):
                    projections.append(last(hidden_BH))
                hidden_BH = self._hidden([self.predictor], projections[-1])
            hidden.append(hidden_BH)
        hidden_BVH = torch.stack(hidden, 1)
        with _autocast(hidden_BVH.device, False):
            output_BVD = (self.predictor_last or self.projector[-1])(hidden_BVH)
        projection_BVD = torch.stack(projections, 1) if projections else output_BVD
        return Outputs(hidden_BVH.detach(), output_BVD, projection_BVD.detach())

    def _hidden(self, blocks: Sequence[nn.Module], x: Tensor) -> Tensor:
        """Hidden blocks, under autocast but for what follows the last one's Linear layer.

        Influence is exact only in fp32: rounding the last layer's input or output to bf16 flips the arg max of anchors
        at high cosine.
        """
        *early, late = blocks
        linear, *rest = late.children()
        narrow = self.autocast and len(rest) > 1  # a bare ReLU would keep what the layer has rounded
        with _autocast(x.device, self.autocast):
            for block in early:
                x = block(x)
        with _autocast(x.device, narrow):
            x = linear(x if narrow else x.to(linear.weight.dtype))  # type: ignore[arg-type]
        with _autocast(x.device, False):
            x = x.to(linear.weight.dtype)  # type: ignore[arg-type]
            for layer in rest:
                x = layer(x)
        return x


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
        dtype = next(self.projector.parameters()).dtype
        targets = []
        for view_BCSS in views_VBCSS:
            with _autocast(view_BCSS.device, self.autocast):
                features_BF = self.backbone(_channels_last(view_BCSS))
            with _autocast(view_BCSS.device, False):
                targets.append(self.projector(features_BF.to(dtype)))
        return torch.stack(targets, 1)

    @torch.no_grad()
    def follow(self, online: Online, tau: float) -> None:
        """Move each parameter to tau target + (1 - tau) online, in fp32 (in bf16 the increments vanish)."""
        theirs: list[Tensor] = [*online.backbone.parameters(), *online.projector.parameters()]
        torch._foreach_lerp_([*self.parameters()], theirs, 1 - tau)


def tau_at(step: int, num_steps: int, base: float) -> float:
    """EMA decay of a step: 1 - (1 - base)(cos(pi step / num_steps) + 1) / 2 (BYOL, section 3.2)."""
    return 1 - (1 - base) * (math.cos(math.pi * step / num_steps) + 1) / 2


def hidden_block(inputs: int, width: int, *, bias: bool = True) -> nn.Sequential:
    """Linear, batch norm over all ranks, ReLU."""
    return nn.Sequential(nn.Linear(inputs, width, bias=bias), CrossRankBatchNorm(width), nn.ReLU(inplace=True))


def normed_linear(inputs: int, width: int) -> nn.Sequential:
    """Linear and batch norm over all ranks, nothing after it learnt: how some projectors end."""
    return nn.Sequential(nn.Linear(inputs, width, bias=False), CrossRankBatchNorm(width, affine=False))


def _autocast(device: torch.device, enabled: bool) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def _channels_last(view_BCSS: Tensor) -> Tensor:
    # The activations, not the weights: DeepSpeed's first broadcast over gloo refuses channels-last weights.
    return view_BCSS.contiguous(memory_format=torch.channels_last)
