"""Every policy against its definition in float64 loops, and the hit rate beside chance."""

from collections import Counter
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.influence import naive
from tracekin.config import Policy, UserError
from tracekin.influence import POLICIES, USES_FACTORS, Candidates, choose, hit_and_chance

SEED, STEP = 11, 5


def definition(policy: str, rows: Candidates, columns: Candidates) -> torch.Tensor:
    if policy == "feature":
        return naive.feature(rows.target, columns.target)
    if policy == "random":
        return naive.random(rows.ids, columns.ids, SEED, STEP)
    if policy == "oracle":
        return naive.oracle(rows, columns, SEED, STEP)
    assert rows.factors is not None
    assert columns.factors is not None
    return getattr(naive, policy)(rows.factors, columns.factors)  # type: ignore[no-any-return]


def test_every_policy_of_the_configuration_is_there() -> None:
    assert {*POLICIES, "none"} == set(get_args(Policy))
    assert POLICIES.keys() >= USES_FACTORS


@pytest.mark.parametrize("exclude_group", [True, False])
@pytest.mark.parametrize("policy", POLICIES)
@given(images=st.integers(2, 14), k=st.integers(1, 3), chunk=st.integers(1, 20), seed=st.integers(0, 99))
def test_policies_are_what_they_say(
    policy: str, exclude_group: bool, images: int, k: int, chunk: int, seed: int
) -> None:
    columns = naive.candidates(images, seed=seed)
    rows = naive.some(columns, slice(images // 3, images))
    k = min(k, images)
    how: dict[str, Any] = {"seed": SEED, "step": STEP, "exclude_group": exclude_group, "k": k, "chunk": chunk}
    mined = choose(policy, rows, columns, **how)
    scores = definition(policy, rows, columns)
    tolerance = 1e-5 * float(scores.abs().max())
    for i in range(len(rows.ids)):
        allowed = [j for j in range(images) if naive.is_eligible(rows, i, columns, j, exclude_group)]
        best = sorted((float(scores[i, j]) for j in allowed if scores[i, j] > tolerance), reverse=True)[:k]
        found = [j for j in mined.index[i].tolist() if j >= 0]
        assert len(found) >= len(best)
        assert set(found) <= set(allowed)
        assert len(set(found)) == len(found)
        for j, score, expected in zip(found, mined.score[i].tolist(), best, strict=False):
            assert abs(float(scores[i, j]) - expected) <= tolerance
            assert abs(score - expected) <= tolerance


@pytest.mark.parametrize("policy", POLICIES)
def test_ranks_choose_what_one_process_chooses(policy: str) -> None:
    columns = naive.candidates(24, seed=3)
    how: dict[str, Any] = {"seed": SEED, "step": STEP, "exclude_group": True}
    whole = choose(policy, columns, columns, **how)
    for ranks in (2, 4):
        each = 24 // ranks
        parts = [
            choose(policy, naive.some(columns, slice(r * each, (r + 1) * each)), columns, **how) for r in range(ranks)
        ]
        assert torch.equal(torch.cat([part.index for part in parts]), whole.index)


@pytest.mark.parametrize("policy", ["random", "oracle"])
def test_draws_are_uniform_over_the_eligible(policy: str) -> None:
    columns = naive.candidates(12, seed=4)._replace(factors=None)  # draws need no factors
    columns = columns._replace(
        labels=torch.eye(2, dtype=torch.uint8)[torch.arange(12) % 2], groups=torch.arange(12) // 3
    )
    steps = 3000
    picks = [
        choose(policy, columns, columns, seed=0, step=step, exclude_group=True).index[0, 0] for step in range(steps)
    ]
    counts = Counter(int(pick) for pick in picks)
    eligible = {4, 6, 8, 10} if policy == "oracle" else set(range(3, 12))
    assert set(counts) == eligible
    expected = steps / len(eligible)
    chi_square = sum((counts[column] - expected) ** 2 / expected for column in eligible)
    assert chi_square < {4: 16.3, 9: 26.1}[len(eligible)]  # p = 0.001


def test_the_oracle_needs_labels() -> None:
    columns = naive.candidates(4, classes=0)
    with pytest.raises(UserError, match=r"mining.policy=oracle needs labels"):
        choose("oracle", columns, columns, seed=0, step=0, exclude_group=True)


@given(st.integers(1, 12), st.integers(1, 3), st.integers(1, 20), st.integers(1, 4), st.booleans(), st.integers(0, 99))
def test_hit_and_chance_equal_a_loop(
    images: int, k: int, chunk: int, classes: int, exclude_group: bool, seed: int
) -> None:
    """Multi-label, images without any label, rows with nothing mined and rows without a candidate included."""
    columns = naive.candidates(images, classes=classes, seed=seed)
    rows = naive.some(columns, slice(images // 2, images))
    k = min(k, images)
    mined = choose("tracin", rows, columns, seed=0, step=0, exclude_group=exclude_group, k=k)
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
    mined = choose("random", columns, columns, seed=0, step=0, exclude_group=False)
    hit, chance = hit_and_chance(mined, columns, columns, False)
    assert hit.isnan().all()
    assert chance.isnan().all()
    assert hit.shape == chance.shape == (4,)
