"""What the tests do to a real cluster: submit, wait, look at run folders, kill."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from tracekin import checkpoint

ROOT = Path(__file__).parent.parent.parent
CONF = ROOT / ".dev-cluster" / "slurm.conf"
SAME = ("step", "epoch", "loss", "loss_byol", "loss_mined", "lr", "tau", "hit_rate", "target_std")
STEPS_PER_EPOCH = 4
PATIENCE = 400


def dev_cluster(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["slurm/dev-cluster", *words], cwd=ROOT, capture_output=True, text=True, check=False)


class Cluster:
    """The dev cluster, a copy of the checkout to submit from, and a folder for what is made."""

    def __init__(self, folder: Path, checkout: Path) -> None:
        self.folder, self.checkout = folder, checkout
        config = {
            "data": {"manifest": str(folder / "data" / "manifest.json"), "image_size": 16, "workers": 1},
            "model": {"projector_hidden": 16, "projection": 8, "predictor_hidden": 16},
            "train": {"epochs": 7, "global_batch": 16, "precision": "fp32", "log_every": 1, "threads": 1},
            "optimiser": {"lr": 0.05},
            "monitor": {"wandb": "disabled"},
        }
        self.config = folder / "tiny.yaml"
        self.config.write_text(yaml.safe_dump(config))
        profile = {
            "slurm_conf": str(CONF),
            "partition": "dev",
            "nodes": 2,
            "minutes": 30,
            "signal_seconds": 60,
            "setup": ["export OMP_NUM_THREADS=1"],
        }
        self.profile = folder / "tiny-site.yaml"
        self.profile.write_text(yaml.safe_dump(profile))

    def run(self, *words: str, code: int = 0) -> str:
        """A program with this cluster's SLURM_CONF; what it printed, once it ended with the code."""
        path = os.environ.get("PYTHONPATH", "")
        environment = os.environ | {"SLURM_CONF": str(CONF), "PYTHONPATH": f"{self.checkout / 'src'}:{path}"}
        done = subprocess.run(words, cwd=self.checkout, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == code, f"{words} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def launch(self, module: str, *words: str, code: int = 0) -> str:
        return self.run(sys.executable, "-m", f"launch.{module}", *words, code=code)

    def pretrain(self, name: str, *words: str) -> tuple[Path, str]:
        """Submit the tiny run under a name; its folder and its job."""
        self.launch("pretrain", str(self.config), f"name={name}", "--profile", str(self.profile), *words)
        folder = self.checkout / "runs" / name
        return folder, lines(folder / "submissions.jsonl")[-1]["job"]

    def sbatch(self, *words: str) -> str:
        return self.run("sbatch", "--parsable", "--output=/dev/null", *words).strip()

    def facts(self, job: str) -> dict[str, str]:
        """What scontrol says of a job."""
        shown = self.run("scontrol", "--oneliner", "show", "job", job)
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def state(self, job: str) -> str:
        return self.facts(job)["JobState"]

    def wait_for(self, what: str, condition: Callable[[], Any], log: Path | None = None) -> Any:
        """Until the condition holds; fails with the queue and the end of a log."""
        until = time.monotonic() + PATIENCE
        while not (found := condition()):
            if time.monotonic() > until:
                queue = self.run("squeue")
                tail = log.read_text()[-3000:] if log and log.exists() else ""
                raise AssertionError(f"waited {PATIENCE} s for {what}\n{queue}\n{tail}")
            time.sleep(0.5)
        return found

    def wait_for_step(self, folder: Path, step: int, start: int = 0) -> None:
        """Until the run has written a step, in its start of this number."""

        def reached() -> bool:
            starts = [line for line in lines(folder / "starts.jsonl") if line["event"] == "start"]
            return len(starts) > start and last_step(folder) >= step

        self.wait_for(f"step {step} of {folder.name}", reached, newest_log(folder))

    def wait_for_end(self, job: str, folder: Path | None = None) -> str:
        """Until the job neither runs nor waits; returns its state."""
        over = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}
        log = newest_log(folder) if folder else None
        state: str = self.wait_for(f"the end of job {job}", lambda: ({self.state(job)} & over or {""}).pop(), log)
        return state

    def take_all_nodes(self) -> str:
        """A job of high priority that needs every node for a moment."""
        return self.sbatch("--partition=high", "--nodes=2", "--exclusive", "--wrap", "srun sleep 3")

    def ranks(self, job: str) -> list[int]:
        """The ranks of a job: Python under task.sh, without loader processes."""
        return [pid for pid in self.pids(job) if "task.sh" in _command(_parent(pid)) and "task.sh" not in _command(pid)]

    def daemons(self, node: str) -> list[int]:
        """A node's slurmd and the step daemons that it started, which would still report that a task died."""
        folder = str(ROOT / ".dev-cluster" / "cwd" / f"slurmd-{node}")
        return [pid for pid in _every_pid() if _folder_of(pid) == folder]

    def pids(self, job: str) -> list[int]:
        """Processes that have the job's number, ``12`` or ``12_3``, in their environment."""
        master, _, element = job.partition("_")
        marks = (
            {f"SLURM_ARRAY_JOB_ID={master}", f"SLURM_ARRAY_TASK_ID={element}"} if element else {f"SLURM_JOB_ID={job}"}
        )
        found = []
        for pid in _every_pid():
            try:
                variables = set(Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0"))
            except OSError:
                continue
            if marks <= variables:
                found.append(pid)
        return found


def lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON lines; none if there is no such file."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def last_step(folder: Path) -> int:
    return max((line["step"] for line in lines(folder / "metrics.jsonl")), default=0)


def starts(folder: Path) -> list[tuple[Any, ...]]:
    """(restart, step at which it began, outcome, cause) of each start; None for a start that was killed."""
    found: list[tuple[Any, ...]] = []
    for line in lines(folder / "starts.jsonl"):
        if line["event"] == "start":
            found.append((line["restart"], line["step"], None, None))
        elif line["outcome"] != "lost":
            found[-1] = (*found[-1][:2], line["outcome"], line["cause"])
    return found


def newest_log(folder: Path) -> Path | None:
    logs = sorted((folder / "launch").glob("*_0_log.out"), key=lambda path: path.stat().st_mtime)
    return logs[-1] if logs else None


def assert_identical(run: Path, other: Path) -> None:
    """Every loss of every step, and every tensor of the last checkpoint."""
    one, two = ([[line[key] for key in SAME] for line in lines(path / "metrics.jsonl")] for path in (run, other))
    assert one == two
    newest = [checkpoint.latest(path) for path in (run, other)]
    for part in ("model", "optimiser"):
        first, second = (checkpoint.load_part(path, part) for path in newest if path)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


def _every_pid() -> list[int]:
    return sorted(int(path.name) for path in Path("/proc").glob("[0-9]*"))


def _folder_of(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/cwd")
    except OSError:
        return ""


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def kill(pids: list[int], number: int = signal.SIGKILL) -> None:
    for pid in pids:
        os.kill(pid, number)
