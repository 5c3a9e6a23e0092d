"""One harness for every benchmark: alternating pairs, warm-up, median and spread, hardware on record, JSON last.

A benchmark is one file and one claim. It measures its peer or bound in the same run and prints their ratio:

    comparison = compare({"ours": ours, "peer": peer}, pairs=9)
    finish("name", {**comparison, "bound": 1.3})
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from importlib import metadata
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from tracekin.monitor.environment import cpu_name

RESULTS = Path(__file__).parent / "results"
VERSIONS = ("torch", "torchvision", "deepspeed", "numpy", "webdataset", "tracekin")


def seconds(function: Callable[[], object]) -> float:
    """Wall time of one call, the GPU's work included."""
    _synchronise()
    start = time.perf_counter()
    function()
    _synchronise()
    return time.perf_counter() - start


def compare(candidates: Mapping[str, Callable[[], object]], *, pairs: int = 9, warmup: int = 2) -> dict[str, Any]:
    """Time two callables in alternation (A B A B ...), so that a drift of the machine touches both.

    Args:
        candidates: two names and what they run; the first is compared with the second.
        pairs: measured calls of each.
        warmup: unmeasured calls of each.

    Returns:
        For each name the ``summary`` of its seconds; ``ratio``: median of the second over median of the first, so above
        1 the first is faster; ``pair_ratio``: the ``summary`` of the ratios of neighbouring calls.
    """
    (first, run_first), (second, run_second) = candidates.items()
    for _ in range(warmup):
        run_first()
        run_second()
    times = [(seconds(run_first), seconds(run_second)) for _ in range(pairs)]
    times_first, times_second = ([pair[side] for pair in times] for side in (0, 1))
    return {
        first: summary(times_first),
        second: summary(times_second),
        "pair_ratio": summary([b / a for a, b in times]),
        "ratio": statistics.median(times_second) / statistics.median(times_first),
    }


def peak_bytes(function: Callable[[], object]) -> int:
    """Most bytes that a call holds at once beyond what was there before it, as the CPU allocator reports them."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler complains of missing GPUs
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        function()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        found.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    most: int = max(accumulate((change for _, change in changes), initial=0))
    return most


def summary(values: list[float]) -> dict[str, float]:
    """Median, quartiles, extremes and count of ``values``."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {
        "median": statistics.median(values),
        "quartile_low": low,
        "quartile_high": high,
        "min": min(values),
        "max": max(values),
        "count": len(values),
    }


def environment() -> dict[str, Any]:
    """Hardware and versions; never environment variables, which hold keys."""
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {
        "cpu": cpu_name(),
        # The parent's: with OMP_PROC_BIND this thread itself is bound to one core.
        "cores": len(os.sched_getaffinity(os.getppid())) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "gpus": torch.cuda.device_count(),
        "cuda": torch.version.cuda if gpu else None,
        "python": platform.python_version(),
        "system": platform.system(),
        "versions": {name: version for name in VERSIONS if (version := _version(name))},
    }


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options every benchmark has; add more, then ``parse_args``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--save", action="store_true", help=f"also write {RESULTS.name}/NAME.json beside the benchmarks"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (%(default)s)")
    return parser


def finish(name: str, result: Mapping[str, Any], *, save: bool = False, shown: Collection[str] | None = None) -> None:
    """Print the result line by line, then it all as one JSON object on the last line; with ``save`` write it too.

    Args:
        name: the benchmark's name, and its file's.
        result: JSON-like; put the claim's ratio last.
        save: write ``benchmarks/results/NAME.json``.
        shown: keys that get a line, where tables have said the rest; None is all.
    """
    record = {"benchmark": name, "environment": environment(), **result}
    print(f"{name} on {record['environment']['gpu'] or record['environment']['cpu']}")
    for key, value in result.items():
        if shown is not None and key not in shown:
            continue
        print(f"  {key}: {_readable(value)}")
    line = json.dumps(record, allow_nan=False)
    if save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    sys.stdout.flush()
    print(line, flush=True)


def _readable(value: object) -> str:
    if isinstance(value, Mapping) and {"median", "quartile_low", "quartile_high"} <= value.keys():
        return f"{value['median']:.4g} (quartiles {value['quartile_low']:.4g} to {value['quartile_high']:.4g})"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_readable(inner)}" for key, inner in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
