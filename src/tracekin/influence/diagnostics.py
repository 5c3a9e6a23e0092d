"""How good the mined positives are; everything stays on the device."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tracekin.influence.candidates import Candidates
from tracekin.influence.mining import Mined, chunks, eligible
from tracekin.influence.similarity import shares_label


@torch.no_grad()
def hit_and_chance(
    mined: Mined, rows: Candidates, columns: Candidates, exclude_group: bool, *, chunk: int = 4096
) -> tuple[Tensor, Tensor]:
    """Whether each row's positive shares its label, beside the odds of a blind draw.

    Two images share a label if they have one in common, or if neither has any.

    Args:
        mined: of ``rows`` against ``columns``.
        rows: R images; labels, ids and groups are read.
        columns: all images.
        exclude_group: as it was when mining.
        chunk: columns compared at a time.

    Returns:
        hit [R] fp32, the share of the row's mined positives that share its label, NaN where nothing was mined; chance
        [R] fp32, the share of its eligible columns that do, NaN where there is none. Both all NaN without labels.
    """
    num_rows, num_labels = rows.labels.shape
    if num_labels == 0:
        nothing = torch.full((num_rows,), torch.nan, device=rows.labels.device)
        return nothing, nothing.clone()
    found = mined.index >= 0
    chosen_RkL = columns.labels[mined.index.clamp_min(0)]
    same = shares_label(rows.labels[:, None], chosen_RkL)[:, 0]
    hit = (same & found).sum(1) / found.sum(1)
    sharing, total = (torch.zeros(num_rows, device=rows.labels.device) for _ in range(2))
    row_groups, column_groups = (rows.groups, columns.groups) if exclude_group else (None, None)
    for part in chunks(len(columns.ids), chunk):
        allowed = eligible(rows.ids, columns.ids, row_groups, column_groups, part)
        total += allowed.sum(1)
        sharing += (allowed & shares_label(rows.labels, columns.labels[part])).sum(1)
    return hit, sharing / total


class InDegree(NamedTuple):
    """Hubs, fp32 scalars on the device; 0 where nothing was chosen."""

    most: Tensor
    """How often the most chosen image was chosen."""
    different: Tensor
    """How many different images were chosen."""
    held: Tensor
    """How many choices fell on the most chosen hundredth of all images."""


def in_degree(ids: Tensor, num_images: int) -> InDegree:
    """How often images were chosen.

    Args:
        ids: int64, the chosen images' ids of all ranks, any shape; -1 for none.
        num_images: that could be chosen.
    """
    ordered = ids.flatten().sort().values
    left, right = (torch.searchsorted(ordered, ordered, side=side) for side in ("left", "right"))
    chosen = ordered >= 0
    count = torch.where(chosen, right - left, 0).float()
    first = torch.where(left == torch.arange(len(ordered), device=left.device), count, 0)  # each image once
    hundredth = min(math.ceil(num_images / 100), len(ordered))
    return InDegree(count.max(), torch.where(chosen, 1 / count, 0).sum(), first.topk(hundredth).values.sum())


def score_gap(score: Tensor) -> Tensor:
    """How decided each choice is, (first - second) / first: [R, 2 or more] scores -> [R] fp32, NaN where none is."""
    first, second = score[:, 0], score[:, 1]
    return torch.where(first > 0, (first - second) / first, torch.nan)


def agreement(first: Mined, second: Mined) -> Tensor:
    """Whether two policies chose the same best column, [R] fp32; NaN where either chose nothing."""
    one, other = first.index[:, 0], second.index[:, 0]
    return torch.where((one >= 0) & (other >= 0), (one == other).float(), torch.nan)
