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


class Best:
    """The k best columns of each row among those added so far; no order of adding changes the outcome.

    Memory beyond the columns themselves is bounded by rows x ``chunk``, never rows x all columns.

    Args:
        row_ids: [R] integers; a column of the row's own id is never chosen.
        row_groups: [R] integers, or None to exclude by id alone.
        k: columns to choose a row.
        chunk: columns scored at a time.

    Raises:
        UserError: if k or chunk is below 1; from ``mined`` if fewer than k columns were added.
    """

    def __init__(self, row_ids: Tensor, row_groups: Tensor | None = None, *, k: int = 1, chunk: int = 4096) -> None:
        if chunk < 1:
            raise UserError(f"chunk={chunk} columns at a time is out of range: accepted is 1 or more.")
        if k < 1:
            raise UserError(f"k={k} positives is out of range: accepted is 1 or more.")
        self.row_ids, self.row_groups, self.k, self.chunk = row_ids, row_groups, k, chunk
        self.keys = row_ids.new_zeros(len(row_ids), k, dtype=torch.int64)
        self.num_columns = 0

    @torch.no_grad()
    def add(self, score: Score, column_ids: Tensor, column_groups: Tensor | None = None, start: int = 0) -> None:
        """Let the columns ``start``, ``start`` + 1, ... compete.

        Args:
            score: gives [R, C] for a slice of these columns (of 0 to their number), any float dtype.
            column_ids: [columns] integers.
            column_groups: [columns] integers, or None.
            start: the first column's number in the whole pool.
        """
        for part in chunks(len(column_ids), self.chunk):
            allowed = eligible(self.row_ids, column_ids, self.row_groups, column_groups, part)
            keys = _sortable(score(part), start + part.start, allowed)
            best = keys.topk(min(self.k, keys.shape[1])).values
            self.keys = torch.cat((self.keys, best), 1).topk(self.k).values
        self.num_columns += len(column_ids)

    def mined(self) -> Mined:
        """What was chosen."""
        if self.num_columns < self.k:
            raise UserError(
                f"k={self.k} positives cannot be mined from {self.num_columns} columns;"
                f" accepted is 1 to {self.num_columns}."
            )
        index = torch.where(self.keys > 0, LAST - (self.keys & LAST), -1)
        return Mined(index, (self.keys >> 32).int().view(torch.float32))


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
    """The k best-scored eligible columns of each row, of columns that lie in one block (else see ``Best``).

    A column is eligible if its score is above 0 (which NaN is not), its id is not the row's and, when groups are given,
    neither is its group. Scores are compared in fp32; of equal ones the lowest column wins, whatever chunk, k, device.

    Raises:
        UserError: if there are fewer columns than k, or k or chunk is below 1.
    """
    best = Best(row_ids, row_groups, k=k, chunk=chunk)
    best.add(score, column_ids, column_groups)
    return best.mined()


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


def _sortable(values: Tensor, first: int, allowed: Tensor) -> Tensor:
    """int64 keys [R, C], the score in the high half and the column in the low one; 0 where there is nothing to choose.

    Positive floats order as their bits do. No two columns share a key, so no order among ties is left to ``topk``.
    """
    values = values.float()
    bits = values.contiguous().view(torch.int32).long() << 32
    columns = torch.arange(LAST - first, LAST - first - values.shape[1], -1, device=values.device)
    return torch.where(allowed & (values > 0), bits | columns, 0)
