"""The launcher on slurm/dev-cluster: seconds to start, to submit 1,000 runs, steps lost to preemption and a lost node.

    python -m benchmarks.launch_times

Peers, in alternation: torchrun for the seconds until the first step; the three sbatch commands alone, two of them with
as many elements, for the submission of a sweep. It brings the cluster up (as root, with Debian's Slurm) and leaves it.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from benchmarks.harness import arguments, finish

ROOT = Path(__file__).parent.parent
CONF = ROOT / ".dev-cluster" / "slurm.conf"
MODEL = {"projector_hidden": 16, "projection": 8, "predictor_hidden": 16}
TRAIN = {"epochs": 40, "global_batch": 64, "log_every": 1, "threads": 1}
START_BOUND, SUBMIT_BOUND = 2.0, 30.0


def run(*words: str) -> str:
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"SLURM_CONF": str(CONF)})
    if done.returncode:
        sys.exit(f"{' '.join(words)}\n{done.stdout}{done.stderr}")
    return done.stdout


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait(condition: Callable[[], object]) -> None:
    until = time.monotonic() + 400
    while not condition():
        if time.monotonic() > until:
            sys.exit("nothing happened for 400 s; see slurm/dev-cluster status")
        time.sleep(0.1)


class Runs:
    """Runs of a folder, each under a new name."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        run(sys.executable, "-m", "shards.pack", "--recipe", "phantom", "-o", "lesions=200", "--out", f"{folder}/data")
        data = {"manifest": f"{folder}/data/manifest.json", "image_size": 16}
        config = {"folder": f"{folder}/runs", "data": data, "model": MODEL, "train": TRAIN}
        self.config = folder / "tiny.yaml"
        self.config.write_text(yaml.safe_dump(config | {"monitor": {"wandb": "disabled"}}))

    def launch(self, *words: str) -> Path:
        """A run of two ranks on one node of the cluster."""
        self.count += 1
        shape = ("--profile", "dev", "--set", "nodes=1", "--set", "tasks=2")
        run(sys.executable, "-m", "launch.pretrain", str(self.config), f"name=run{self.count}", *shape, *words)
        return self.folder / "runs" / f"run{self.count}"

    def job(self, folder: Path) -> str:
        return str(lines(folder / "submissions.jsonl")[-1]["job"])

    def until_first_step(self) -> float:
        began = time.perf_counter()
        folder = self.launch()
        wait(lambda: lines(folder / "metrics.jsonl"))
        seconds = time.perf_counter() - began
        self.end(folder)
        return seconds

    def until_first_step_of_torchrun(self) -> float:
        self.count += 1
        words = ["torchrun", "--standalone", "--nproc-per-node", "2", "-m", "tracekin.cli", "pretrain"]
        began = time.perf_counter()
        process = subprocess.Popen(
            [*words, str(self.config), f"name=run{self.count}"],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait(lambda: lines(self.folder / "runs" / f"run{self.count}" / "metrics.jsonl"))
        seconds = time.perf_counter() - began
        process.send_signal(signal.SIGTERM)
        process.wait()
        return seconds

    def end(self, folder: Path) -> None:
        run("scancel", self.job(folder))
        wait(lambda: not run("squeue", "--noheader", "--states=R,CG,PD").strip())

    def lost(self, disturb: Callable[[Path], None]) -> dict[str, float]:
        """Steps that a disturbance after 12 steps cost, and seconds until the run made steps again."""
        folder = self.launch()
        wait(lambda: len(lines(folder / "metrics.jsonl")) >= 12)
        disturb(folder)
        began, done = time.perf_counter(), len(lines(folder / "metrics.jsonl"))
        starts = folder / "starts.jsonl"
        wait(lambda: sum(line["event"] == "start" for line in lines(starts)) == 2)
        last = max([done, *(line.get("step", 0) for line in lines(starts) if line["event"] == "end")])
        again = [line["step"] for line in lines(starts) if line["event"] == "start"][1]
        wait(lambda: len(lines(folder / "metrics.jsonl")) > again)
        seconds = time.perf_counter() - began
        self.end(folder)
        return {"steps_lost": last - again, "seconds_to_the_next_step": seconds}

    def submit(self, count: int) -> float:
        """Seconds to submit a sweep of so many runs."""
        self.count += 1
        sweep = self.folder / f"sweep{self.count}.yaml"
        content = {
            "config": str(self.config),
            "folder": str(self.folder / "runs"),
            "grid": {"seed": list(range(count))},
        }
        sweep.write_text(yaml.safe_dump(content))
        began = time.perf_counter()
        run(sys.executable, "-m", "launch.sweep", str(sweep), "--profile", "dev", "--set", "partition=grace")
        return self._cancel_all(time.perf_counter() - began)

    def submit_by_hand(self, count: int) -> float:
        array = ("sbatch", "--parsable", f"--array=0-{count - 1}", "--output=/dev/null", "--wrap", "sleep 600")
        began = time.perf_counter()
        first = run(*array).strip()
        second = run(*array[:-2], f"--dependency=aftercorr:{first}", *array[-2:]).strip()
        run("sbatch", f"--dependency=afterany:{second}", "--output=/dev/null", "--wrap", "true")
        return self._cancel_all(time.perf_counter() - began)

    def _cancel_all(self, seconds: float) -> float:
        run("scancel", "--user=root")
        wait(lambda: not run("squeue", "--noheader", "--states=R,CG,PD").strip())
        return seconds


def preempt(folder: Path) -> None:
    run("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1")


def lose_node(folder: Path) -> None:
    """The node falls silent: its slurmd and step daemons die first, which would tell, then whatever they ran."""
    job = lines(folder / "submissions.jsonl")[-1]["job"]
    node = run("squeue", "--noheader", "--job", job, "--format=%N").strip()
    home = str(CONF.parent / "cwd" / f"slurmd-{node}")
    _kill(lambda process: os.readlink(process / "cwd") == home)
    _kill(lambda process: f"SLURM_JOB_ID={job}".encode() in (process / "environ").read_bytes().split(b"\0"))


def _kill(condition: Callable[[Path], bool]) -> None:
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if condition(process):
                os.kill(int(process.name), signal.SIGKILL)
        except OSError:
            continue


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="starts, and submissions, of each side (%(default)s)")
    parser.add_argument("--count", type=int, default=1000, help="runs of the sweep (%(default)s)")
    options = parser.parse_args()
    run("slurm/dev-cluster", "up", "--nodes", "2")
    if run("squeue", "--noheader"):
        sys.exit("jobs are on the dev cluster, and this cancels all that there are: wait for their end")
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(Path(folder))
        starts = [(runs.until_first_step(), runs.until_first_step_of_torchrun()) for _ in range(options.rounds)]
        sweeps = [(runs.submit(options.count), runs.submit_by_hand(options.count)) for _ in range(options.rounds)]
        preempted = runs.lost(preempt)
        lost = runs.lost(lose_node)
        run("slurm/dev-cluster", "up")
        interval = lines(Path(folder) / "runs" / "run1" / "starts.jsonl")[0]["steps"] // TRAIN["epochs"]
    ours, peer = ([statistics.median(pair[side] for pair in pairs) for pairs in (starts, sweeps)] for side in (0, 1))
    result = {
        "seconds_to_first_step": {"launch": ours[0], "torchrun": peer[0]},
        "seconds_to_submit": {"runs": options.count, "launch": ours[1], "sbatch": peer[1]},
        "preemption": preempted,
        "lost_node": {**lost, "checkpoint_interval": interval},
        "ratio": {"first_step": ours[0] / peer[0], "submission": ours[1] / peer[1]},
    }
    finish("launch_times", result, save=options.save)
    kept = preempted["steps_lost"] == 0 and lost["steps_lost"] <= interval
    sys.exit(not (kept and ours[0] / peer[0] <= START_BOUND and ours[1] <= SUBMIT_BOUND))


if __name__ == "__main__":
    main()
