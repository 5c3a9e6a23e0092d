"""Collapse monitors say what they are defined to say."""

import math

import pytest
import torch
import torch.nn.functional as F

from tracekin.monitor.metrics import spread


def test_monitors_are_the_papers() -> None:
    projection = torch.randn(12, 2, 5)
    a, b = F.normalize(projection, dim=2).unbind(1)
    pairs = [math.exp(-2 * float((a[i] - a[j]).square().sum())) for i in range(12) for j in range(12) if i != j]
    found = spread(projection)
    assert found["uniformity"] == pytest.approx(math.log(sum(pairs) / len(pairs)), rel=1e-5)
    assert found["alignment"] == pytest.approx(float((a - b).square().sum(1).mean()), rel=1e-5)


def test_collapse_evenness_and_garbage() -> None:
    even = F.normalize(torch.randn(2000, 1, 64), dim=2).expand(-1, 2, -1)
    found = spread(even)
    assert found["target_std"] == pytest.approx(1, abs=0.02)
    assert found["effective_rank"] > 60
    assert found["alignment"] == pytest.approx(0, abs=1e-6)
    assert found["uniformity"] == pytest.approx(-4, abs=0.15)
    collapsed = spread(torch.ones(10, 2, 4) + 1e-6 * torch.randn(10, 2, 4))
    assert collapsed["target_std"] < 1e-4
    assert collapsed["uniformity"] == pytest.approx(0, abs=1e-4)
    even = even.clone()
    even[0, 0, 0] = math.nan
    assert all(map(math.isnan, spread(even).values()))
