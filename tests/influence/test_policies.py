"""Every policy against its definition in float64 loops, for any split of columns and rows, and whatever comes in."""

from collections import Counter
from itertools import pairwise
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.influence import naive
from tracekin.config import Policy, UserError
from tracekin.influence import POLICIES, Block, Candidates, Factors, Mined, Pool, choose, normalised, positive_weights

SEED, STEP = 11, 5


def reads(policy: str) -> set[str]:
    """What decides a policy's score, found by changing one thing at a time in the columns."""
    columns = naive.of_policy(policy, 12, seed=3)
    changed = {
        "target": columns._replace(target=columns.target.flip(0)),
        "hidden": columns._replace(factors=tuple(Factors(h.flip(0), d) for h, d in columns.factors)),
        "delta": columns._replace(factors=tuple(Factors(h, d.flip(0)) for h, d in columns.factors)),
    }
    was = scores(policy, columns, columns)
    found = {name for name, side in changed.items() if not torch.equal(scores(policy, columns, side), was)}
    return found | ({"seed"} if not torch.equal(scores(policy, columns, columns, SEED + 1), was) else set())


def scores(policy: str, rows: Candidates, columns: Candidates, seed: int = SEED) -> torch.Tensor:
    return POLICIES[policy].score(Pool(rows, columns, seed, STEP))(slice(0, len(columns.ids)))


READS = {policy: reads(policy) for policy in POLICIES}
GRADIENTS = [policy for policy in POLICIES if POLICIES[policy].gradients != "none"]
MEASURED = [policy for policy in POLICIES if "seed" not in READS[policy]]
"""Policies that look at what the networks computed; the others draw."""


def one_block(policy: str, rows: Candidates, columns: Candidates, exclude_group: bool = True, **how: Any) -> Mined:
    how = {"seed": SEED, "step": STEP, **how}
    return choose(policy, rows, [Block(0, columns)], exclude_group=exclude_group, **how)


def test_every_policy_of_the_configuration_is_there() -> None:
    assert {*POLICIES, "none"} == set(get_args(Policy))
    assert naive.DEFINITIONS.keys() == POLICIES.keys()
    assert len(MEASURED) > len(GRADIENTS) > 0
    assert len(MEASURED) < len(POLICIES)


@pytest.mark.parametrize("policy", POLICIES)
def test_policies_read_what_they_ask_for(policy: str) -> None:
    """Gradients cost bytes and time: whoever asks for them reads those of every layer, whoever does not has none."""
    columns = naive.of_policy(policy, 12, seed=3)
    assert bool(columns.factors) == bool(READS[policy] & {"hidden", "delta"})
    was = scores(policy, columns, columns)
    for number, layer in enumerate(columns.factors):
        factors = [*columns.factors]
        factors[number] = Factors(*(factor.flip(0) for factor in layer))
        assert not torch.equal(scores(policy, columns, columns._replace(factors=tuple(factors))), was)


def test_a_part_is_of_every_column() -> None:
    whole = naive.candidates(6, layers=2, supports=1)._replace(weight=torch.rand(6))
    part = whole.part(slice(2, 5))
    for found, of in zip((*part.factors[1], *part[1:]), (*whole.factors[1], *whole[1:]), strict=True):
        assert torch.equal(found, of[2:5])  # type: ignore[arg-type, index]
    assert len(part.factors) == 2
    assert whole._replace(weight=None, support=None).part(slice(2, 5))[5:] == (None, None)


@pytest.mark.parametrize("exclude_group", [True, False])
@pytest.mark.parametrize("policy", POLICIES)
@given(st.data(), st.integers(2, 14), st.integers(1, 3), st.integers(1, 20), st.integers(0, 99))
def test_policies_are_what_they_say(
    policy: str, exclude_group: bool, data: st.DataObject, images: int, k: int, chunk: int, seed: int
) -> None:
    """Policy ``group`` never excludes the group; an age multiplies scores; what is remembered may be the row itself."""
    columns, k = naive.of_policy(policy, images, seed), min(k, images)
    if data.draw(st.booleans()):
        columns = columns._replace(weight=torch.rand(images, generator=torch.Generator().manual_seed(seed)))
    rows = columns.part(slice(images // 3, images))
    mined = one_block(
        policy, naive.as_asked(policy, rows), naive.as_asked(policy, columns), exclude_group, k=k, chunk=chunk
    )
    assert mined.score.dtype == torch.float32
    scores = naive.score(policy, Pool(rows, columns, SEED, STEP))
    tolerance = 1e-5 * float(scores.abs().max())
    by_group = exclude_group and policy != "group"
    for i in range(len(rows.ids)):
        allowed = [j for j in range(images) if naive.is_eligible(rows, i, columns, j, by_group)]
        best = sorted((float(scores[i, j]) for j in allowed if scores[i, j] > tolerance), reverse=True)[:k]
        found = [j for j in mined.index[i].tolist() if j >= 0]
        assert len(found) >= len(best)
        assert set(found) <= {j for j in allowed if scores[i, j] > -tolerance}
        assert len(set(found)) == len(found)
        for j, score, expected in zip(found, mined.score[i].tolist(), best, strict=False):
            assert abs(float(scores[i, j]) - expected) <= tolerance
            assert abs(score - expected) <= tolerance


@pytest.mark.parametrize("policy", POLICIES)
@given(st.data(), st.integers(2, 24), st.integers(1, 4), st.integers(0, 99))
def test_any_split_chooses_what_one_block_does(
    policy: str, data: st.DataObject, images: int, k: int, seed: int
) -> None:
    """Ring order, ranks and chunks change nothing, to the bit: also among ties, which these scores are full of."""
    columns = naive.whole_numbers(images, layers=3, seed=seed)
    columns = columns._replace(weight=torch.arange(images) % 3 / 4 if data.draw(st.booleans()) else None)
    k = min(k, images)
    whole = one_block(policy, columns, columns, k=k)

    cuts = sorted({0, images, *data.draw(st.lists(st.integers(0, images), max_size=4))})
    blocks = [Block(start, columns.part(slice(start, stop))) for start, stop in pairwise(cuts)]
    ring = data.draw(st.permutations(blocks))
    ranks = sorted({0, images, *data.draw(st.lists(st.integers(0, images), max_size=3))})
    chunk = data.draw(st.integers(1, images))
    how: dict[str, Any] = {"seed": SEED, "step": STEP, "exclude_group": True, "k": k, "chunk": chunk}
    parts = [choose(policy, columns.part(slice(*rank)), ring, **how) for rank in pairwise(ranks)]
    assert torch.equal(torch.cat([part.index for part in parts]), whole.index)
    assert torch.equal(torch.cat([part.score for part in parts]), whole.score)


@pytest.mark.parametrize("policy", MEASURED)
def test_ties_go_to_the_lowest_column_of_all_blocks(policy: str) -> None:
    one = naive.whole_numbers(1, layers=3, seed=1)
    ones = Candidates(
        tuple(Factors(*(factor.abs().expand(9, -1, -1) for factor in layer)) for layer in one.factors),
        one.target[:, :1].expand(9, 2, -1),
        ids=torch.arange(9),
        groups=torch.arange(9),
        labels=torch.zeros(9, 0),
    )
    blocks = [Block(start, ones.part(slice(start, start + 3))) for start in (6, 0, 3)]
    mined = choose(policy, ones, blocks, seed=0, step=0, exclude_group=True, k=3, chunk=2)
    assert mined.index.tolist() == [[1, 2, 3], [0, 2, 3], [0, 1, 3], *[[0, 1, 2]] * 6]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("broken", [0.0, torch.nan])
@pytest.mark.parametrize("which", ["prediction", "target"])
def test_broken_images_are_never_chosen(policy: str, broken: float, which: str) -> None:
    """Without a direction there is no gradient and no cosine: not NaN, not a positive, and nobody's influence."""
    columns, bad = naive.of_policy(policy, 16, seed=5), [2, 7, 15]
    for hidden, delta in columns.factors:
        delta[bad] = broken
        assert hidden.isfinite().all()
    if which == "target":
        columns.target[bad] = broken
        columns = columns._replace(support=None)
    asked = naive.as_asked(policy, columns)
    mined = one_block(policy, asked, asked, False, k=4)
    assert mined.score.isfinite().all()
    assert (mined.index[[0, 1, 3]] >= 0).any()
    if "delta" in READS[policy] or (which == "target" and "target" in READS[policy]):
        assert not {*mined.index.flatten().tolist()} & {*bad}
        assert (mined.index[bad] == -1).all()


@pytest.mark.parametrize("columns_type", ["bfloat16", "float16", "same"])
@pytest.mark.parametrize("rows_type", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("policy", MEASURED)
def test_any_float_type_scores_as_in_fp32(policy: str, rows_type: str, columns_type: str) -> None:
    """Such as bf16 columns from transport against fp32 rows: what is rounded is what arrives, never the arithmetic."""

    def narrowed(side: Candidates, name: str) -> Candidates:
        dtype = getattr(torch, name)
        factors = tuple(Factors(hidden.to(dtype), delta.to(dtype)) for hidden, delta in side.factors)
        # Targets do not travel narrow: both sides are of one type.
        return side._replace(factors=factors, target=side.target.to(getattr(torch, rows_type)))

    whole = naive.as_asked(policy, naive.of_policy(policy, 12, seed=3)._replace(support=None))
    columns_type = rows_type if columns_type == "same" else columns_type
    rows, columns = narrowed(whole, rows_type), narrowed(whole, columns_type)
    found = scores(policy, rows, columns)
    assert found.dtype == (torch.float64 if rows_type == "float64" else torch.float32)
    expected = scores(policy, narrowed(rows, "float64"), narrowed(columns, "float64")).double()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_without_a_candidate_the_term_is_masked() -> None:
    columns = naive.candidates(6)
    alike = columns._replace(ids=torch.full((6,), 4))
    grouped = columns._replace(groups=torch.zeros(6, dtype=torch.int64), ids=torch.arange(6))
    alone = grouped._replace(groups=torch.arange(6))
    for policy, pool, exclude_group in (("tracin", alike, False), ("tracin", grouped, True), ("group", alone, True)):
        mined = one_block(policy, pool, pool, exclude_group, k=2)
        assert (mined.index == -1).all()
        assert (mined.score == 0).all()
        assert (positive_weights(mined) == 0).all()
    assert (one_block("group", grouped, grouped, True).index >= 0).all()


def test_more_positives_than_columns_are_refused() -> None:
    columns = naive.candidates(6)
    blocks = [Block(0, columns.part(slice(0, 2))), Block(2, columns.part(slice(2, 5)))]
    with pytest.raises(UserError, match=r"k=6 positives cannot be mined from 5 columns.*1 to 5"):
        choose("tracin", columns, blocks, seed=0, step=0, exclude_group=False, k=6)


@pytest.mark.parametrize("policy", ["random", "oracle", "group"])
def test_draws_are_uniform_over_the_eligible(policy: str) -> None:
    columns = naive.candidates(12, seed=4)._replace(factors=())  # draws need no factors
    columns = columns._replace(
        ids=torch.arange(12),
        labels=torch.eye(2, dtype=torch.uint8)[torch.arange(12) % 2],
        groups=torch.arange(12) // 3,
    )
    first, steps = columns.part(slice(0, 1)), 2000
    picks = [int(one_block(policy, first, columns, step=step).index) for step in range(steps)]
    counts = Counter(picks)
    eligible = {"oracle": {4, 6, 8, 10}, "random": set(range(3, 12)), "group": {1, 2}}[policy]
    assert set(counts) == eligible
    expected = steps / len(eligible)
    chi_square = sum((counts[column] - expected) ** 2 / expected for column in eligible)
    assert chi_square < {2: 10.8, 4: 16.3, 9: 26.1}[len(eligible)]  # p = 0.001


def test_the_oracle_needs_labels() -> None:
    columns = naive.candidates(4, classes=0)
    with pytest.raises(UserError, match=r"mining.policy=oracle needs labels"):
        one_block("oracle", columns, columns)


@given(st.integers(1, 3), st.integers(0, 99))
def test_normalised_gradients_have_unit_length_over_all_layers(layers: int, seed: int) -> None:
    side = naive.candidates(5, layers=layers, seed=seed)
    scaled = normalised(*side.factors)
    whole = torch.cat([naive.materialised(layer) for layer in side.factors], 1)
    unit = torch.cat([naive.materialised(layer) for layer in scaled], 1)
    torch.testing.assert_close(unit, torch.nn.functional.normalize(whole), rtol=1e-5, atol=1e-6)
    assert all(torch.equal(now.hidden, was.hidden) for now, was in zip(scaled, side.factors, strict=True))
