"""Which positives stay, and what they weigh, against plain loops."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from tracekin.influence import Mined, keep_above, keep_mutual, positive_weights


@st.composite
def mined_pools(draw: st.DrawFn, remembered: int = 0, highest: float = 8.0) -> Mined:
    """What a whole pool of P mined, best first, from P + ``remembered`` columns; some rows found less, or nothing."""
    images, k = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    index, score = torch.full((images, k), -1), torch.zeros(images, k)
    positive = st.floats(2.0**-100, highest, width=32) | st.sampled_from([0.5, 1.0, 2.0])
    for row in range(images):
        columns = draw(st.lists(st.integers(0, images + remembered - 1), max_size=k, unique=True))
        scores = sorted(draw(st.lists(positive, min_size=len(columns), max_size=len(columns))), reverse=True)
        index[row, : len(columns)] = torch.tensor(columns, dtype=torch.int64)
        score[row, : len(columns)] = torch.tensor(scores)
    return Mined(index, score)


def rows_of(everyones: Mined, part: slice) -> Mined:
    return Mined(everyones.index[part], everyones.score[part])


def assert_kept(found: Mined, mined: Mined, keep: list[list[bool]]) -> None:
    kept = torch.tensor(keep).view(mined.index.shape)
    assert torch.equal(found.index, mined.index.masked_fill(~kept, -1))
    assert torch.equal(found.score, mined.score.masked_fill(~kept, 0))


@given(mined_pools(highest=2.0**127))
def test_weights_are_shares_of_the_rows_score(mined: Mined) -> None:
    """They sum to 1, or to 0 where nothing was mined, also where the sum of the scores is more than fp32 holds."""
    weights = positive_weights(mined)
    assert weights.dtype == torch.float32
    whole = mined.score.double().sum(1, keepdim=True)
    torch.testing.assert_close(weights.double(), (mined.score / whole).nan_to_num(0), rtol=1e-5, atol=1e-30)
    torch.testing.assert_close(weights.sum(1), (mined.index[:, 0] >= 0).float())


def test_scores_without_bound_have_weights() -> None:
    index, score = torch.tensor([[3, 1, -1], [2, 0, 1]]), torch.tensor([[math.inf, math.inf, 0], [math.inf, 1, 1]])
    torch.testing.assert_close(positive_weights(Mined(index, score)), torch.tensor([[0.5, 0.5, 0], [1, 0, 0]]))


@given(st.data(), mined_pools(remembered=3))
def test_mutual_is_what_a_loop_keeps(data: st.DataObject, everyones: Mined) -> None:
    """For any rank's rows; what is remembered of earlier steps, beyond the pool, cannot choose and is dropped."""
    images = len(everyones.index)
    first = data.draw(st.integers(0, images - 1))
    rows = slice(first, data.draw(st.integers(first + 1, images)))
    mined = rows_of(everyones, rows)
    choices = everyones.index.tolist()
    keep = [[0 <= j < images and i in choices[j] for j in choices[i]] for i in range(images)[rows]]
    assert_kept(keep_mutual(mined, everyones.index, first), mined, keep)


@given(st.data(), mined_pools(), st.integers(0, 8))
def test_above_is_what_a_loop_keeps(data: st.DataObject, everyones: Mined, eighths: int) -> None:
    """A bar for all rows together, whichever rank holds them; without any score there is nothing to keep."""
    known = sorted(score for score in everyones.score.flatten().tolist() if score > 0)
    bar = known[math.ceil(eighths / 8 * (len(known) - 1))] if known else math.inf
    first = data.draw(st.integers(0, len(everyones.index) - 1))
    mined = rows_of(everyones, slice(first, None))
    found = keep_above(mined, everyones.score, eighths / 8)
    assert_kept(found, mined, [[score >= bar for score in row] for row in mined.score.tolist()])


def test_a_quantile_says_what_share_is_masked() -> None:
    scores = torch.arange(1.0, 11.0)[:, None]
    mined = Mined(torch.arange(10)[:, None], scores)
    for quantile, kept in ((0.0, 10), (0.25, 7), (0.5, 5), (1.0, 1)):
        assert int((keep_above(mined, scores, quantile).index >= 0).sum()) == kept
