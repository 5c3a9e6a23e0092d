"""Every GPU test and claim in one command, in under nine minutes on one H100-class GPU:

    make gpu            (PYTHONPATH=src python3 -m benchmarks.gpu)

It runs the tests of `tests/gpu`, then measures ResNet-50 at 224 px in bf16: images a second without and with mining
against a synthetic pool of 64 x 256 images, the share of the step by phase, and peak memory. All of it goes into one
file, benchmarks/results/gpu-NAME.json. Without a GPU it says so, measures nothing and writes nothing. Exit code 1: a
test failed, or a part did not finish; the file says which.
"""

import math
import re
import subprocess
import sys
import tempfile
import time
import traceback
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any, get_args

import torch

from benchmarks.gpu_throughput import throughput
from benchmarks.harness import arguments, finish
from benchmarks.ranks import run_ranks
from tracekin.config import Config, Policy, load

ROOT = Path(__file__).parent.parent
TEST_SECONDS = 270
THROUGHPUT_SECONDS = 200
POOL_RANKS = 64
POLICIES = tuple(policy for policy in get_args(Policy) if policy != "none")
RECIPE = ["model.backbone=resnet50", "data.image_size=224", "train.global_batch=256", "train.precision=bf16"]


def run_tests(folder: str = "tests/gpu", limit: float = TEST_SECONDS) -> dict[str, Any]:
    """Run the GPU tests with pytest in a process of its own.

    Returns:
        ``outcomes``: passed, failed or skipped for each test; ``measured``: the figures that tests recorded, by test;
        ``failures``: the end of each failure's text; ``passed``: whether every test passed; none may be skipped.
    """
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "junit.xml"
        # No conftest and no settings of the project: on a GPU machine pytest itself is enough.
        settings = Path(scratch) / "pytest.ini"
        settings.write_text("[pytest]\n", encoding="utf-8")
        plain = f"-c {settings} --rootdir {ROOT} --noconftest -p no:cacheprovider --junitxml {report}"
        command = [sys.executable, "-m", "pytest", folder, "-v", "-rs", *plain.split()]
        try:
            code = subprocess.run(command, cwd=ROOT, timeout=limit, check=False).returncode
        except subprocess.TimeoutExpired:
            return {"passed": False, "failures": {"pytest": f"not finished after {limit} s"}}
        if not report.exists():
            return {"passed": False, "failures": {"pytest": f"exit code {code} and no report: is pytest importable?"}}
        return read_report(report, code)


def read_report(report: Path, code: int) -> dict[str, Any]:
    """``run_tests``'s answer from pytest's JUnit file and exit code."""
    outcomes, measured, failures = {}, {}, {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = str(case.get("name"))
        bad = [child.text or "" for child in case if child.tag in ("failure", "error")]
        outcomes[name] = "failed" if bad else "skipped" if case.find("skipped") is not None else "passed"
        if bad:
            failures[name] = bad[0][-1500:]
        figures = {str(p.get("name")): float(str(p.get("value"))) for p in case.iter("property")}
        if figures:
            measured[name] = {key: value if math.isfinite(value) else None for key, value in figures.items()}
    passed = code == 0 and bool(outcomes) and set(outcomes.values()) == {"passed"}
    return {"outcomes": outcomes, "measured": measured, "failures": failures, "passed": passed}


def measure_throughput(config: Config, limit: float = THROUGHPUT_SECONDS) -> dict[str, Any]:
    """The claim's figures, in a process of its own; ``error`` instead where it broke or did not finish."""
    jobs = ("cuda", config, POLICIES, POOL_RANKS, limit / 3, 20)
    try:
        return dict(run_ranks(throughput, 1, *jobs, backend="nccl", timeout=limit)[0])
    except Exception:  # the tests' outcomes must reach the file whatever happens here
        traceback.print_exc()
        return {"error": traceback.format_exc()[-3000:]}


def device_facts() -> dict[str, Any]:
    facts = torch.cuda.get_device_properties(0)
    return {
        "name": facts.name,
        "capability": f"{facts.major}.{facts.minor}",
        "memory_bytes": facts.total_memory,
        "multiprocessors": facts.multi_processor_count,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
    }


def slug(name: str) -> str:
    """``NVIDIA H100 80GB HBM3`` is ``nvidia-h100-80gb-hbm3``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def main() -> None:
    arguments(__doc__).parse_args()
    if not torch.cuda.is_available():
        print("No GPU here (torch sees no CUDA device): nothing was run, measured or claimed.")
        return
    began = time.perf_counter()
    device = device_facts()
    tests = run_tests()
    figures = measure_throughput(load(Config, None, RECIPE))
    result = {
        "device": device,
        "minutes": (time.perf_counter() - began) / 60,
        "tests": tests,
        "recipe": RECIPE,
        "resnet50_224_bf16": figures,
    }
    finish(f"gpu-{slug(device['name'])}", result, save=True)
    sys.exit(0 if tests["passed"] and "error" not in figures else 1)


if __name__ == "__main__":
    main()
