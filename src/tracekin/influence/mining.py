"""Streaming top-k: the best eligible columns of each row, from scores that are computed chunk by chunk.

Shape suffixes: R rows, C columns of a chunk, k mined a row.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tracekin.config import UserError

Score = Callable[[slice], Tensor]
"""Scores [R, C] of all rows against the columns of the slice."""
LAST = 2**32 - 1


class Mined(NamedTuple):
    """The chosen columns of each row, best first."""

    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody asks a Mined for
    """[R, k] int64 global column, or -1 where no eligible score is positive."""
    score: Tensor
    """[R, k] fp32; 0 where the index is -1."""


def chunks(num_columns: int, chunk: int) -> Iterator[slice]:
    for start in range(0, num_columns, chunk):
        yield slice(start, min(start + chunk, num_columns))


def eligible(
    row_ids: Tensor, column_ids: Tensor, row_groups: Tensor | None, column_groups: Tensor | None, part: slice
) -> Tensor:
    """Bool [R, C] for the columns of ``part``: another image and, when groups are given, of another group."""
    allowed = row_ids[:, None] != column_ids[part]
    if row_groups is not None and column_groups is not None:
        allowed &= row_groups[:, None] != column_groups[part]
    return allowed


@torch.no_grad()
def mine(
    score: Score,
    row_ids: Tensor,
    column_ids: Tensor,
    row_groups: Tensor | None = None,
    column_groups: Tensor | None = None,
    *,
    k: int = 1,
    chunk: int = 4096,
) -> Mined:
    """The k best-scored eligible columns of each row; memory is bounded by R x ``chunk``, never R x all columns.

    A column is eligible if its score is above 0 (which NaN is not), its id is not the row's and, when groups are given,
    neither is its group. Scores are compared in fp32; of equal ones the lowest column wins, whatever chunk, k, device.

    Args:
        score: gives [R, C] for a slice of columns, any float dtype.
        row_ids: [R] integers.
        column_ids: [columns] integers.
        row_groups: [R] integers, or None to exclude by id alone.
        column_groups: [columns] integers, or None.
        k: columns to choose a row.
        chunk: columns scored at a time.

    Raises:
        UserError: if there are fewer columns than k, or k or chunk is below 1.
    """
    num_columns = len(column_ids)
    if not 1 <= k <= num_columns:
        raise UserError(f"k={k} positives cannot be mined from {num_columns} columns; accepted is 1 to {num_columns}.")
    if chunk < 1:
        raise UserError(f"chunk={chunk} columns at a time is out of range: accepted is 1 or more.")
    best = row_ids.new_zeros(len(row_ids), k, dtype=torch.int64)
    for part in chunks(num_columns, chunk):
        allowed = eligible(row_ids, column_ids, row_groups, column_groups, part)
        keys = _sortable(score(part), part, allowed)
        best = torch.cat((best, keys), 1).topk(k).values
    index = torch.where(best > 0, LAST - (best & LAST), -1)
    return Mined(index, (best >> 32).int().view(torch.float32))


def _sortable(values: Tensor, part: slice, allowed: Tensor) -> Tensor:
    """int64 keys [R, C], the score in the high half and the column in the low one; 0 where there is nothing to choose.

    Positive floats order as their bits do. No two columns share a key, so no order among ties is left to ``topk``.
    """
    values = values.float()
    bits = values.contiguous().view(torch.int32).long() << 32
    columns = torch.arange(LAST - part.start, LAST - part.stop, -1, device=values.device)
    return torch.where(allowed & (values > 0), bits | columns, 0)
