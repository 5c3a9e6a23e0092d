"""Batch norm over the global batch, on GPU and CPU: what makes W ranks equal one process."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tracekin.distributed import collectives


class CrossRankBatchNorm(nn.SyncBatchNorm):
    """torch's SyncBatchNorm, which refuses CPU tensors, with a CPU path of the same meaning."""

    def forward(self, input: Tensor) -> Tensor:
        if collectives.world_size() == 1:  # a world of one has a process group too, and torch asks for CUDA there
            return _BatchNorm.forward(self, input)
        if input.is_cuda or not self.training:
            return super().forward(input)
        assert self.momentum is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        assert self.running_mean is not None
        affine: tuple[Tensor, Tensor] = (self.weight, self.bias)
        if not self.affine:
            affine = (torch.ones_like(self.running_mean), torch.zeros_like(self.running_mean))
        return _CrossRankNorm.apply(  # type: ignore[no-any-return]
            input, *affine, self.running_mean, self.running_var, self.momentum, self.eps
        )


class GroupBatchNorm(CrossRankBatchNorm):
    """Batch norm over parts of the global batch: ``groups`` of consecutive images, each with statistics of its own.

    What MoCo shuffles keys against, without a rank's share of the batch having to be such a part: the outcome depends
    on ``groups``, a multiple of the world size, and not on the world. Running statistics are the groups' mean.
    """

    def __init__(self, num_features: int, eps: float, momentum: float | None, groups: int) -> None:
        super().__init__(num_features, eps, momentum)
        self.groups = groups

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return _BatchNorm.forward(self, input)
        assert self.momentum is not None
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        self.num_batches_tracked.add_(1)
        parts, statistics = [], []
        for part in input.chunk(self.groups // collectives.world_size()):
            found = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var)
            parts.append(F.batch_norm(part, *found, self.weight, self.bias, training=True, momentum=1.0, eps=self.eps))
            statistics.append(torch.stack(found))
        mean, var = (collectives.total(torch.stack(statistics).sum(0)) / self.groups).unbind()
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var, self.momentum)
        return torch.cat(parts)


def convert_batch_norms(module: nn.Module, groups: int = 0) -> nn.Module:
    """Replace every BatchNorm inside ``module`` in place, by one over all ranks, or over ``groups`` of their images.

    Parameters and buffers are kept. Returns the module.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
            of = child.num_features, child.eps, child.momentum
            norm = (GroupBatchNorm(*of, groups) if groups else CrossRankBatchNorm(*of)).to(child.weight)
            norm.load_state_dict(child.state_dict())
            setattr(module, name, norm)
        else:
            convert_batch_norms(child, groups)
    return module


class _CrossRankNorm(torch.autograd.Function):
    """y = (x - m) / sqrt(v + eps) w + b with m, v over the samples of all ranks.

    Every pass over the activations is one of torch's fused kernels, which read bf16 and compute in fp32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        momentum: float,
        eps: float,
    ) -> Tensor:
        local_count = x.numel() // x.shape[1]
        local_mean, local_var = torch.ops.aten.batch_norm_update_stats(
            x, torch.zeros_like(running_mean), torch.ones_like(running_var), 0.0
        )
        # Means and variances are merged, not sums of squares, which cancel (Chan et al. 1979).
        packed = torch.cat([local_mean, local_var, local_mean.new_tensor([local_count])])
        gathered = collectives.gather(packed[None])
        means, variances, counts = torch.split(gathered, [x.shape[1], x.shape[1], 1], dim=1)
        count = counts.sum()
        mean = (counts * means).sum(0) / count
        var = (counts * (variances + (means - mean).square())).sum(0) / count
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(var * (count / (count - 1)), momentum)
        ctx.save_for_backward(x, weight, mean, var, count)
        ctx.eps = eps
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var, count = ctx.saved_tensors
        # In evaluation mode the kernel gives dy w / sqrt(v + eps) and this rank's sums of dy x^ and dy.
        direct, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad_outputs[0].contiguous(memory_format=_format(x)),
            x,
            weight,
            mean,
            var,
            None,
            None,
            False,
            ctx.eps,
            [True, True, True],
        )
        mean_dy_xhat, mean_dy = (collectives.total(torch.stack([grad_weight, grad_bias])) / count).unbind()
        scale = -weight * (var + ctx.eps).rsqrt()
        # What flows back through mean and variance, -w / sqrt(v + eps) (mean dy x^ . x^ + mean dy), is affine in x.
        through = F.batch_norm(x, mean, var, scale * mean_dy_xhat, scale * mean_dy, training=False, eps=ctx.eps)
        return direct.add_(through), grad_weight, grad_bias, None, None, None, None


def _format(x: Tensor) -> torch.memory_format:
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format
