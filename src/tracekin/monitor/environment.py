"""What a result depends on: versions, code and hardware. Never environment variables."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("tracekin", "torch", "torchvision", "deepspeed", "webdataset", "wandb", "numpy", "pillow", "scikit-learn")


def environment(world_size: int, device: torch.device, zero_stage: int) -> dict[str, Any]:
    """Facts for environment.json, JSON values only."""
    return {
        "world_size": world_size,
        "engine": "deepspeed",
        "zero_stage": zero_stage,
        "device": device.type,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": sys.version.split()[0],
        "platform": platform.platform(terse=True),
        "git_sha": git_sha(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def git_sha() -> str | None:
    """The checkout's commit, with ``-dirty`` if tracked files differ from it; None outside a checkout.

    A snapshot of launch/snapshot.py has it in its file REVISION: git would tell what the checkout is at by now.
    """
    here = Path(__file__).parent
    frozen = here.parents[2] / "REVISION"
    if frozen.is_file():
        return frozen.read_text(encoding="ascii").strip()
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty"], cwd=here, capture_output=True, text=True
        )
    except OSError:
        return None
    return run.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
