"""How good the mined positives are; everything stays on the device."""

import torch
from torch import Tensor

from tracekin.influence.mining import Mined, chunks, eligible
from tracekin.influence.policies import Candidates
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


def in_degree(index: Tensor, num_columns: int) -> Tensor:
    """How often each column was chosen: int64 [num_columns] from the indices of all ranks, any shape, -1 for none."""
    chosen = index.flatten() + 1  # a first bin for -1, so that nothing is selected by a mask, which would synchronise
    return chosen.new_zeros(num_columns + 1).scatter_add_(0, chosen, torch.ones_like(chosen))[1:]
