"""The job that submitit pickles: small, without torch, and ending as its command line ends."""

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from launch.job import Job
from tests.launch.recorded import Slurm
from tracekin import cli

PRETRAIN = Job("tracekin.cli", ("pretrain", "c.yaml"), max_restarts=3)


class Outcome(NamedTuple):
    """As tracekin.train.loop's."""

    preempted: str


@pytest.fixture
def slurm_task(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The variables of rank 0 of two, in Slurm."""
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SUBMITIT_", "RANK", "WORLD"))]:
        monkeypatch.delenv(name)
    for name, value in {"EXECUTOR": "slurm", "FOLDER": str(tmp_path)}.items():
        monkeypatch.setenv(f"SUBMITIT_{name}", value)
    for name, value in {"JOB_ID": "12", "NTASKS": "2", "PROCID": "0", "LOCALID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)


@pytest.fixture
def handlers() -> Iterator[None]:
    """Gives this process its handlers back."""
    numbers = (signal.SIGUSR2, signal.SIGTERM, signal.SIGCONT)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def ends_with(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Any], None]:
    """Makes tracekin's command lines end with a code and a result."""

    def ends(code: int, outcome: Any = None) -> None:
        monkeypatch.setattr(cli, "call", lambda arguments: (code, outcome))

    return ends


def with_submitits_handlers() -> None:
    """Install what submitit installs in a task before it calls the job."""
    from submitit.core.utils import DelayedSubmission
    from submitit.slurm.slurm import SlurmJobEnvironment

    submission = DelayedSubmission(PRETRAIN)
    submission.set_timeout(60, 10**9)
    environment = SlurmJobEnvironment()
    environment._handle_signals(environment.paths, submission)


def handled_by(record: list[int]) -> Any:
    return lambda number, frame: record.append(number)


def test_a_job_is_pickled_small_and_read_without_torch(tmp_path: Path) -> None:
    data = pickle.dumps(PRETRAIN)
    assert len(data) < 2000
    path = tmp_path / "job.pkl"
    path.write_bytes(data)
    probe = (
        "import pickle, sys; j = pickle.load(open(sys.argv[1], 'rb')); print(j.max_restarts, 'torch' in sys.modules)"
    )
    words = [sys.executable, "-c", probe, str(path)]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout.split() == ["3", "False"]


@pytest.mark.parametrize("code", [1, 2, 3, 75, 130])
def test_a_run_that_does_not_succeed_ends_the_task_with_its_code(
    slurm_task: None, ends_with: Callable[..., None], code: int
) -> None:
    ends_with(code)
    with pytest.raises(SystemExit) as ended:
        PRETRAIN()
    assert ended.value.code == code


def test_a_run_that_succeeds_returns(slurm_task: None, ends_with: Callable[..., None]) -> None:
    ends_with(0, Outcome(""))
    PRETRAIN()


def test_what_the_task_runs_is_the_command_line_itself(slurm_task: None, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        Job("tracekin.cli", ("pretrain", "absent.yaml"))()
    assert ended.value.code == 2
    assert "absent.yaml" in capfd.readouterr().err


@pytest.mark.parametrize(("body", "code"), [("sys.exit(4)", 4), ("sys.exit(0)", None), ("pass", None)])
def test_another_module_runs_with_its_arguments(
    slurm_task: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, code: int | None
) -> None:
    seen = tmp_path / "seen"
    (tmp_path / "some_module.py").write_text(
        f"import sys\nopen({str(seen)!r}, 'w').write(repr(sys.argv[1:]))\n{body}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["before"])
    job = Job("some_module", ("a b", "--x"))
    if code is None:
        job()
    else:
        with pytest.raises(SystemExit) as ended:
            job()
        assert ended.value.code == code
    assert seen.read_text() == "['a b', '--x']"


@pytest.mark.usefixtures("slurm_task", "handlers")
def test_usr2_is_handed_to_the_handler_that_was_there_before(ends_with: Callable[..., None]) -> None:
    calls: list[int] = []
    signal.signal(signal.SIGUSR2, handled_by(calls))
    ends_with(75, Outcome("USR2"))
    with pytest.raises(SystemExit) as ended:
        PRETRAIN()
    assert ended.value.code == 75
    assert calls == [signal.SIGUSR2]


@pytest.mark.usefixtures("slurm_task", "handlers")
def test_term_is_not(ends_with: Callable[..., None]) -> None:
    calls: list[int] = []
    for number in (signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, handled_by(calls))
    ends_with(75, Outcome("TERM"))
    with pytest.raises(SystemExit) as ended:
        PRETRAIN()
    assert ended.value.code == 75
    assert calls == []


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("refused", [False, True])
@pytest.mark.usefixtures("slurm_task", "handlers")
def test_submitits_own_handler_requeues_on_rank_0_and_a_refusal_hides_nothing(
    ends_with: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: str, refused: bool
) -> None:
    from submitit.core.utils import DelayedSubmission

    monkeypatch.setenv("SLURM_PROCID", rank)
    fake = Slurm(tmp_path, monkeypatch)
    fake.says("scontrol", error="Job is pending execution for job 12" if refused else "", code=int(refused))
    with_submitits_handlers()
    ends_with(75, Outcome("USR2"))
    with pytest.raises(SystemExit) as ended:
        PRETRAIN()
    assert fake.calls("scontrol") == (["|requeue 12"] if rank == "0" else [])
    assert ended.value.code == (-1 if rank == "0" and not refused else 75)  # -1: submitit's, the job is requeued
    if rank == "0":
        assert DelayedSubmission.load(tmp_path / "12_submitted.pkl").function == PRETRAIN


@pytest.mark.parametrize(("restarts", "again"), [(None, True), ("2", True), ("3", False), ("4", False)])
def test_our_cap_rules_submitit(monkeypatch: pytest.MonkeyPatch, restarts: str | None, again: bool) -> None:
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    if restarts:
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    delayed = PRETRAIN.checkpoint()
    assert (delayed is not None) is again
    if delayed:
        assert delayed.function == PRETRAIN


@pytest.mark.usefixtures("slurm_task", "handlers")
def test_at_the_cap_submitit_requeues_nothing_and_the_code_stays(
    ends_with: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    fake = Slurm(tmp_path, monkeypatch)
    fake.says("scontrol")
    with_submitits_handlers()
    ends_with(75, Outcome("USR2"))
    with pytest.raises(SystemExit) as ended:
        PRETRAIN()
    assert ended.value.code == 75  # and the batch script says how many restarts there were
    assert fake.calls("scontrol") == []


@pytest.mark.usefixtures("slurm_task", "handlers")
def test_in_a_container_without_scontrol_the_requeue_is_left_to_the_batch_script(
    ends_with: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Slurm(tmp_path, monkeypatch)  # no program at all
    with_submitits_handlers()
    ends_with(75, Outcome("USR2"))
    with pytest.raises(SystemExit) as ended:
        PRETRAIN()
    assert ended.value.code == 75
    assert "scontrol" in capsys.readouterr().out


@pytest.mark.parametrize("tasks", [1, 2])
def test_tasks_that_submitit_starts_here_learn_their_rank(
    monkeypatch: pytest.MonkeyPatch, slurm_task: None, ends_with: Callable[..., None], tasks: int
) -> None:
    local = {"JOB_ID": "31234", "NTASKS": str(tasks), "JOB_NUM_NODES": "1", "NODEID": "0"}
    local |= {"GLOBALID": str(tasks - 1), "LOCALID": str(tasks - 1)}
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
    for name, value in local.items():
        monkeypatch.setenv(f"SUBMITIT_LOCAL_{name}", value)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name in names:
        monkeypatch.setenv(name, "")  # so that what the job sets is undone
        monkeypatch.delenv(name)
    ends_with(0)
    PRETRAIN()
    found = [os.environ.get(name) for name in names]
    assert found == (["1", "2", "1", "2", "127.0.0.1", "21234"] if tasks == 2 else [None] * 6)
