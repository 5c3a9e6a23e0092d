"""SGD and AdamW from torch, and LARS; biases and batch norms are never decayed."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tracekin.config import OptimiserConfig
from tracekin.distributed import collectives

DEFAULT_LR = {"sgd": 0.5, "lars": 0.3, "adamw": 1e-3}


def _itself(squares: Tensor) -> Tensor:
    return squares


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al., arXiv 1708.03888) as BYOL uses it.

    u = g + weight_decay w; v = momentum v + ratio u with ratio = eta |w| / |u|, or 1 where either norm is 0;
    w = w - lr v. Groups with ``adapt`` False (biases, batch norms) take ratio 1 and no decay.

    A norm is one weight tensor's. Under ZeRO an optimiser sees flat slices, so each adapted group holds one tensor
    and ``sum_squares`` adds the slices' squared norms over ranks.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        momentum: float,
        eta: float = 1e-3,
        sum_squares: Callable[[Tensor], Tensor] = _itself,
    ) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "eta": eta, "weight_decay": 0.0, "adapt": True})
        self.sum_squares = sum_squares

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is None:
                    continue
                update = w.grad
                if group["adapt"]:
                    update = w.grad + group["weight_decay"] * w
                    squares = self.sum_squares(torch.stack([w.square().sum(), update.square().sum()]))
                    w_norm, update_norm = squares.sqrt().unbind()
                    ratio = torch.where((w_norm > 0) & (update_norm > 0), group["eta"] * w_norm / update_norm, 1.0)
                    update = ratio * update
                velocity = self.state[w].setdefault("momentum_buffer", torch.zeros_like(w))
                velocity.mul_(group["momentum"]).add_(update)
                w.sub_(group["lr"] * velocity)


def build_optimiser(module: nn.Module, config: OptimiserConfig, zero_stage: int) -> torch.optim.Optimizer:
    """The optimiser of ``module``'s trainable parameters; the learning rate is set anew at each step."""
    weights = [p for p in module.parameters() if p.requires_grad and p.ndim > 1]
    plain = [p for p in module.parameters() if p.requires_grad and p.ndim <= 1]
    lr = DEFAULT_LR[config.name]
    if config.name == "lars":
        adapted = [{"params": [w], "weight_decay": config.weight_decay} for w in weights]
        across = collectives.total if zero_stage > 0 else _itself
        return LARS([*adapted, {"params": plain, "adapt": False}], lr, config.momentum, sum_squares=across)
    groups = [{"params": weights, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=(config.momentum, 0.999))
    return torch.optim.SGD(groups, lr=lr, momentum=config.momentum)


def peak_lr(config: OptimiserConfig, global_batch: int) -> float:
    """The peak learning rate at this batch: linear in it for SGD and LARS, as given for AdamW."""
    lr = DEFAULT_LR[config.name] if config.lr is None else config.lr
    return lr if config.name == "adamw" else lr * global_batch / 256
