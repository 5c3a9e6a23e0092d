"""The comparison of views with lightly and kornia on tiny sizes: equal work, and every part of the claim can fail."""

import copy
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp

from benchmarks import augment_throughput as bench
from benchmarks import harness

GOOD: dict[str, Any] = {
    "lightly": {"64": {"a": {"ratio": 1.5}, "b": {"ratio": 9.0}}, "224": {"a": {"ratio": 1.0}}},
    "photometry": {"64": {"same_bits": True}, "224": {"same_bits": True}},
    "device": {"holds": True},
}


VIEWS = 500
FIGURES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "luma": lambda views: views.mean((1, 2, 3)),
    "colour": lambda views: views.mean((2, 3))[:, 0] - views.mean((2, 3))[:, 2],
    "contrast": lambda views: views.mean(1).std((1, 2)),
    "lightest": lambda views: views.amax((1, 2, 3)),
    "detail": lambda views: views.diff(dim=3).abs().mean((1, 2, 3)),
}


@pytest.fixture(scope="module")
def lightlys() -> torch.Tensor:
    """[VIEWS, 2, 3, 24, 24]."""
    torch.manual_seed(0)
    np.random.seed(0)
    return torch.stack(bench.lightly_views(24)([bench.lesion(60, 45, 0)] * VIEWS)).unflatten(0, (VIEWS, 2))


@pytest.mark.parametrize(
    ("change", "equal"),
    [
        ({}, True),
        ({"crop_min": 0.3}, False),
        ({"jitter": 0.5}, False),
        ({"jitter_probability": 0.3}, False),
        ({"grey": 0.0}, False),
        ({"blur": (0.0, 0.0)}, False),
        ({"blur": (0.1, 1.0)}, False),
        ({"solarise": (0.0, 0.0)}, False),
    ],
)
def test_ours_and_lightlys_views_are_of_one_kind(
    monkeypatch: pytest.MonkeyPatch, lightlys: torch.Tensor, change: dict[str, Any], equal: bool
) -> None:
    """Figures of many views of one image have equal distributions, and unequal ones with any other parameter."""
    monkeypatch.setattr(bench, "BYOL", replace(bench.BYOL, **change))
    ours = torch.stack(bench.our_views([bench.lesion(60, 45, 0)] * VIEWS, 24)).unflatten(0, (VIEWS, 2))
    distances = {
        (name, v): ks_2samp(figure(ours[:, v]), figure(lightlys[:, v])).statistic
        for name, figure in FIGURES.items()
        for v in (0, 1)
    }
    assert (max(distances.values()) < 0.125) == equal, distances  # by chance above in one of a thousand


def test_photometry_is_equal_work() -> None:
    images = [bench.lesion(60, 45, seed) for seed in range(4)]
    crops = np.stack([bench.crops_of(images, 24, v) for v in (0, 1)])
    one, batch = (bench.our_photometry(crops, batched=batched) for batched in (False, True))
    assert torch.equal(one, batch)
    theirs = bench.kornia_photometry(24)(crops)
    assert theirs.shape == batch.shape == (8, 3, 24, 24)
    assert 0 <= theirs.min() < theirs.max() <= 1
    assert abs(float(theirs.mean() - batch.mean())) < 0.1


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("lightly", "64", "b", "ratio"), 1.49),
        (("lightly", "224", "a", "ratio"), float("nan")),
        (("photometry", "224", "same_bits"), False),
        (("device", "holds"), False),
    ],
)
def test_the_claim_can_fail(path: tuple[str, ...], value: object) -> None:
    assert bench.summarise(GOOD)["holds"]
    assert bench.summarise({key: one for key, one in GOOD.items() if key != "device"})["holds"]
    found = copy.deepcopy(GOOD)
    inner = found
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    assert not bench.summarise(found)["holds"]


def test_device_throughput_runs_anywhere() -> None:
    found = bench.device_throughput("cpu", size=16, views=6, repeats=2)
    assert found["views_per_second"] == pytest.approx(6 / found["seconds"]["median"])
    assert found["holds"] == (found["views_per_second"] >= bench.DEVICE_BOUND)


@pytest.mark.parametrize(("bounds", "code"), [({"16": 0.0}, 0), ({"16": 1e9}, 1)])
def test_the_command_prints_saves_and_says_whether_it_holds(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    bounds: dict[str, float],
    code: int,
) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(bench, "BOUNDS", bounds)
    monkeypatch.setattr(bench, "JPEG_SIZES", ((320, 240),))
    monkeypatch.setattr(sys, "argv", ["augment_throughput", "--images=2", "--pairs=2", "--threads=1", "--save"])
    with pytest.raises(SystemExit) as exit_:
        bench.main()
    assert exit_.value.code == code
    lines = capsys.readouterr().out.splitlines()
    assert any("160x120" in line for line in lines)
    record = json.loads(lines[-1])
    assert list(record)[-1] == "ratio"
    assert record["same_bits"]
    assert record["environment"]["threads"] == 1
    assert record == json.loads((tmp_path / "augment_throughput.json").read_text(encoding="utf-8"))
