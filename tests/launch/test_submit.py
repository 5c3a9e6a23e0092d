"""What is handed to sbatch: options, set-up lines, the command. Read, not run: tests/slurm runs it."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from launch.cluster import Profile, read_profile
from launch.job import Job
from launch.submit import script, submit
from tests.launch.recorded import Slurm
from tracekin.config import UserError

CODE = Path("/scratch/run/launch/code-1")


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    found = Slurm(tmp_path, monkeypatch)
    found.says("sbatch", "slurm-wlm 22.05.8\n")
    found.says("srun")
    return found


def written(profile: Profile, **more: object) -> str:
    return script(profile, name="pre", logs=Path("logs"), code=CODE, **more)  # type: ignore[arg-type]


def options(text: str) -> dict[str, str]:
    """The #SBATCH lines: option -> value."""
    lines = [shlex.split(line)[1] for line in text.splitlines() if line.startswith("#SBATCH ")]
    return dict((line.removeprefix("--").partition("=")[::2]) for line in lines)


def command(text: str) -> list[str]:
    """The words of the srun line."""
    (line,) = (line for line in text.splitlines() if line.startswith("srun "))
    return shlex.split(line)


def test_the_a100_example_asks_for_what_it_promises(fake: Slurm) -> None:
    text = written(read_profile("a100"))
    said = options(text)
    assert {key: said[key] for key in ("partition", "account", "constraint", "nodes", "gpus-per-node", "mem")} == {
        "partition": "gpu",
        "account": "my-group",
        "constraint": "a100",
        "nodes": "2",
        "gpus-per-node": "4",
        "mem": "245760M",
    }
    assert (said["ntasks-per-node"], said["cpus-per-task"]) == ("4", "16")
    assert (said["time"], said["signal"], said["job-name"]) == ("1440", "USR2@300", "pre")
    assert said["requeue"] == ""
    assert said["open-mode"] == "append"
    assert "qos" not in said
    assert text.index("module load CUDA/13.0") < text.index("export PYTHONPATH") < text.index("\nsrun ")


def test_the_h100_example_runs_in_its_container(fake: Slurm) -> None:
    text = written(read_profile("h100"))
    said = options(text)
    assert (said["qos"], said["gpus-per-node"], said["ntasks-per-node"]) == ("low", "8", "8")
    words = command(text)
    task = words.index(f"{CODE}/slurm/task.sh")
    assert words[task + 1 : task + 3] == ["apptainer", "exec"]
    assert words[task + 7 : task + 9] == ["python3", "-u"]
    assert text.splitlines()[-1] == "finish $? 200"


def test_a_plain_profile_leaves_to_the_cluster_what_it_does_not_say(fake: Slurm) -> None:
    said = options(written(Profile()))
    assert not {"partition", "account", "qos", "constraint", "gpus-per-node", "mem", "array", "dependency"} & set(said)
    assert not {"kill-on-invalid-dep", "wckey"} & set(said)


def test_srun_ends_all_tasks_with_one_and_appends_to_logs_of_earlier_starts(fake: Slurm) -> None:
    words = command(written(Profile()))
    assert "--kill-on-bad-exit=1" in words
    assert "--open-mode=append" in words
    assert words[words.index("--output") + 1].endswith("/logs/%j_%t_log.out")
    task = words.index(f"{CODE}/slurm/task.sh")
    assert words[task + 1 : task + 5] == [sys.executable, "-u", "-m", "submitit.core._submit"]


def test_the_snapshot_precedes_whatever_else_python_would_find(fake: Slurm) -> None:
    lines = written(Profile(setup=("export A=b",))).splitlines()
    (found,) = (line for line in lines if "PYTHONPATH" in line)
    shell = ["bash", "-c", f'{found}; echo "$PYTHONPATH"']
    for before, after in (("/site/lib", ":/site/lib"), ("", "")):
        done = subprocess.run(shell, env={"PYTHONPATH": before}, capture_output=True, text=True, check=True)
        assert done.stdout == f"{CODE}/src:{CODE}{after}\n"
    assert "export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1" in lines
    order = [lines.index("export A=b"), lines.index(found), lines.index(f"source {CODE}/slurm/job.sh")]
    assert order == sorted(order)
    assert order[-1] < next(n for n, line in enumerate(lines) if line.startswith("srun "))
    assert lines[-1] == "finish $? 50"


def test_a_job_that_can_never_start_is_cancelled(fake: Slurm) -> None:
    said = options(written(Profile(), dependency="aftercorr:12"))
    assert (said["dependency"], said["kill-on-invalid-dep"]) == ("aftercorr:12", "yes")


def test_an_array_and_how_much_of_it_runs_at_a_time(fake: Slurm) -> None:
    assert options(written(Profile(), count=12))["array"] == "0-11%12"
    said = options(written(Profile(), count=12, parallel=3))
    assert said["array"] == "0-11%3"
    assert said["output"].endswith("/%A_%a_0_log.out")


def test_paths_with_spaces_stay_whole(fake: Slurm) -> None:
    text = script(Profile(), name="x", logs=Path("/data/my logs"), code=Path("/data/my logs/code-1"))
    assert "/data/my logs/code-1/slurm/task.sh" in command(text)
    assert "source '/data/my logs/code-1/slurm/job.sh'" in text


def test_one_job_and_an_array_get_their_ids_and_pickles(fake: Slurm, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    fake.says("sbatch", "Submitted batch job 41\n")
    jobs = [Job("tracekin.cli", ("pretrain", f"{n}.yaml")) for n in range(3)]
    profile = Profile(max_restarts=7, slurm_conf=str(tmp_path / "slurm.conf"))
    (tmp_path / "slurm.conf").touch()
    before = dict(os.environ)
    assert submit(jobs[:1], profile, name="x", logs=logs, code=CODE) == ["41"]
    fake.says("sbatch", "Submitted batch job 42\n")
    assert submit(jobs, profile, name="x", logs=logs, code=CODE) == ["42_0", "42_1", "42_2"]
    assert dict(os.environ) == before
    assert all(call.startswith(profile.slurm_conf) for call in fake.calls("sbatch"))

    from submitit.core.utils import DelayedSubmission

    for name in ("41", "42_0", "42_1", "42_2"):
        path = logs / f"{name}_submitted.pkl"
        assert path.stat().st_size < 2000
        assert DelayedSubmission.load(path).function.max_restarts == 7
    assert DelayedSubmission.load(logs / "42_2_submitted.pkl").function.arguments == ("pretrain", "2.yaml")


def test_what_sbatch_says_against_a_job_is_handed_on(fake: Slurm, tmp_path: Path) -> None:
    script = fake.folder / "sbatch"
    script.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exit 0\n'
        "echo 'sbatch: error: Batch job submission failed: Invalid qos specification' >&2\nexit 1\n"
    )
    with pytest.raises(UserError) as caught:
        submit([Job("tracekin.cli", ())], Profile(), name="x", logs=tmp_path / "logs", code=CODE)
    assert str(caught.value) == "sbatch refused x: Batch job submission failed: Invalid qos specification"


def test_without_slurm_there_is_no_batch_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Slurm(tmp_path, monkeypatch)
    assert "2 process(es) on this machine" in written(read_profile("local"))
    with pytest.raises(UserError, match="sbatch is not here"):
        written(Profile())
