"""A whole run on the GPU: NCCL with one rank, checkpoints, metrics, and going on from a checkpoint."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from benchmarks.ranks import run_ranks
from tests.data.tiny import make_dataset
from tests.train.test_run import metrics, run, tiny_config

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: make gpu runs it")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_trains_and_resumes(tmp_path: Path, precision: str) -> None:
    make_dataset(tmp_path / "data", train=50, val=10, test=10)
    config = tiny_config(tmp_path, f"train.precision={precision}", "data.workers=1")
    run_ranks(run, 1, config, backend=None, timeout=60)
    lines = metrics(config)
    assert [line["step"] for line in lines] == [2, 3, 4, 6, 8, 9, 10, 12]
    assert all(math.isfinite(line["loss"]) and line["mining_seconds"] > 0 for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert json.loads((config.run_folder / "environment.json").read_text())["device"] == "cuda"
    for later in ("step-00000009", "step-00000012"):
        shutil.rmtree(config.run_folder / "checkpoints" / later)
    (config.run_folder / "checkpoints" / "latest").write_text("step-00000006\n")
    run_ranks(run, 1, config, backend=None, timeout=60)
    again = metrics(config)
    assert [line["step"] for line in again] == [line["step"] for line in lines]
    bound = 1e-2 if precision == "fp32" else 5e-2  # atomics order a GPU's sums anew in every run
    assert again[-1]["loss"] == pytest.approx(lines[-1]["loss"], rel=bound)
