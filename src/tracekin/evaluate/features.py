"""Frozen features of every image of a split.

Shape suffixes: N images, B batch, C channels, S side, F features, L classes.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from tracekin.data.batch import Batch

Encoder = Callable[[Tensor], Tensor]
PIXELS_SIDE = 8


@dataclass(frozen=True)
class Features:
    """A split under one encoder, in the order of the manifest."""

    x: NDArray[np.float32]
    """[N, F]."""
    label: NDArray[np.bool_]
    """[N, L], multi-hot."""
    group: NDArray[np.int64]
    """[N]."""


def features(encoders: Mapping[str, Encoder], batches: Iterable[Batch], device: torch.device) -> dict[str, Features]:
    """Encode a split with several encoders in one pass over its images, in fp32.

    Args:
        encoders: name -> function [B, C, S, S] -> [B, F]. A module must be on ``device`` and in eval mode already.
        batches: the split's evaluation batches: views [1, B, C, S, S], index, group [B], label [B, L].
        device: where the encoders run.
    """
    encoded: dict[str, list[Tensor]] = {name: [] for name in encoders}
    labels, groups = [], []
    with torch.inference_mode():
        for batch in batches:
            view_BCSS = batch.views[0].to(device, memory_format=torch.channels_last)  # twice as fast on CPU
            for name, encoder in encoders.items():
                encoded[name].append(encoder(view_BCSS).float().cpu())
            labels.append(batch.label)
            groups.append(batch.group)
    label, group = torch.cat(labels).numpy() > 0, torch.cat(groups).numpy()
    return {name: Features(torch.cat(parts).numpy(), label, group) for name, parts in encoded.items()}


def pixels(view_BCSS: Tensor) -> Tensor:
    """The baseline without a network: each image area-averaged to 8x8, [B, 64 C]."""
    return F.interpolate(view_BCSS, size=PIXELS_SIDE, mode="area").flatten(1)
