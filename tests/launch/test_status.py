"""python -m launch.status: the table, from recorded answers of Slurm and run folders as runs leave them."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launch import runs
from launch.overview import seconds
from launch.status import draw
from tests.launch import recorded
from tests.launch.recorded import Slurm
from tracekin.config import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    monkeypatch.chdir(tmp_path)
    found = Slurm(tmp_path, monkeypatch)
    found.says("sacct", recorded.SACCT)
    found.says("squeue", recorded.SQUEUE)
    return found


def make_run(name: str, job: str, steps: int = 120, evaluate: str = "", cluster: str = "slurm") -> Path:
    folder = Path("runs") / name
    facts = {"profile": "dev", "slurm_conf": "", "cluster": cluster, "logs": str(folder / "launch")}
    runs.record(folder, stage="pretrain", job=job, steps=steps, **facts)
    if evaluate:
        runs.record(folder, stage="evaluate", job=evaluate, steps=None, **facts)
    (folder / "config.yaml").write_text("seed: 0\n")
    return folder


def train(folder: Path, step: int, age: float = 1.0, seconds_a_step: float = 0.5, saved: bool = False) -> None:
    """Leave what a run leaves that is at ``step`` and wrote its last line ``age`` seconds ago."""
    line: dict[str, Any] = {
        "loss": 0.8125,
        "hit_rate": 0.41,
        "images_per_second": 812.4,
        "step_seconds": seconds_a_step,
    }
    with (folder / "metrics.jsonl").open("w") as file:
        for at in range(10, step + 1, 10):
            file.write(
                json.dumps({"step": at, **line, "time": time.time() - age - (step - at) * seconds_a_step}) + "\n"
            )
        file.write('{"step": 9')  # torn by a kill
    if saved:
        (folder / "checkpoints").mkdir()
        (folder / "checkpoints" / "latest").write_text(f"step-{step:08d}\n")


def start(folder: Path, job: str, restart: int = 0, **end: Any) -> None:
    moment = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(time.time() + 1))
    with (folder / "starts.jsonl").open("a") as file:
        file.write(json.dumps({"event": "start", "job": job, "restart": restart, "time": moment}) + "\n")
        if end:
            file.write(json.dumps({"event": "end", "job": job, "restart": restart, "time": moment, **end}) + "\n")


def line_of(name: str, lines: list[str]) -> list[str]:
    return next(line.split() for line in lines if line.startswith(name))


def test_a_sweep_in_the_middle(fake: Slurm) -> None:
    train(make_run("sweeps/demo/a", "2_0", evaluate="7_0"), 120, saved=True)
    failed = make_run("sweeps/demo/b", "2_1", evaluate="7_1")
    train(failed, 60)
    start(failed, "2_1", outcome="failed", cause="FloatingPointError: the loss is nan at step 60")
    running = make_run("sweeps/demo/c", "2_2", evaluate="7_2")
    train(running, 40, age=3, seconds_a_step=2.0, saved=True)
    make_run("sweeps/demo/d", "2_4")
    runs.record(Path("runs/sweeps/demo"), stage="table", job="6", cluster="slurm", logs="runs/sweeps/demo/launch")
    Path("runs/sweeps/demo/table.md").write_text("")

    lines = draw([], 30)

    assert " ".join(lines[0].split()) == "sweeps/demo job state step loss hit img/s rst age ETA eval"
    assert line_of("a ", lines)[1:8] == ["2_0", "finished", "120/120", "0.812", "0.41", "812", "0"]
    assert line_of("a ", lines)[-1] == "done"
    assert line_of("b ", lines)[1:4] == ["2_1", "failed", "60/120"]
    assert line_of("b ", lines)[-1] == "-"  # it will never be evaluated
    assert line_of("c ", lines)[1:4] == ["2_2", "running", "40/120"]
    assert line_of("c ", lines)[-3:] in (["3s", "3m", "queued"], ["4s", "3m", "queued"])  # 80 steps of 2 s are left
    assert line_of("d ", lines)[1:4] == ["2_4", "pending", "0/120"]
    assert "failed: sweeps/demo/b: FloatingPointError: the loss is nan at step 60" in lines
    assert "waiting: 1 JobArrayTaskLimit" in lines
    assert "table of runs/sweeps/demo: job 6 pending" in lines
    assert set(lines[-2].removeprefix("4 runs: ").split(", ")) == {"1 finished", "1 failed", "1 running", "1 pending"}
    assert lines[-1] == "table: runs/sweeps/demo/table.md"
    assert len(fake.calls("sacct")) == len(fake.calls("squeue")) == 1


def test_only_what_is_named_is_shown(fake: Slurm) -> None:
    make_run("sweeps/one/a", "2_0")
    make_run("sweeps/two/b", "2_1")
    make_run("lone", "3")
    for name in ("two", "sweeps/two", "runs/sweeps/two/", "configs/sweeps/two.yaml", "runs/sweeps/two/b"):
        assert draw([name], 30)[-1] == "1 run: 1 failed"
    assert draw(["lone", "one"], 30)[-1].startswith("2 runs")
    with pytest.raises(UserError, match=r"did you mean runs/lone\?"):
        draw(["lon"], 30)


def test_a_run_that_went_silent_is_stalled(fake: Slurm) -> None:
    fake.says(
        "squeue", "2_2|RUNNING|0|n1|None|1-02:00:00|\n2_3|RUNNING|0|n1|None|1-02:00:00|\n9|RUNNING|1|n1|None|0:30|\n"
    )
    train(make_run("silent", "2_2"), 50, age=400)
    train(make_run("slow", "2_3"), 50, age=400, seconds_a_step=10)  # a line every 100 s
    train(make_run("restarted", "9"), 50, age=400)
    lines = draw([], 30)
    assert line_of("silent", lines)[2] == "stalled"
    assert line_of("slow", lines)[2] == "running"
    assert line_of("restarted", lines)[2] == "running"  # half a minute after its start
    assert "stalled: silent: no metrics for 7m" in lines


def test_a_requeued_run_counts_its_restarts(fake: Slurm) -> None:
    run = make_run("again", "9")
    start(run, "9", outcome="preempted", cause="USR2")
    train(run, 40)
    assert line_of("again", draw([], 30))[1:8] == ["9", "requeued", "40/120", "0.812", "0.41", "812", "1"]


def test_the_cause_of_a_failure_is_that_of_the_rank_that_failed(fake: Slurm) -> None:
    run = make_run("died", "3")
    start(run, "3", outcome="failed", cause="of an earlier start")
    start(run, "3", 1, outcome="failed", cause="OSError: disk full")
    with (run / "starts.jsonl").open("a") as file:
        file.write(json.dumps({"event": "end", "job": "3", "restart": 1, "outcome": "lost", "cause": "a rank"}) + "\n")
    assert "failed: died: OSError: disk full" in draw([], 30)
    make_run("early", "2_1")
    assert "failed: early: exit code 3" in draw([], 30)


@pytest.mark.parametrize(
    ("state", "word"),
    [("TIMEOUT", "timeout"), ("OUT_OF_MEMORY", "no memory"), ("NODE_FAIL", "node lost"), ("COMPLETED", "ended")],
)
def test_a_job_that_ended_short_of_its_run(fake: Slurm, state: str, word: str) -> None:
    fake.says("sacct", f"5|{state}|0:0|n1|None|00:10:00\n")
    fake.says("squeue", error=recorded.SQUEUE_UNKNOWN, code=1)
    train(make_run("short", "5"), 60, saved=True)
    lines = draw([], 30)
    assert word in " ".join(line_of("short", lines))
    assert any(line.startswith(f"{word}: short: ") for line in lines)


def test_without_slurm_the_folders_still_tell(fake: Slurm) -> None:
    fake.says("sacct", error="sacct: error: Connection refused", code=1)
    train(make_run("a", "2_0"), 120, saved=True)
    train(make_run("b", "2_2"), 60)
    lines = draw([], 30)
    assert line_of("a", lines)[2] == "finished"
    assert line_of("b", lines)[2:4] == ["unknown", "60/120"]
    assert "the state of jobs is unknown: sacct: Connection refused" in lines


def test_jobs_of_this_machine_need_no_slurm(fake: Slurm) -> None:
    controller = "import sys, time; print(flush=True); time.sleep(600)"
    with subprocess.Popen(
        [sys.executable, "-c", controller, "submitit.local._local"], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()  # it runs by now
        train(make_run("here", str(process.pid), cluster="local"), 20)
        assert line_of("here", draw([], 30))[2] == "running"
        process.kill()
    start(Path("runs/here"), "", outcome="failed", cause="OSError: disk full")
    assert "failed: here: OSError: disk full" in draw([], 30)
    start(Path("runs/here"), "", 1)  # no end: killed
    assert "failed: here: killed, or it never started" in draw([], 30)
    assert not fake.calls("sacct")


def test_what_runs_is_shown_before_what_is_over(fake: Slurm) -> None:
    train(make_run("old-but-running", "2_2"), 10)
    for number in range(8):
        train(make_run(f"over-{number}", "2_0"), 120, saved=True)
    lines = draw([], 3)
    assert line_of("old-but-running", lines)[2] == "running"
    assert lines[-2] == "6 of 9 runs are left out; --all shows them."
    assert lines[-1] == "9 runs: 8 finished, 1 running"
    assert len(draw([], None)) == 1 + 9 + 1


def test_long_names_numbers_and_causes_fit_80_columns(fake: Slurm) -> None:
    fake.says("sacct", "12345678_1234|RUNNING|0:0|n1|None|00:01:00\n12345678_7|FAILED|1:0|n1|None|00:01:00\n")
    fake.says("squeue", "12345678_1234|RUNNING|0|n1|None|1:00|\n")
    name = "mining.policy=influence-mining.k=16-optimiser.lr=0.0003-seed=12-1a2b3c4d"
    train(
        make_run(f"sweeps/a-sweep-of-many-things/{name}", "12345678_1234", steps=2_000_000, evaluate="12345678_9"), 150
    )
    other = make_run("sweeps/a-sweep-of-many-things/other", "12345678_7", evaluate="12345678_9")
    start(other, "12345678_7", outcome="failed", cause="RuntimeError: " + "a long story " * 30)
    lines = draw([], 30)
    assert max(len(line) for line in lines) <= 80
    assert lines[1].startswith("…")
    assert lines[1].split()[0].endswith("b3c4d")
    assert "150/2000k" in lines[1]


def test_a_packing_is_shown_by_what_its_slices_do(fake: Slurm) -> None:
    for number in range(4):
        runs.record(Path("out.launch"), stage="pack", job=f"2_{number}", cluster="slurm", logs="out.launch")
    runs.record(Path("out.launch"), stage="merge", job="6", cluster="slurm", logs="out.launch")
    lines = draw(["out"], 30)
    assert "pack of out.launch: job 2 1 completed, 1 failed, 2 running" in lines
    assert "merge of out.launch: job 6 pending" in lines


@pytest.mark.parametrize(
    ("written", "value"), [("0:04", 4), ("00:01:04", 64), ("02:00:00", 7200), ("1-02:03:04", 93784), ("", float("inf"))]
)
def test_slurms_durations(written: str, value: float) -> None:
    assert seconds(written) == value


def run_status(*words: str, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}"}
    command = [sys.executable, "-m", "launch.status", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, **options)


def test_the_command(fake: Slurm) -> None:
    nothing = run_status()
    assert (nothing.returncode, nothing.stdout[:26]) == (0, "Nothing was submitted yet;")
    make_run("lone", "3")
    assert run_status("lone").stdout.splitlines()[-1] == "1 run: 1 failed"
    wrong = run_status("lonely")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == "launch: nothing was submitted as lonely below runs; did you mean runs/lone?\n"


def test_watching_ends_quietly(fake: Slurm) -> None:
    make_run("lone", "3")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}"}
    command = [sys.executable, "-m", "launch.status", "--watch", "lone"]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        while process.stdout.readline() != "1 run: 1 failed\n":
            assert process.poll() is None
        process.send_signal(2)
        assert process.wait(60) == 130
        assert process.stderr.read().strip() == ""


def test_nothing_heavy_is_imported() -> None:
    code = "import sys, launch.status, launch.cancel, launch.logs; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    names = {re.split(r"[.]", name)[0] for name in done.stdout.split()}
    assert "launch" in names
    assert not names & {"torch", "deepspeed", "submitit", "numpy", "wandb"}
