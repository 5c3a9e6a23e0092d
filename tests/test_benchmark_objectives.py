"""The comparison of steps with lightly on tiny sizes: equal work, and every part of the claim can fail."""

import copy
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import harness, lightly_steps
from benchmarks import objectives as bench
from benchmarks.lightly_steps import LightlyStep
from benchmarks.steps import synthetic_batch
from tests.ranks import run_ranks
from tracekin import objective
from tracekin.config import Config, ModelConfig
from tracekin.distributed.world import World
from tracekin.model.batch_norm import convert_batch_norms

CPU = torch.device("cpu")
TINY = ["model.projector_hidden=16", "model.projection=4", "data.image_size=16", "train.global_batch=8"]
EQUAL = {
    "differences": {"loss": 1e-11, "gradient": 1e-11, "fp32_loss": 1e-5},
    "ratio": 0.95,
    "standard_error": 0.0,
}
GOOD: dict[str, Any] = {"equal_form": {"simclr": EQUAL, "moco": {**EQUAL, "ratio": 1.5}}}


@pytest.fixture
def small_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides have a small convolutional encoder instead of a ResNet."""

    def plain(config: ModelConfig, channels: int) -> nn.Module:
        layers = (nn.Conv2d(channels, 16, 3, stride=2, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        net.num_features = 16
        return net

    monkeypatch.setattr(lightly_steps, "plain_backbone", plain)
    monkeypatch.setattr(objective, "build_backbone", lambda *of: convert_batch_norms(plain(*of[:2])))


def tiny(name: str, *overrides: str) -> Config:
    return bench.configure([name], [*TINY, "train.precision=fp32", *overrides])[0][name]


def losses_apart(config: Config, steps: int) -> list[float]:
    """Of several steps of both sides in float64, on other images in each."""
    ours, theirs = bench.build_both(config, CPU, torch.float64)
    batch, apart = synthetic_batch(config, World()), []
    for step in range(steps):
        views = torch.randn(batch.views.shape, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        fresh = replace(batch, views=views, index=batch.index + 10**6 * step)
        bench.sub_batches_as_ours(config)
        apart.append(bench.loss_difference(config, ours(fresh).loss, theirs(views)))
    return apart


@pytest.mark.usefixtures("small_backbone")
@pytest.mark.parametrize("name", bench.OBJECTIVES)
def test_both_sides_train_alike(name: str) -> None:
    """Losses, gradients, optimisers, slow copies and queues: three steps end in the same place."""
    assert max(losses_apart(tiny(name), 3)) <= 1e-10


@pytest.mark.usefixtures("small_backbone")
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("byol", "objective.tau_base=0.5"),
        ("simclr", "objective.temperature=0.2"),
        ("moco", "objective.tau_base=0.5"),
        ("vicreg", "objective.covariance=2"),
        ("simsiam", "optimiser.momentum=0"),
    ],
)
def test_other_steps_are_seen(monkeypatch: pytest.MonkeyPatch, name: str, change: str) -> None:
    theirs = bench.lightly_step
    monkeypatch.setattr(bench, "lightly_step", lambda _, device: theirs(tiny(name, change), device))
    assert max(losses_apart(tiny(name), 3)) > 1e-6


@pytest.mark.usefixtures("small_backbone")
def test_another_gradient_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice as large, of the same loss."""
    config = tiny("simsiam")
    batch = synthetic_batch(config, World())
    same = bench.differences(config, batch, CPU)
    assert max(same.values()) <= 1e-10
    of = LightlyStep.loss
    monkeypatch.setattr(LightlyStep, "loss", lambda self, views: 2 * (whole := of(self, views)) - whole.detach())
    changed = bench.differences(config, batch, CPU)
    assert changed["loss"] <= 1e-10
    assert changed["gradient"] > 0.1


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("ratio",), 0.949),
        (("ratio",), math.nan),
        (("differences", "loss"), 2e-10),
        (("differences", "gradient"), math.nan),
        (("differences", "fp32_loss"), 2e-4),
    ],
)
def test_the_claim_can_fail(path: tuple[str, ...], value: float) -> None:
    assert bench.summarise(GOOD)["holds"]
    found: dict[str, Any] = copy.deepcopy(GOOD)
    place = found["equal_form"]["simclr"]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert not bench.summarise(found)["holds"]


def test_what_lies_within_the_noise_is_named() -> None:
    found: dict[str, Any] = copy.deepcopy(GOOD)
    found["equal_form"]["moco"] |= {"ratio": 0.97, "standard_error": 0.011}
    found["equal_form"]["simclr"] |= {"ratio": 0.97, "standard_error": 0.009}
    assert bench.summarise(found)["uncertain"] == ["moco"]


def test_rounds_turn_round() -> None:
    run: list[str] = []
    times = bench.rotate({name: lambda name=name: run.append(name) for name in "abc"}, 3)  # type: ignore[misc]
    assert "".join(run) == "abccbaabc"
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3, "c": 3}


def test_byol_beside_others_takes_what_is_not_theirs() -> None:
    overrides = ["objective.temperature=0.3", "model.projection=16", "mining.policy=tracin"]
    configs, byol = bench.configure(["simclr"], overrides)
    assert list(configs) == ["simclr"]
    assert configs["simclr"].objective.temperature == 0.3
    assert (byol.objective.name, byol.model.projection, byol.mining.policy) == ("byol", 16, "none")
    with_byol, byol = bench.configure(["byol", "moco"], ["objective.tau_base=0.5"])
    assert byol is with_byol["byol"]
    assert byol.objective.tau_base == 0.5


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    found: dict[str, Any] = run_ranks(bench.measure, 1, ["moco"], TINY, 2, 1, 1)[0]
    return found


def test_every_figure_is_there(measured: dict[str, Any]) -> None:
    assert (measured["batch"], measured["precision"]) == (8, "bf16")
    (equal,), (real,) = measured["equal_form"].values(), measured["with_defaults"].values()
    assert all(equal["differences"][key] <= bound for key, bound in bench.TOLERANCES.items())
    assert equal["pair_ratio"]["count"] == 2
    assert equal["ratio"] == equal["pair_ratio"]["median"]
    assert equal["images_per_second"]["ours"] == pytest.approx(8 / equal["ours"]["median"])
    # Weights, gradients, momentum and the slow copy; the rest is small here.
    held = 4 * 4 * sum(p.numel() for p in bench.build_online(tiny("moco")).parameters())
    assert all(held < equal["peak_bytes"][side] < 1.4 * held for side in ("ours", "lightly"))
    assert set(real["seconds"]) == {"ours", "plain", "lightly", "byol"}
    assert real["over_byol"]["median"] == real["seconds"]["ours"]["median"] / real["seconds"]["byol"]["median"]
    assert real["memory_over_byol"] < 1
    assert set(measured["views_per_second"]) == {"ours", "lightly"}


def test_the_command_prints_saves_and_says_whether_it_holds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], measured: dict[str, Any]
) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(bench, "run_ranks", lambda *_, **__: [measured])
    for bound, code in ((0.0, 0), (1e9, 1)):
        monkeypatch.setattr(bench, "BOUND", bound)
        monkeypatch.setattr(sys, "argv", ["objectives", "--objectives=moco", *TINY, "--threads=1", "--save"])
        with pytest.raises(SystemExit) as exit_:
            bench.main()
        assert exit_.value.code == code
        *lines, last = capsys.readouterr().out.splitlines()
        assert [line for line in lines if len(line) > 80 and "overrides" not in line] == []
        assert sum(line.startswith("moco ") for line in lines) == 2
        record = json.loads(last)
        assert list(record)[-1] == "ratio"
        assert record["holds"] is (code == 0)
        assert record == json.loads((tmp_path / "objectives.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--objectives=byol,mocov3"], "--objectives mocov3: accepted are byol,"),
        (["--objectives=moco", "objective.version=3"], "objective.version=3: lightly has neither MoCo v3"),
        (["--objectives=moco", "objective.norm=shuffled"], "objective.norm=shuffled: lightly has neither"),
        (["--objectives=wmse", "model.projection=100"], "accepted with objective.sub_batch=128 is 1 to 64"),
        (["--objectives=simclr", "objective.tau=1"], "tau"),
        (["--pairs=0"], "--pairs 0: accepted is 1 or more"),
    ],
)
def test_mistakes_are_told_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    monkeypatch.setattr(bench, "run_ranks", lambda *_, **__: pytest.fail("measured"))
    monkeypatch.setattr(sys, "argv", ["objectives", *arguments])
    with pytest.raises(SystemExit) as exit_:
        bench.main()
    assert exit_.value.code == 2
    assert told in capsys.readouterr().err
