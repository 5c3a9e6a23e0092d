"""A fixed random projection of the hidden activations: inner products are kept on average, at fewer bytes."""

import torch
from torch import Tensor

from tracekin.influence.precision import exact, widen

SEED = 0x7E57


def sketch_matrix(width: int, dim: int, device: torch.device, layer: int = 0) -> Tensor:
    """[width, dim] fp32 of signs / sqrt(dim) (Achlioptas, 2003): E[(h S) . (g S)] = h . g; the same on every rank.

    The error of one product is about |h| |g| / sqrt(dim). Each ``layer`` has signs of its own, so that the errors of
    several layers do not add up.
    """
    generator = torch.Generator().manual_seed(SEED + layer)  # on the CPU, so that every device draws the same signs
    signs = torch.randint(0, 2, (width, dim), generator=generator) * 2 - 1
    matrix: Tensor = signs * dim**-0.5
    return matrix.to(device, torch.float32)


def sketched(hidden: Tensor, matrix: Tensor) -> Tensor:
    """[..., H] -> [..., dim], fp32 (or float64)."""
    with exact(hidden.device):
        wide = widen(hidden.detach())
        return wide @ matrix.to(wide.dtype)
