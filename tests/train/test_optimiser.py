import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tracekin.config import OptimiserConfig
from tracekin.train.optimiser import LARS, build_optimiser, peak_lr
from tracekin.train.schedule import lr_at


def test_lars_follows_its_formula() -> None:
    torch.manual_seed(0)
    w, b = nn.Parameter(torch.randn(4, 3, dtype=torch.float64)), nn.Parameter(torch.randn(4, dtype=torch.float64))
    optimiser = LARS([{"params": [w], "weight_decay": 0.1}, {"params": [b], "adapt": False}], lr=0.5, momentum=0.9)
    w_now, b_now = w.detach().clone(), b.detach().clone()
    v_w, v_b = torch.zeros_like(w_now), torch.zeros_like(b_now)
    for _ in range(4):
        w.grad, b.grad = torch.randn_like(w), torch.randn_like(b)
        u = w.grad + 0.1 * w_now
        v_w = 0.9 * v_w + 1e-3 * w_now.norm() / u.norm() * u
        v_b = 0.9 * v_b + b.grad
        w_now, b_now = w_now - 0.5 * v_w, b_now - 0.5 * v_b
        optimiser.step()
    assert torch.allclose(w, w_now, rtol=1e-12)
    assert torch.allclose(b, b_now, rtol=1e-12)


@pytest.mark.parametrize("zero", ["weight", "gradient"])
def test_lars_takes_ratio_one_where_a_norm_is_zero(zero: str) -> None:
    w = nn.Parameter(torch.zeros(3) if zero == "weight" else torch.ones(3))
    w.grad = torch.ones(3) if zero == "weight" else torch.zeros(3)
    expected = w.detach() - 0.5 * w.grad
    LARS([w], lr=0.5, momentum=0.0).step()
    assert torch.equal(w.detach(), expected)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars"])
def test_biases_and_batch_norms_are_not_decayed(name: str) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    optimiser = build_optimiser(net, OptimiserConfig(name=name, weight_decay=0.3), zero_stage=0)  # type: ignore[arg-type]
    decay = {id(p): group["weight_decay"] for group in optimiser.param_groups for p in group["params"]}
    assert len(decay) == len(list(net.parameters()))
    for parameter in net.parameters():
        assert decay[id(parameter)] == (0.3 if parameter.ndim > 1 else 0)


def test_learning_rate_scales_with_the_batch_except_for_adamw() -> None:
    assert peak_lr(OptimiserConfig(name="sgd", lr=0.4), 512) == pytest.approx(0.8)
    assert peak_lr(OptimiserConfig(name="lars", lr=0.2), 4096) == pytest.approx(3.2)
    assert peak_lr(OptimiserConfig(name="adamw", lr=1e-3), 4096) == pytest.approx(1e-3)


@given(total=st.integers(1, 2000), share=st.floats(0, 1), peak=st.floats(1e-4, 10))
def test_schedule_rises_to_its_peak_and_falls_towards_zero(total: int, share: float, peak: float) -> None:
    warmup = round(share * total)
    rates = [lr_at(step, total, warmup, peak) for step in range(total)]
    assert all(0 < rate <= peak * (1 + 1e-9) for rate in rates)
    assert all(a < b for a, b in itertools.pairwise(rates[:warmup]))
    assert all(a >= b for a, b in itertools.pairwise(rates[warmup:]))
    assert math.isclose(max(rates), peak, rel_tol=1e-9)
