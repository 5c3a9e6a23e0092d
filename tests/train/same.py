"""Whether two checkpoints hold the same bits."""

from pathlib import Path

import torch
from torch import Tensor

from tracekin import checkpoint


def differing(one: Path, other: Path) -> list[str]:
    """The tensors, as ``part.name``, that two checkpoints of the same config do not both hold, bit for bit."""
    found = []
    for part in checkpoint.PARTS:
        files = [(path / f"{part}.safetensors").exists() for path in (one, other)]
        if not any(files):  # the queue, where nothing is remembered
            continue
        before, after = (checkpoint.load_part(path, part) for path in (one, other))
        names = sorted(before.keys() | after.keys())
        found += [f"{part}.{name}" for name in names if not _same_bits(before.get(name), after.get(name))]
    return found


def _same_bits(one: Tensor | None, other: Tensor | None) -> bool:
    """A NaN equals itself here, and 0 is not -0."""
    if one is None or other is None or (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
