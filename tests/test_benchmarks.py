"""Benchmarks import, and what they and the GPU tests run is tried on the CPU with tiny sizes."""

import functools
import importlib
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from benchmarks import gpu, gpu_throughput, harness, mining_overhead, ranks
from tests.gpu.device_runs import fp32_weights_step, rank_steps, relative
from tests.ranks import run_ranks
from tracekin.config import Config, Policy, load
from tracekin.distributed import collectives
from tracekin.train.miner import Miner

ROOT = Path(__file__).parent.parent
TINY = ["model.projector_hidden=32", "model.projection=16", "model.predictor_hidden=32", "data.image_size=32"]


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("[a-z]*.py")), ids=lambda path: path.stem)
def test_every_benchmark_imports_and_says_what_it_is(path: Path) -> None:
    assert importlib.import_module(f"benchmarks.{path.stem}").__doc__


def test_mining_overhead_measures_every_policy() -> None:
    config = load(Config, None, [*TINY, "train.global_batch=8"])
    found = run_ranks(mining_overhead.measure, 2, config, 0.0, 2)[0]
    result = mining_overhead.summarise(found)
    assert set(result["ratio"]) == set(result["estimate"]) == {*get_args(Policy)} - {"none"}
    assert set(result["price"]) == set(result["ratio"]) - set(result["bounded"])
    assert all(value > 1 for value in result["estimate"].values())
    for one in found["policies"].values():
        assert one["pair_ratio"]["count"] == 2
        assert "mining" not in one["plain_phases"]


@pytest.mark.parametrize(("ratio", "holds"), [(1.029, True), (1.031, False)])
def test_the_overhead_claim_can_fail(ratio: float, holds: bool) -> None:
    step = {"median": 2.0}
    one = {"plain": step, "mined_phases": {"mining": 0.1}, "ratio": 1.0, "pair_ratio": {"median": 1.0}}
    policies = {"tracin": one, "feature": {**one, "ratio": ratio}}
    result = mining_overhead.summarise({"policies": policies, "mined_term_seconds": 0.02, "monitoring_seconds": 0.01})
    assert result["holds"] is holds
    assert result["estimate"]["feature"] == pytest.approx(1.06)


def test_throughput_on_cpu() -> None:
    config = load(Config, None, [*TINY, "train.global_batch=4", "train.precision=fp32"])
    found: dict[str, Any] = run_ranks(gpu_throughput.throughput, 1, "cpu", config, ("tracin", "random"), 3, 0.0, 1)[0]
    assert (found["rows"], found["pool"]) == (4, 12)
    assert found["pool_bytes"] == 2 * 12 * (32 + 16 + 16) * 4
    assert set(found["policies"]) == {"tracin", "random"}
    assert found["peak_bytes"] == {"none": None, "tracin": None}
    for policy, phases in (("none", {"online", "target", "backward", "update", "other"}), ("tracin", {"mining"})):
        shares = found["share_of_step"][policy]
        assert phases <= set(shares)
        assert math.isclose(sum(shares.values()), 1)
        assert found["images_per_second"][policy] > 0
    assert "mining" not in found["share_of_step"]["none"]


def test_my_rows_are_the_first_columns_of_the_pool() -> None:
    config = load(Config, None, [*TINY, "train.global_batch=4"])
    pool = gpu_throughput.synthetic_pool(config, 3, torch.device("cpu"))
    mine = gpu_throughput.synthetic_pool(config, 1, torch.device("cpu"))
    mine = mine._replace(target=mine.target + 1)
    others = pool.target[4:].clone()
    exchange = gpu_throughput.AmongOthers(Miner(config.mining, torch.nn.Identity(), 0), pool)
    whole = exchange.gather(mine)
    (block,) = exchange.blocks(whole)
    assert torch.equal(whole.target[:4], mine.target)
    assert torch.equal(block.columns.factors[0].hidden[:4], mine.factors[0].hidden)
    assert torch.equal(whole.target[4:], others)


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


@pytest.mark.parametrize(
    ("passed", "figures", "code"),
    [(True, {"ratio": 1.5}, 0), (False, {"ratio": 1.5}, 1), (True, {"error": "it broke"}, 1)],
)
def test_gpu_writes_one_file_and_says_what_failed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, passed: bool, figures: dict[str, Any], code: int
) -> None:
    """The command's own course, its parts replaced by their answers."""
    for place, name, answer in (
        (torch.cuda, "is_available", True),
        (harness, "environment", {"gpu": "NVIDIA H100 80GB HBM3"}),
        (gpu, "device_facts", {"name": "NVIDIA H100 80GB HBM3"}),
        (gpu, "run_tests", {"passed": passed}),
        (gpu, "measure_throughput", figures),
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


def test_what_gpu_tests_run_works_on_two_cpu_ranks() -> None:
    found = run_ranks(rank_steps, 2, "cpu")[0]
    for policy, stage in itertools.product(("none", "tracin", "random"), (0, 1, 2)):
        ours, truth = found[f"{policy}/{stage}"], found[policy]
        assert torch.equal(ours["index"], truth["index"])
        assert relative(ours["gradient"], truth["gradient"]) <= 1e-3


def test_bf16_bound_of_gpu_tests_is_not_blind() -> None:
    """The error that the GPU is given to match is a rounding error: there is one, and the gradient survives it."""
    cpu = torch.device("cpu")
    exact, rounded = (fp32_weights_step("tiny", cpu, "random", bf16=bf16) for bf16 in (False, True))
    assert 1e-3 < relative(rounded["gradient"], exact["gradient"]) < 0.3


def total_of_ranks(rank: int, offset: int) -> float:
    assert rank != offset, "told to fail"
    return float(collectives.total(torch.tensor(float(rank))))


def test_ranks_meet_and_fail_loudly(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = functools.partial(torch.multiprocessing.start_processes, start_method="forkserver")  # nothing to import
    monkeypatch.setattr(torch.multiprocessing, "spawn", quick)
    assert ranks.run_ranks(total_of_ranks, 2, 5) == [1.0, 1.0]
    with pytest.raises(Exception, match="told to fail"):
        ranks.run_ranks(total_of_ranks, 2, 1)
    with pytest.raises(TimeoutError, match="total_of_ranks"):
        ranks.run_ranks(total_of_ranks, 2, 5, timeout=0)
