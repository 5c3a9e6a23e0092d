"""Influence arithmetic is fp32 whatever surrounds it: no autocast, no TF32, no gradient.

With inputs or products rounded to bf16 the chosen positive of half the anchors flips once predictions are close to
their targets (cosine 0.99995), so a training script's speed settings must not reach this arithmetic.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """Without gradient and autocast, and with IEEE matrix products, for the block; the caller's settings come back."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def widen(tensor: Tensor) -> Tensor:
    """The tensor itself if fp32 or float64; bf16 and fp16 become fp32. float64 stays so that invariance is testable."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
