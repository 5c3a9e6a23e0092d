"""Scores between images, as dense blocks [rows, columns]; callers give columns in chunks.

Shape suffixes: R rows, C columns, V views, H and D widths of the factors, L labels.
"""

import torch
from torch import Tensor

from tracekin.influence.gradients import Factors, unit
from tracekin.influence.precision import exact, widen


def pairwise_tracin(rows: Factors, columns: Factors) -> Tensor:
    """Inner products of per-sample gradients, weight and bias: a TracIn term (arXiv 2002.08484) without its step size.

    M_ij = sum over views u, v of (h_i^u . h_j^v + 1)(delta_i^u . delta_j^v). Under SGD the step size is common to the
    batch and moves no arg max; under AdamW the product is gradient similarity, not first-order influence. Factors
    through ``gradients.normalised`` give cosines.

    Args:
        rows: factors of R images, any float dtype.
        columns: factors of C images.

    Returns:
        [R, C], fp32 (float64 for float64 factors).
    """
    with exact(rows.hidden.device):
        h_RVH, d_RVD = (widen(factor) for factor in rows)
        h_CVH, d_CVD = (factor.to(h_RVH.dtype) for factor in columns)  # what travelled may be narrower
        (num_rows, row_views), (num_columns, column_views) = h_RVH.shape[:2], h_CVH.shape[:2]
        # Two products for all pairs of views at once.
        block = torch.addmm(h_RVH.new_ones(1), h_RVH.flatten(0, 1), h_CVH.flatten(0, 1).T)
        block *= d_RVD.flatten(0, 1) @ d_CVD.flatten(0, 1).T
        # Two sums: twice as fast as one over both.
        return block.view(num_rows, row_views, num_columns, column_views).sum(3).sum(1)


def pairwise_feature(rows: Tensor, columns: Tensor) -> Tensor:
    """Sum over views u, v of cos(row_i^u, column_j^v): [R, V, D], [C, V, D] -> [R, C]; a zero vector's cosine is 0."""
    with exact(rows.device):
        # The sum of all pairs of views is the product of the two sums of unit vectors.
        sum_RD = unit(widen(rows)).sum(1)
        return sum_RD @ unit(columns.to(sum_RD.dtype)).sum(1).T  # what travelled may be narrower


def pairwise_random(row_ids: Tensor, column_ids: Tensor, seed: int, step: int) -> Tensor:
    """Uniform numbers in (0, 1] that depend on (seed, step, row id, column id) alone, not on rank, world or device.

    Args:
        row_ids: [R] int64.
        column_ids: [C] int64.
        seed: any integer.
        step: any integer.

    Returns:
        [R, C] fp32, multiples of 2^-24.
    """
    key_R1 = _mix(_mix(_mix(row_ids) ^ _signed(seed)) ^ _signed(step))[:, None]
    return (_shift(_mix(key_R1 ^ _mix(column_ids)), 40) + 1).float() * 2.0**-24


def shares_label(rows: Tensor, columns: Tensor) -> Tensor:
    """Multi-hot [..., R, L], [..., C, L] -> bool [..., R, C]: a label in common, or neither has any."""
    with exact(rows.device):
        row_hot, column_hot = rows.float(), columns.float()
        neither = (row_hot.sum(-1) == 0)[..., :, None] & (column_hot.sum(-1) == 0)[..., None, :]
        return (row_hot @ column_hot.mT > 0) | neither


def _mix(value: Tensor) -> Tensor:
    """One output of SplitMix64 (Steele, Lea, Flood, 2014) from each int64 state; products wrap around."""
    value = value + _signed(0x9E3779B97F4A7C15)
    value = (value ^ _shift(value, 30)) * _signed(0xBF58476D1CE4E5B9)
    value = (value ^ _shift(value, 27)) * _signed(0x94D049BB133111EB)
    return value ^ _shift(value, 31)


def _shift(value: Tensor, bits: int) -> Tensor:
    """Logical shift to the right: torch's own copies the sign of an int64."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """The 64 low bits of ``value`` as an int64."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)
