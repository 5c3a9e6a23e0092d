"""Benchmarks import, and what they and the GPU tests run is tried on the CPU with tiny sizes."""

import functools
import importlib
import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch

from benchmarks import gpu, gpu_throughput, harness, mining_overhead, ranks, steps
from tests.gpu.device_runs import UNWAITING, fp32_weights_step, no_waiting, rank_steps, relative, unwaiting_step
from tests.ranks import run_ranks
from tests.train.tiny_run import tiny_backbone
from tracekin.config import Config, Policy, load
from tracekin.distributed import collectives
from tracekin.influence.gradients import Factors
from tracekin.influence.policies import POLICIES
from tracekin.monitor.metrics import Clock
from tracekin.train.miner import Miner

ROOT = Path(__file__).parent.parent
TINY = ["model.projector_hidden=32", "model.projection=16", "model.predictor_hidden=32", "data.image_size=32"]


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("[a-z]*.py")), ids=lambda path: path.stem)
def test_every_benchmark_imports_and_says_what_it_is(path: Path) -> None:
    assert importlib.import_module(f"benchmarks.{path.stem}").__doc__


def with_tiny_backbone(rank: int, measure: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """What the backbone costs is not asked."""
    with tiny_backbone():
        return measure(rank, *arguments)


def test_mining_overhead_measures_every_policy() -> None:
    config = load(Config, None, [*TINY, "train.global_batch=8"])
    found = run_ranks(with_tiny_backbone, 2, mining_overhead.measure, config, 0.0, 2)[0]
    every = {*get_args(Policy)} - {"none"}
    for key in ("ratio", "estimate", "standard_error", "mining_seconds", "measure_seconds", "pair_ratio"):
        assert set(found[key]) == every
    assert set(found["bounded"]) == set(steps.BOUNDED)
    assert set(found["price"]) == every - set(found["bounded"])
    assert all(value > 1 for value in found["estimate"].values())
    assert all(one["count"] == 2 for one in found["pair_ratio"].values())
    assert list(found)[-1] == "ratio"
    lines = steps.table(found)
    assert len(lines) == 2 + len(every)
    assert max(map(len, lines[:-1])) <= 80


def figures_of(ratio: float, error: float) -> dict[str, Any]:
    """Of a bounded policy with this ratio, one without noise at the plain step's speed, and a dear one."""
    pairs = {"median": ratio, "count": 9}
    one = {
        "plain": {"median": 2.0},
        "mined": {"median": 2.0 * ratio},
        "plain_phases": {"measure": 0.01},
        "mined_phases": {"measure": 0.02, "mining": 0.1},
        "ratio": ratio,
        "standard_error": error,
        "pair_ratio": pairs,
    }
    quiet = {**one, "ratio": 1.0, "standard_error": 0.0}
    return steps.summarise({"tracin": quiet, "feature": one, "ghost": {**one, "ratio": 1.5}}, 0.02, 1.03)


@pytest.mark.parametrize(
    ("ratio", "error", "holds", "uncertain"),
    [
        (1.029, 0.0004, True, []),
        (1.029, 0.0006, True, ["feature"]),
        (1.031, 0.0004, False, []),
        (1.031, 0.0006, False, ["feature"]),
        (math.nan, math.nan, False, []),
    ],
)
def test_the_overhead_claim_can_fail_and_knows_its_noise(
    ratio: float, error: float, holds: bool, uncertain: list[str]
) -> None:
    result = figures_of(ratio, error)
    assert (result["holds"], result["uncertain"]) == (holds, uncertain)
    assert result["bounded"] == ["tracin", "feature"]
    assert result["price"] == {"ghost": 1.5}
    assert result["estimate"]["feature"] == pytest.approx(1 + (0.1 + 0.02 + 0.01) / 2)
    told = steps.table(result)[-1]
    assert ("is missed" in told) is not holds
    assert ("feature" in told) is bool(uncertain)


def test_error_of_a_median_is_that_of_normal_noise() -> None:
    draws = torch.randn(2000, 25, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = [harness.summary(row.tolist()) for row in draws]
    truth = torch.tensor([one["median"] for one in found]).std()
    error = torch.tensor([steps.median_error(one) for one in found]).mean()
    assert float(error / truth) == pytest.approx(1, abs=0.1)


def test_pairs_alternate_and_the_bounded_policies_get_most_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that only steps move, by 1 s; by 3 s that of a costlier policy."""
    now, run = 0.0, []

    def step(policy: str, clock: Clock) -> None:
        nonlocal now
        run.append(policy)
        now += 3 if policy == "ghost" else 1
        clock.seconds |= {"measure": 0.25} | ({} if policy == "none" else {"mining": 0.5})

    for module in (harness, steps):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now))
    policies, cpu = ("ghost", "tracin", "feature"), torch.device("cpu")
    found = steps.compare_with_plain(step, policies, cpu, budget=60, most_pairs=20)  # type: ignore[arg-type]
    assert list(found) == list(policies)
    assert run[:4] == ["none", *policies]  # warm-up
    assert run[4:12] == ["none", "tracin", "none", "feature", "tracin", "none", "feature", "none"]
    # 50 s in rounds of 4 s; 10 s for pairs of 4 s, of which three are measured whatever they take.
    counts = {policy: one["pair_ratio"]["count"] for policy, one in found.items()}
    assert counts == {"ghost": 3, "tracin": 12, "feature": 12}
    assert found["ghost"]["ratio"] == 3
    assert (found["ghost"]["plain"]["median"], found["ghost"]["mined"]["median"]) == (1, 3)
    assert found["tracin"]["plain_phases"] == {"measure": 0.25}
    assert found["tracin"]["mined_phases"] == {"measure": 0.25, "mining": 0.5}


def test_throughput_on_cpu() -> None:
    """A policy of each kind: gradients of the last layer, of several, at checkpoints, none; two scores; mates."""
    config = load(Config, None, [*TINY, "train.global_batch=4", "train.precision=fp32", "mining.policy=tracin"])
    policies = ("tracin", "ghost", "tracin_cp_cosine", "random", "agreement", "group")
    assert {POLICIES[policy].gradients for policy in policies} == {one.gradients for one in POLICIES.values()}
    asked = ("cpu", config, policies, 3, 0.0, 1)
    found: dict[str, Any] = run_ranks(with_tiny_backbone, 1, gpu_throughput.throughput, *asked)[0]
    assert (found["rows"], found["pool"]) == (4, 12)
    assert found["pool_bytes"] == 2 * 12 * (32 + 16 + 16) * 4  # the last layer's, not the four of ghost
    assert set(found["ratio"]) == set(policies)
    assert (found["bound"], found["bounded"]) == (1.01, ["tracin", "random"])
    assert isinstance(found["holds"], bool)
    assert found["peak_bytes"] == {"none": None, "tracin": None}
    for policy, phases in (
        ("none", {"online", "target", "backward", "update", "measure", "other"}),
        ("tracin", {"mining"}),
    ):
        shares = found["share_of_step"][policy]
        assert phases <= set(shares)
        assert math.isclose(sum(shares.values()), 1)
    assert all(found["images_per_second"][policy] > 0 for policy in ("none", *policies))
    assert "mining" not in found["share_of_step"]["none"]


def test_my_rows_are_the_first_columns_of_every_layer_of_the_pool() -> None:
    config = load(Config, None, [*TINY, "train.global_batch=4"])
    pool = gpu_throughput.SyntheticPool(config, 3, torch.device("cpu"))
    before = pool.nbytes()
    layers = [Factors(torch.rand(4, 2, width) + 9, torch.rand(4, 2, 16) + 9) for width in (32, 8, 32)]
    mine = pool.known.part(slice(0, 4))
    mine = mine._replace(target=mine.target + 1, factors=tuple(layers))
    others = pool.known.target[4:].clone()
    exchange = gpu_throughput.AmongOthers(Miner(config.mining, torch.nn.Identity(), 0), pool)
    whole = exchange.gather(mine)
    (block,) = exchange.blocks(whole)
    assert torch.equal(whole.target[:4], mine.target)
    assert torch.equal(whole.target[4:], others)
    for own, found in zip(layers, block.columns.factors, strict=True):
        assert found.hidden.shape == (12, 2, own.hidden.shape[2])
        assert torch.equal(found.hidden[:4], own.hidden)
        assert torch.equal(found.delta[:4], own.delta)
        assert found.hidden[4:].max() < 9
    drawn = pool.nbytes()
    assert drawn - before == 2 * 12 * (32 + 8 + 32 + 3 * 16) * 4
    exchange.gather(mine._replace(factors=tuple(layers[:2])))
    (again,) = exchange.blocks(whole)
    assert len(again.columns.factors) == 2
    assert pool.nbytes() == drawn, "policies share what was drawn"


def test_gpu_without_a_gpu_claims_nothing() -> None:
    results = ROOT / "benchmarks" / "results"
    before = sorted(results.glob("gpu-*"))
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", "benchmarks.gpu"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("No GPU here")
    assert len(run.stdout.splitlines()) == 1
    assert sorted(results.glob("gpu-*")) == before


def test_gpu_report_is_read_from_pytest(tmp_path: Path) -> None:
    (tmp_path / "test_sample.py").write_text(
        "import pytest\n"
        "def test_good(record_property): record_property('error', 0.5)\n"
        "def test_bad(): assert 1 == 2\n"
        "@pytest.mark.skip(reason='no')\n"
        "def test_skipped(): pass\n"
    )
    found = gpu.run_tests(str(tmp_path), 60)
    assert found["outcomes"] == {"test_good": "passed", "test_bad": "failed", "test_skipped": "skipped"}
    assert found["measured"] == {"test_good": {"error": 0.5}}
    assert "assert 1 == 2" in found["failures"]["test_bad"]
    assert not found["passed"]


MEASURED = {
    "images_per_second": {"none": 100.0, "tracin": 99.0},
    "share_of_step": {"none": {}, "tracin": {}},
    "peak_bytes": {"none": 1, "tracin": 2},
}


@pytest.mark.parametrize(
    ("passed", "figures", "views", "code"),
    [
        (True, MEASURED | figures_of(1.02, 0.001), {"holds": True}, 0),
        (False, MEASURED | figures_of(1.02, 0.001), {"holds": True}, 1),
        (True, MEASURED | figures_of(1.04, 0.001), {"holds": True}, 1),
        (True, MEASURED | figures_of(1.02, 0.001), {"holds": False}, 1),
        (True, {"error": "it broke"}, {"holds": True}, 1),
    ],
)
def test_gpu_writes_one_file_and_says_what_failed(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    passed: bool,
    figures: dict[str, Any],
    views: dict[str, Any],
    code: int,
) -> None:
    """The command's own course, its parts replaced by their answers."""
    for place, name, answer in (
        (torch.cuda, "is_available", True),
        (harness, "environment", {"gpu": "NVIDIA H100 80GB HBM3"}),
        (gpu, "device_facts", {"name": "NVIDIA H100 80GB HBM3"}),
        (gpu, "run_tests", {"passed": passed}),
        (gpu, "measure_throughput", figures),
        (gpu, "measure_views", views),
    ):
        monkeypatch.setattr(place, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["gpu"])
    with pytest.raises(SystemExit) as exit_:
        gpu.main()
    assert exit_.value.code == code
    (written,) = tmp_path.iterdir()
    assert written.name == "gpu-nvidia-h100-80gb-hbm3.json"
    record = json.loads(written.read_text())
    assert (record["tests"]["passed"], record["resnet50_224_bf16"]) == (passed, figures)
    if "error" not in figures:
        assert record["resnet50_224_bf16"]["holds"] is (figures["ratio"]["feature"] <= 1.03)


def test_what_gpu_tests_run_works_on_two_cpu_ranks() -> None:
    found = run_ranks(rank_steps, 2, "cpu")[0]
    for policy, stage in itertools.product(("none", "tracin", "random"), (0, 1, 2)):
        ours, truth = found[f"{policy}/{stage}"], found[policy]
        assert torch.equal(ours["index"], truth["index"])
        assert relative(ours["gradient"], truth["gradient"]) <= 1e-3


@pytest.mark.parametrize("name", UNWAITING)
def test_a_mined_step_reads_nothing_back(name: str) -> None:
    """The GPU test of the same, by the operators that would wait for a GPU."""
    mining = UNWAITING[name]
    found = unwaiting_step(torch.device("cpu"), **mining)
    assert found["loss"] > 0
    assert ("num_mined" in found) is (mining["policy"] != "none")
    assert ("same" in found) is ("compare" in mining)


def test_reading_back_is_seen() -> None:
    there = torch.ones(3)
    with no_waiting(torch.device("cpu")):
        there[torch.tensor([0, 2])] += torch.full((), 2.0)
    for waits in (
        lambda: there.sum().item(),
        lambda: bool((there > 0).all()),
        lambda: there[there > 0],
        lambda: there.nonzero(),
        lambda: there.__setitem__(there > 0, there[:1]),
    ):
        with pytest.raises(RuntimeError, match="would wait"), no_waiting(torch.device("cpu")):
            waits()


def test_bf16_bound_of_gpu_tests_is_not_blind() -> None:
    """The error that the GPU is given to match is a rounding error: there is one, and the gradient survives it."""
    cpu = torch.device("cpu")
    exact, rounded = (fp32_weights_step("tiny", cpu, "random", bf16=bf16) for bf16 in (False, True))
    assert 1e-3 < relative(rounded["gradient"], exact["gradient"]) < 0.3


def total_of_ranks(rank: int, offset: int) -> float:
    assert rank != offset, "told to fail"
    return float(collectives.total(torch.tensor(float(rank))))


def hanging(rank: int) -> None:
    time.sleep(600)


def test_ranks_meet_and_fail_loudly(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = functools.partial(torch.multiprocessing.start_processes, start_method="forkserver")  # nothing to import
    monkeypatch.setattr(torch.multiprocessing, "spawn", quick)
    assert ranks.run_ranks(total_of_ranks, 2, 5) == [1.0, 1.0]
    with pytest.raises(Exception, match="told to fail"):
        ranks.run_ranks(total_of_ranks, 2, 1)
    with pytest.raises(TimeoutError, match="hanging"):  # without a group, whose own time-out might come first
        ranks.run_ranks(hanging, 2, backend=None, timeout=0.5)
