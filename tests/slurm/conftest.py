"""A real Slurm, slurm/dev-cluster with two nodes: `make slurm-test` runs these tests, `make test` does not."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.data.tiny import make_dataset
from tests.slurm.cluster import ROOT, Cluster, dev_cluster


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes of two processors; ended afterwards, unless they were up before."""
    before = dev_cluster("status").returncode == 0
    started = dev_cluster("up", "--nodes", "2")
    if "missing packages" in started.stderr or "must run as root" in started.stderr:
        pytest.skip(f"no Slurm here: {started.stderr.strip()}")
    assert started.returncode == 0, started.stderr
    folder = tmp_path_factory.mktemp("slurm")
    make_dataset(folder / "data", train=64, val=24, test=24)
    yield Cluster(folder, _copy_checkout(folder / "checkout"))
    if not before:
        assert dev_cluster("down").returncode == 0
        left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
        assert str(ROOT / ".dev-cluster") not in left


def _copy_checkout(folder: Path) -> Path:
    """The code that jobs are submitted from, which a test may edit."""
    listed = subprocess.run(
        [
            "git",
            "ls-files",
            "--cached",
            "--others",
            "--exclude-standard",
            "src",
            "launch",
            "shards",
            "slurm",
            "configs",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (folder / ".venv").symlink_to(sys.prefix)
    return folder
