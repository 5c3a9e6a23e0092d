"""Scores: exact against autograd, finite whatever comes in, the same for any split of the rows."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.influence_exactness import errors
from tests.influence import naive
from tracekin.influence import (
    Candidates,
    Factors,
    gradient_factors,
    normalised,
    pairwise_feature,
    pairwise_random,
    pairwise_tracin,
    self_influence,
    shares_label,
)

cosines = st.floats(-0.99, 0.99)  # at -1 as at 1 there is no gradient to compare


@given(st.integers(1, 3), st.integers(2, 12), st.integers(1, 200), st.integers(4, 100), cosines, st.integers(0, 2**32))
def test_tracin_equals_autograd(views: int, images: int, hidden: int, out: int, cosine: float, seed: int) -> None:
    """A real predictor's last Linear, weight and bias, all views, float64 per-sample gradients of the same inputs."""
    same_inputs, _ = errors(views, images, hidden, out, cosine, seed)
    assert same_inputs <= 2e-6


@given(st.integers(2, 12), st.integers(64, 512), st.integers(64, 256), cosines, st.integers(0, 2**32))
def test_tracin_equals_autograd_through_the_forward(
    images: int, hidden: int, out: int, cosine: float, seed: int
) -> None:
    """As above, with predictions that float64 computes again: the fp32 forward's own rounding included."""
    _, with_forward = errors(2, images, hidden, out, cosine, seed)
    assert with_forward <= 1e-5


def test_tracin_is_exact_close_to_the_target() -> None:
    """At cosine 0.999999 six digits of the gradient cancel; computed in float64 they are still there."""
    same_inputs, _ = errors(2, 16, 64, 32, 0.999999, 0)
    assert same_inputs <= 2e-6


def test_delta_is_the_gradient_at_the_layers_output() -> None:
    hidden, prediction, target = torch.randn(4, 2, 6), torch.randn(4, 2, 5).requires_grad_(), torch.randn(4, 2, 5)
    loss = (2 - 2 * torch.nn.functional.cosine_similarity(prediction, target, dim=-1)).sum()
    (expected,) = torch.autograd.grad(loss, prediction)
    factors = gradient_factors(hidden, prediction, target)
    torch.testing.assert_close(factors.delta, expected)
    assert torch.equal(factors.hidden, hidden)


def test_normalised_tracin_is_the_cosine_of_gradients() -> None:
    rows, columns = (naive.candidates(images, seed=images).factors[0] for images in (5, 7))
    truth_R, truth_C = naive.materialised(rows), naive.materialised(columns)
    found = pairwise_tracin(*normalised(rows), *normalised(columns)).double()
    torch.testing.assert_close(found, naive.cosine(truth_R, truth_C), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(self_influence(rows).double(), truth_R.square().sum(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(self_influence(*normalised(rows)), torch.ones(5))
    several = naive.candidates(5, layers=3).factors
    whole = torch.cat([naive.materialised(layer) for layer in several], 1)
    torch.testing.assert_close(self_influence(*several).double(), whole.square().sum(1), rtol=1e-5, atol=0)


def test_feature_is_the_sum_of_cosines() -> None:
    rows, columns = torch.randn(5, 2, 8), torch.randn(7, 3, 8)
    torch.testing.assert_close(
        pairwise_feature(rows, columns).double(), naive.feature(rows, columns), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("zero", [0.0, 1e-20])
@pytest.mark.parametrize("which", ["hidden", "prediction", "target"])
def test_zero_vectors_give_numbers(which: str, zero: float) -> None:
    inputs = {name: torch.randn(4, 2, 6) for name in ("hidden", "prediction", "target")}
    inputs[which][0] *= zero
    inputs[which][1, 0] *= zero
    factors = gradient_factors(**inputs)
    if which != "hidden":
        assert (factors.delta[0] == 0).all()  # no direction, no gradient
    for layer in (factors, *normalised(factors)):
        scores = pairwise_tracin(layer, layer)
        assert scores.isfinite().all()
        assert (scores[0] == 0).all() == (which != "hidden")
    assert pairwise_feature(inputs["target"], inputs["target"]).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_any_float_type_in_and_at_least_fp32_out(dtype: torch.dtype) -> None:
    inputs = [torch.randn(4, 2, 6).to(dtype).requires_grad_() for _ in range(3)]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    factors = gradient_factors(*inputs)
    narrow = Factors(*(factor.to(dtype) for factor in factors))
    for result in (*factors, pairwise_tracin(narrow, narrow), pairwise_feature(inputs[2], inputs[2])):
        assert result.dtype == wide
        assert not result.requires_grad
    expected = pairwise_tracin(*(Factors(*(factor.double() for factor in narrow)) for _ in range(2)))
    torch.testing.assert_close(pairwise_tracin(narrow, narrow).double(), expected, rtol=1e-5, atol=1e-5)


def test_autocast_and_fast_matmuls_do_not_reach_influence() -> None:
    inputs = [torch.randn(32, 2, 256) for _ in range(3)]
    factors = gradient_factors(*inputs)
    (unit,), look = normalised(factors), pairwise_feature(inputs[2], inputs[2])
    plain = pairwise_tracin(unit, unit)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = gradient_factors(*inputs)
            assert torch.equal(cast.delta, factors.delta)
            assert torch.equal(normalised(cast)[0].delta, unit.delta)
            assert torch.equal(pairwise_tracin(unit, unit), plain)
            assert torch.equal(pairwise_feature(inputs[2], inputs[2]), look)
            assert (inputs[0][0] @ inputs[0][0].T).dtype == torch.bfloat16  # the caller's autocast is still on
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


ids = st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=6).map(lambda values: torch.tensor(values))


@given(ids, ids, st.integers(0, 2**64), st.integers(0, 2**40))
def test_random_is_the_published_hash(row_ids: torch.Tensor, column_ids: torch.Tensor, seed: int, step: int) -> None:
    """Equal to Python's integers, so to itself on any device, and each number hangs on its own pair alone."""
    drawn = pairwise_random(row_ids, column_ids, seed, step)
    assert drawn.dtype == torch.float32
    assert torch.equal(drawn.double(), naive.random(row_ids, column_ids, seed, step))
    assert ((drawn > 0) & (drawn <= 1)).all()


@pytest.mark.parametrize("vary", ["row", "column", "seed", "step"])
def test_random_is_uniform_and_uncorrelated(vary: str) -> None:
    count = 20_000
    numbers, one = torch.arange(count), torch.tensor([7])
    if vary in ("row", "column"):
        drawn = pairwise_random(*((numbers, one) if vary == "row" else (one, numbers)), 0, 0).flatten()
    else:
        draws = [pairwise_random(one, one, *((n, 0) if vary == "seed" else (0, n))) for n in range(2000)]
        drawn, count = torch.cat(draws).flatten(), 2000
    bins = torch.histc(drawn, 20, 0, 1)
    chi_square = ((bins - count / 20) ** 2 / (count / 20)).sum()
    assert chi_square < 43.8  # 19 degrees of freedom, p = 0.001
    following = torch.corrcoef(torch.stack([drawn[:-1], drawn[1:]]))[0, 1]
    assert following.abs() < 4 / count**0.5


def test_shares_label() -> None:
    labels = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, 1], [0, 0, 0]])
    expected = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], dtype=torch.bool)
    for kind in (torch.bool, torch.uint8, torch.int64, torch.float32):
        assert torch.equal(shares_label(labels.to(kind), labels.to(kind)), expected)


@given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 100))
def test_pieces_equal_the_whole(piece: int, columns: int, seed: int) -> None:
    """What a rank computes of its own rows is what one process computes of all."""
    rows, pool = naive.candidates(9, seed=seed), naive.candidates(columns, seed=seed + 1)

    def pieces(score: Callable[[Candidates], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        parts = [score(rows.part(slice(start, start + piece))) for start in range(0, 9, piece)]
        return torch.cat(parts), score(rows)

    def tracin(side: Candidates) -> torch.Tensor:
        return pairwise_tracin(*(Factors(*(f.double() for f in x.factors[0])) for x in (side, pool)))

    torch.testing.assert_close(*pieces(lambda side: pairwise_random(side.ids, pool.ids, seed, 3)), rtol=0, atol=0)
    torch.testing.assert_close(*pieces(lambda side: shares_label(side.labels, pool.labels)), rtol=0, atol=0)
    torch.testing.assert_close(*pieces(lambda side: pairwise_feature(side.target, pool.target)), rtol=0, atol=1e-6)
    torch.testing.assert_close(*pieces(tracin), rtol=1e-12, atol=1e-12)
