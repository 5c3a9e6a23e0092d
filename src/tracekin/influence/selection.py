"""Which of the mined positives to keep, and how much each counts. R rows, P images of the pool, k mined a row."""

import torch
from torch import Tensor

from tracekin.influence.mining import Mined


def positive_weights(mined: Mined) -> Tensor:
    """[R, k] fp32: each positive's share of its row's score; rows sum to 1, or to 0 where nothing was mined."""
    score = mined.score.clamp(max=torch.finfo(torch.float32).max)
    share = score / score.amax(1, keepdim=True)  # first of the highest, so that no sum overflows
    return torch.where(mined.index >= 0, share / share.sum(1, keepdim=True), 0)


def keep_mutual(mined: Mined, everyones_index: Tensor, first_row: int) -> Mined:
    """Only positives that chose the row too: k-reciprocal neighbours.

    Args:
        mined: of my rows.
        everyones_index: [P, k] int64, the mined columns of every image of the pool. A column beyond P, one that is
            remembered from earlier steps, cannot choose and is dropped.
        first_row: the number of my first row among the pool's columns.
    """
    num_rows, _ = mined.index.shape
    rows = torch.arange(first_row, first_row + num_rows, device=mined.index.device)
    present = (mined.index >= 0) & (mined.index < len(everyones_index))
    theirs_RkK = everyones_index[torch.where(present, mined.index, 0)]
    return _keep(mined, present & (theirs_RkK == rows[:, None, None]).any(2))


def keep_above(mined: Mined, everyones_score: Tensor, quantile: float) -> Mined:
    """Only positives whose score reaches a quantile of all scores mined in this step.

    Args:
        mined: of my rows.
        everyones_score: [P, k] fp32, the scores of every image of the pool; 0 where nothing was mined.
        quantile: 0 keeps all, 1 the best alone.
    """
    known = torch.where(everyones_score > 0, everyones_score, torch.nan)
    # Of the scores themselves, not between them: scores spread over many powers of ten.
    bar = known.flatten().nanquantile(quantile, interpolation="higher")
    return _keep(mined, mined.score >= bar)  # where nothing was mined at all the bar is NaN, which keeps nothing


def _keep(mined: Mined, kept: Tensor) -> Mined:
    # Places stay as they were: a dropped best leaves a gap before the second.
    return Mined(torch.where(kept, mined.index, -1), torch.where(kept, mined.score, 0))
