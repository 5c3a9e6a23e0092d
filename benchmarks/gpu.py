"""Every GPU test and claim in one command, in under nine minutes on one H100-class GPU:

    make gpu            (PYTHONPATH=src python3 -m benchmarks.gpu)

It runs the tests of `tests/gpu`, then measures ResNet-50 at 224 px in bf16, 256 images: a step without and with mining
against a synthetic pool of 64 x 256 images, what the training loop computes for its log included; images a second, the
share of the step by phase, and peak memory. The claim: tracin, tracin_cosine, feature, random and oracle add <= 1 % to
the step (`ratio`, the median of mined over plain in alternating pairs); of costlier policies the `price` is printed.
Last, the views that the device finishes itself (data.augment_on=device): >= 10,000 a second at 224 px. All of it goes
into one file, benchmarks/results/gpu-NAME.json. Without a GPU it says so, measures nothing and writes nothing. Exit
code 1: a test failed, a part did not finish, or the bound is missed; the file says which.
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

from benchmarks.augment_throughput import device_throughput
from benchmarks.gpu_throughput import throughput
from benchmarks.harness import arguments, finish
from benchmarks.ranks import run_ranks
from benchmarks.steps import table
from tracekin.config import Config, Policy, load

ROOT = Path(__file__).parent.parent
TEST_SECONDS = 270
THROUGHPUT_SECONDS = 240
TIMED_SHARE = 0.45
"""Of these seconds; imports, DeepSpeed's start, cuDNN's choices and costly policies' least pairs take the rest."""
POOL_RANKS = 64
MOST_PAIRS = 60
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
    jobs = ("cuda", config, POLICIES, POOL_RANKS, TIMED_SHARE * limit, MOST_PAIRS)
    try:
        return dict(run_ranks(throughput, 1, *jobs, backend="nccl", timeout=limit)[0])
    except Exception:  # the tests' outcomes must reach the file whatever happens here
        traceback.print_exc()
        return {"error": traceback.format_exc()[-3000:]}


def measure_views() -> dict[str, Any]:
    """Views a second of the batched photometry; ``error`` instead where it broke."""
    try:
        return device_throughput()
    except Exception:  # as above
        traceback.print_exc()
        return {"error": traceback.format_exc()[-3000:]}


def describe(figures: dict[str, Any]) -> list[str]:
    """Lines for the terminal."""
    if "error" in figures:
        return ["ResNet-50: not measured; the file says why."]
    speed, shares = figures["images_per_second"], figures["share_of_step"]
    lines = [f"{name}: {speed[name]:.0f} images a second; peak {figures['peak_bytes'][name]} bytes" for name in shares]
    return [*lines, *table(figures)]


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
    views = measure_views()
    result = {
        "device": device,
        "minutes": (time.perf_counter() - began) / 60,
        "tests": tests,
        "recipe": RECIPE,
        "resnet50_224_bf16": figures,
        "views_224": views,
    }
    print(*describe(figures), "", sep="\n")
    finish(f"gpu-{slug(device['name'])}", result, save=True, shown=("device", "minutes", "recipe", "views_224"))
    sys.exit(0 if tests["passed"] and figures.get("holds") and views.get("holds") else 1)


if __name__ == "__main__":
    main()
