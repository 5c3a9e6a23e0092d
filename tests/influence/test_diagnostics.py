"""Diagnostics against plain loops."""

import math
from collections import Counter

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.influence import naive
from tracekin.influence import Block, Mined, agreement, choose, hit_and_chance, in_degree, score_gap

columns_chosen = st.lists(st.integers(-1, 6), min_size=1, max_size=20)


@given(st.integers(1, 12), st.integers(1, 3), st.integers(1, 20), st.integers(1, 4), st.booleans(), st.integers(0, 99))
def test_hit_and_chance_equal_a_loop(
    images: int, k: int, chunk: int, classes: int, exclude_group: bool, seed: int
) -> None:
    """Multi-label, images without any label, rows with nothing mined and rows without a candidate included."""
    columns = naive.candidates(images, classes=classes, seed=seed)
    rows = columns.part(slice(images // 2, images))
    k = min(k, images)
    mined = choose("tracin", rows, [Block(0, columns)], seed=0, step=0, exclude_group=exclude_group, k=k)
    hit, chance = hit_and_chance(mined, rows, columns, exclude_group, chunk=chunk)

    def share(of: list[int], i: int) -> float:
        hits = [naive.same_label(rows.labels[i], columns.labels[j]) for j in of]
        return sum(hits) / len(hits) if hits else torch.nan

    everyone = range(images)
    for i in range(len(rows.ids)):
        allowed = [j for j in everyone if naive.is_eligible(rows, i, columns, j, exclude_group)]
        expected = [share([j for j in mined.index[i].tolist() if j >= 0], i), share(allowed, i)]
        torch.testing.assert_close(torch.stack([hit[i], chance[i]]), torch.tensor(expected), equal_nan=True)


def test_without_labels_there_is_no_hit_rate() -> None:
    columns = naive.candidates(4, classes=0)
    mined = choose("random", columns, [Block(0, columns)], seed=0, step=0, exclude_group=False)
    hit, chance = hit_and_chance(mined, columns, columns, False)
    assert hit.isnan().all()
    assert chance.isnan().all()
    assert hit.shape == chance.shape == (4,)


@given(columns_chosen)
def test_in_degree_equals_a_count(chosen: list[int]) -> None:
    counts = Counter(column for column in chosen if column >= 0)
    for num_images in (7, 150, 5000):
        degree = in_degree(torch.tensor(chosen)[:, None], num_images)
        assert degree.most == max(counts.values(), default=0)
        assert degree.different.item() == len(counts) or math.isclose(degree.different, len(counts), rel_tol=1e-6)
        assert degree.held == sum(sorted(counts.values(), reverse=True)[: math.ceil(num_images / 100)])


@given(columns_chosen, columns_chosen)
def test_agreement_equals_a_loop(first: list[int], second: list[int]) -> None:
    """Of the best column alone, whatever the second best is."""
    rows = min(len(first), len(second))
    one, other = torch.tensor(first[:rows])[:, None], torch.tensor(second[:rows])[:, None]
    found = agreement(*(Mined(index.repeat(1, 2).contiguous(), torch.ones(rows, 2)) for index in (one, other)))
    expected = [float(a == b) if a >= 0 and b >= 0 else math.nan for a, b in zip(first, second, strict=False)]
    torch.testing.assert_close(found, torch.tensor(expected), equal_nan=True, rtol=0, atol=0)


@given(st.lists(st.lists(st.floats(0, 2.0**100, width=32), min_size=2, max_size=3), min_size=1, max_size=5))
def test_score_gap_equals_a_loop(scores: list[list[float]]) -> None:
    ordered = [sorted(row, reverse=True)[:2] for row in scores]
    expected = [(first - second) / first if first > 0 else math.nan for first, second in ordered]
    found = score_gap(torch.tensor(ordered, dtype=torch.float32))
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.float64), equal_nan=True)
