"""python -m launch.cancel and launch.logs, from recorded answers of Slurm."""

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from launch import logs, runs
from launch.cancel import cancel
from tests.launch import recorded
from tests.launch.recorded import Slurm
from tracekin.config import UserError


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logs, "LOOK", 0.05)
    monkeypatch.setattr(logs, "ASK", 0.05)
    found = Slurm(tmp_path, monkeypatch)
    found.says("sacct", recorded.SACCT)
    found.says("squeue", recorded.SQUEUE)
    found.says("scancel")
    return found


def submit(name: str, stage: str, job: str, cluster: str = "slurm") -> Path:
    folder = Path("runs") / name
    runs.record(folder, stage=stage, job=job, cluster=cluster, slurm_conf="", logs=str(folder / "launch"))
    return folder


def write_log(folder: Path, job: str, rank: int, text: str) -> Path:
    path = folder / "launch" / f"{job}_{rank}_log.out"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def call(command: object, *words: str) -> Result:
    return CliRunner().invoke(command, words, standalone_mode=False)  # type: ignore[arg-type]


def test_a_sweep_is_cancelled_with_its_evaluations_and_table(fake: Slurm) -> None:
    for number in (0, 1, 2, 4):
        submit(f"sweeps/demo/{number}", "pretrain", f"2_{number}")
    submit("sweeps/demo/2", "evaluate", "7_2")
    submit("sweeps/demo", "table", "6")
    submit("sweeps/other/0", "pretrain", "2_3")
    done = call(cancel, "demo")
    assert done.exception is None
    assert done.output.startswith("cancelled 4 jobs (2 pretrain, ")
    assert [sorted(line.split("|")[1].split()) for line in fake.calls("scancel")] == [["2_2", "2_4", "6", "7_2"]]


def test_single_jobs_and_whole_arrays(fake: Slurm) -> None:
    for number in (1, 2, 3, 4):
        submit(f"sweeps/demo/{number}", "pretrain", f"2_{number}")
    call(cancel, "2_3")
    call(cancel, "2")
    assert [line.split("|")[1] for line in fake.calls("scancel")] == ["2_3", "2_2 2_3 2_4"]


def test_nothing_alive_is_no_mistake(fake: Slurm) -> None:
    submit("over", "pretrain", "2_1")
    done = call(cancel, "over")
    assert done.exception is None
    assert done.output == "nothing to cancel: 1 job of over, and none is alive.\n"
    assert not fake.calls("scancel")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("demmo", "nothing was submitted as demmo below runs; did you mean runs/sweeps/demo"),
        ("2_77", r"nothing was submitted as job 2_77 below runs; did you mean 2_2\?"),
        ("zzz", "nothing was submitted as zzz below runs; python -m launch.status --all lists what there is"),
    ],
)
def test_unknown_names(fake: Slurm, name: str, message: str) -> None:
    submit("sweeps/demo", "table", "6")
    submit("sweeps/demo/a", "pretrain", "2_2")
    with pytest.raises(UserError, match=message):
        raise call(cancel, "2_2", name).exception or AssertionError("no error")
    assert not fake.calls("scancel")


def test_nothing_is_cancelled_where_slurm_does_not_answer(fake: Slurm) -> None:
    submit("a", "pretrain", "2_2")
    fake.says("squeue", error=recorded.UNREACHABLE, code=1)
    with pytest.raises(UserError, match="nothing was cancelled: squeue: slurm_load_jobs error: Unable to contact"):
        raise call(cancel, "a").exception or AssertionError("no error")
    assert not fake.calls("scancel")


def test_a_job_of_this_machine_is_interrupted(fake: Slurm) -> None:
    code = "import sys, time; print(flush=True); time.sleep(600)"
    with subprocess.Popen(
        [sys.executable, "-c", code, "submitit.local._local"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        submit("here", "pretrain", str(process.pid), cluster="local")
        assert call(cancel, "here").output.startswith("cancelled 1 job")
        assert process.wait(60) != 0
    assert not fake.calls("scancel")


def test_the_log_of_a_rank(fake: Slurm) -> None:
    run = submit("a", "pretrain", "2_1")
    write_log(run, "2_1", 0, "".join(f"line {number}\n" for number in range(500)))
    write_log(run, "2_1", 1, "of rank 1\n")
    assert call(logs.logs, "a", "--lines", "2").stdout == "line 498\nline 499\n"
    assert call(logs.logs, "2_1", "--rank", "1").stdout == "of rank 1\n"
    with pytest.raises(UserError, match=r"job 2_1 has no rank 7; there is 0 to 1\."):
        raise call(logs.logs, "2_1", "--rank", "7").exception or AssertionError("no error")


def test_of_a_run_the_newest_job_that_has_a_log(fake: Slurm) -> None:
    run = submit("a", "pretrain", "2_1")
    submit("a", "pretrain", "9")
    submit("a", "evaluate", "7_2")
    write_log(run, "2_1", 0, "first\n")
    write_log(run, "9", 0, "second\n")
    write_log(run, "9_1", 0, "of another job, whose name begins alike\n")
    done = call(logs.logs, "a")
    assert done.stdout == "second\n"
    assert done.stderr == "runs/a/launch/9_0_log.out (job 9, rank 0, PENDING, BeginTime)\n"


def test_no_log_yet(fake: Slurm) -> None:
    submit("a", "pretrain", "2_4")
    with pytest.raises(UserError, match=r"2_4 has no log .*\(PENDING, JobArrayTaskLimit\); --follow waits for it\."):
        raise call(logs.logs, "a").exception or AssertionError("no error")
    submit("b", "pretrain", "7_1")
    with pytest.raises(UserError, match=r"7_1 has no log .*\(CANCELLED, DependencyNeverSatisfied\)\."):
        raise call(logs.logs, "b", "--follow").exception or AssertionError("no error")


def test_a_name_of_many_runs_is_refused(fake: Slurm) -> None:
    for number in range(5):
        submit(f"sweeps/demo/{number}", "pretrain", f"2_{number}")
    with pytest.raises(UserError, match="demo means 5 runs; name one of them: runs/sweeps/demo/0, "):
        raise call(logs.logs, "demo").exception or AssertionError("no error")


def test_following_through_a_replaced_file_to_the_end_of_the_job(fake: Slurm, tmp_path: Path) -> None:
    run = submit("a", "pretrain", "2_2")
    path = write_log(run, "2_2", 0, "old\nlast\n")
    root = Path(__file__).parents[2]
    code = "from launch import logs; logs.LOOK = logs.ASK = 0.05; logs.logs(['a', '--follow', '-n', '1'])"
    with subprocess.Popen(
        [sys.executable, "-c", code],
        env={"PATH": str(fake.folder), "PYTHONPATH": f"{root}:{root / 'src'}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "last\n"
        with path.open("a") as file:
            file.write("appended\n")
        assert process.stdout.readline() == "appended\n"
        new = tmp_path / "new"
        new.write_text("after the requeue\n")
        new.replace(path)
        assert process.stdout.readline() == "after the requeue\n"
        with path.open("a") as file:
            file.write("the end")
        fake.says("squeue", "2_2|COMPLETED|1|n1|None|0:09|\n")
        assert process.wait(60) == 0
        assert process.stdout.read() == "the end"
        assert process.stderr.read().splitlines()[-1] == "job 2_2 is over: COMPLETED"
