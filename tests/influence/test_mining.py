"""Mining against a plain loop: exclusion, masking, ties, any chunk, any k and any order of blocks."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tracekin.config import UserError
from tracekin.influence import Best, Mined, mine

# Few values, so that ties, non-positive scores and NaN are everywhere.
score_values = st.sampled_from([-1.0, -0.0, 0.0, 0.25, 0.5, 0.5000001, 2.0, 1e-40, 3e38, math.inf, -math.inf, math.nan])


def loop(
    scores: Tensor, row_ids: Tensor, column_ids: Tensor, row_groups: Tensor, column_groups: Tensor, k: int
) -> Mined:
    index, score = torch.full((len(scores), k), -1), torch.zeros(len(scores), k)
    for i, row in enumerate(scores.tolist()):
        allowed = [
            j
            for j, value in enumerate(row)
            if value > 0 and column_ids[j] != row_ids[i] and column_groups[j] != row_groups[i]
        ]
        for place, j in enumerate(sorted(allowed, key=lambda j: (-row[j], j))[:k]):
            index[i, place], score[i, place] = j, row[j]
    return Mined(index, score)


@given(st.data(), st.integers(1, 6), st.integers(1, 13), st.integers(1, 14), st.integers(1, 4))
def test_equals_a_loop_for_any_chunk_and_k(data: st.DataObject, rows: int, columns: int, chunk: int, k: int) -> None:
    def draw(values: st.SearchStrategy[float], *shape: int) -> Tensor:
        count = math.prod(shape)
        return torch.tensor(data.draw(st.lists(values, min_size=count, max_size=count))).view(shape)

    scores = draw(score_values, rows, columns).float()
    small = st.integers(0, 3)
    row_ids, row_groups, column_groups = draw(small, rows), draw(small, rows), draw(small, columns)
    column_ids = torch.arange(columns)
    k = min(k, columns)
    widest = 0

    def score(part: slice) -> Tensor:
        nonlocal widest
        widest = max(widest, part.stop - part.start)
        return scores[:, part]

    mined = mine(score, row_ids, column_ids, row_groups, column_groups, k=k, chunk=chunk)
    expected = loop(scores, row_ids, column_ids, row_groups, column_groups, k)
    assert mined.index.dtype == torch.int64
    assert mined.score.dtype == torch.float32
    assert torch.equal(mined.index, expected.index)
    assert torch.equal(mined.score, expected.score)
    assert widest <= chunk

    cuts = sorted({0, columns, *data.draw(st.lists(st.integers(0, columns), max_size=3))})
    best = Best(row_ids, row_groups, k=k, chunk=chunk)
    for start, stop in data.draw(st.permutations([*pairwise(cuts)])):
        block = scores[:, start:stop]
        best.add(lambda part, block=block: block[:, part], column_ids[start:stop], column_groups[start:stop], start)  # type: ignore[misc]
    assert torch.equal(best.mined().index, expected.index)
    assert torch.equal(best.mined().score, expected.score)


@pytest.mark.parametrize(("columns", "chunk"), [(200, 1), (5000, 7), (5000, 4096), (5000, 5000)])
def test_ties_go_to_the_lowest_column_in_large_blocks(columns: int, chunk: int) -> None:
    """Wide enough that topk's own order among ties would show."""
    ones = torch.ones(3, columns)
    mined = mine(lambda part: ones[:, part], torch.tensor([-1, 0, 2]), torch.arange(columns), k=3, chunk=chunk)
    assert mined.index.tolist() == [[0, 1, 2], [1, 2, 3], [0, 1, 3]]


def test_without_groups_only_the_id_is_excluded() -> None:
    scores = torch.tensor([[9.0, 8.0, 7.0]])
    row_id, ids, groups = torch.tensor([0]), torch.arange(3), torch.tensor([5, 5, 6])
    assert mine(lambda part: scores[:, part], row_id, ids).index.tolist() == [[1]]
    assert mine(lambda part: scores[:, part], row_id, ids, torch.tensor([5]), groups).index.tolist() == [[2]]


def test_nothing_eligible_is_masked() -> None:
    scores = torch.tensor([[5.0, -1.0], [math.nan, 0.0], [5.0, 5.0]])
    mined = mine(lambda part: scores[:, part], torch.tensor([0, 9, 9]), torch.tensor([0, 1]), k=2)
    assert mined.index.tolist() == [[-1, -1], [-1, -1], [0, 1]]
    assert mined.score.tolist() == [[0, 0], [0, 0], [5, 5]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_scores_of_any_float_type_compare_in_fp32(dtype: torch.dtype) -> None:
    scores = torch.tensor([[1.0, 1.0, 3.0, 1.5, -2.0, 0.0]], dtype=dtype)
    scores[0, 1] += 2**-40  # of float64 what fp32 cannot tell apart is a tie
    mined = mine(lambda part: scores[:, part], torch.tensor([9]), torch.arange(6), k=5, chunk=4)
    assert mined.index.tolist() == [[2, 3, 0, 1, -1]]
    assert mined.score.tolist() == [[3, 1.5, 1, 1, 0]]
    assert mined.score.dtype == torch.float32


def test_columns_far_up_keep_their_number() -> None:
    best = Best(torch.tensor([0]), k=2)
    for start in (2**31 + 5, 3):
        best.add(lambda part: torch.full((1, 1), 0.5), torch.tensor([7]), None, start)
    assert best.mined().index.tolist() == [[3, 2**31 + 5]]


@pytest.mark.parametrize(("k", "chunk"), [(4, 8), (2, 0), (0, 8), (-1, 8)])
def test_what_cannot_be_mined_is_refused(k: int, chunk: int) -> None:
    said = "k=4 positives cannot be mined from 3 columns.*1 to 3" if k == 4 else "out of range: accepted is 1 or more"
    with pytest.raises(UserError, match=said):
        mine(lambda part: torch.ones(1, 3)[:, part], torch.tensor([0]), torch.arange(3), k=k, chunk=chunk)
