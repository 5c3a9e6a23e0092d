"""Hand jobs to Slurm, or to this machine, through submitit."""

import contextlib
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from launch import slurm
from launch.cluster import Profile
from launch.job import Job
from tracekin.config import UserError


def submit(
    jobs: Sequence[Job], profile: Profile, *, name: str, logs: Path, code: Path, dependency: str = "", parallel: int = 0
) -> list[str]:
    """Submit jobs that look alike: one, or an array.

    Args:
        jobs: no more than Slurm's MaxArraySize.
        profile: what each of them gets.
        name: shown by squeue.
        logs: submitit's folder: logs, pickles and the batch script.
        code: a snapshot's folder, from which the jobs run.
        dependency: as sbatch takes it; a job whose dependency can never be met is cancelled.
        parallel: elements that run at the same time at most; 0 sets no limit.

    Returns:
        The job's id, or the ids of the array's elements (``12_0``, ``12_1``, ...), in order.

    Raises:
        UserError: sbatch refused.
    """
    executor = make_executor(profile, name=name, logs=logs, code=code, dependency=dependency, parallel=parallel)
    ready = [replace(job, max_restarts=profile.max_restarts) for job in jobs]
    logs.mkdir(parents=True, exist_ok=True)
    with _environment(profile, code):
        try:
            with executor.batch():
                submitted = [executor.submit(job) for job in ready]
        except (RuntimeError, OSError, subprocess.SubprocessError) as error:
            said = [line for line in str(error).splitlines() if "error:" in line] or str(error).splitlines()[-1:]
            raise UserError(f"sbatch refused {name}: {' '.join(said).replace('sbatch: error: ', '')}") from None
    if profile.cluster == "debug":
        for job in submitted:
            job.results()
    return [job.job_id for job in submitted]


def script(
    profile: Profile, *, name: str, logs: Path, code: Path, count: int = 1, dependency: str = "", parallel: int = 0
) -> str:
    """The batch script that ``submit`` would hand to sbatch for ``count`` jobs."""
    if profile.cluster != "slurm":
        return f"# cluster={profile.cluster}: {profile.num_tasks} process(es) on this machine, no batch script\n"
    executor = make_executor(profile, name=name, logs=logs, code=code, dependency=dependency, parallel=parallel)
    if count > 1:
        executor.parameters["map_count"] = count
    text: str = executor._make_submission_file_text(executor._submitit_command_str, "")
    return text


def make_executor(
    profile: Profile, *, name: str, logs: Path, code: Path, dependency: str = "", parallel: int = 0
) -> Any:
    """The executor of submitit for a profile."""
    import submitit

    if profile.cluster == "debug":
        return submitit.DebugExecutor(logs.absolute())
    if profile.cluster == "local":
        executor: Any = submitit.LocalExecutor(logs.absolute())
        executor.update_parameters(
            nodes=1,
            tasks_per_node=profile.tasks_per_node,
            gpus_per_node=profile.gpus,
            timeout_min=profile.minutes,
            signal_delay_s=profile.signal_seconds,
            stderr_to_stdout=True,
        )
        return executor
    slurm.command(["sbatch", "--version"], profile.slurm_conf)  # one clear message where it is missing
    python = f"{profile.container} python3" if profile.container else shlex.quote(sys.executable)
    # Times out as often as it likes: max_restarts is what counts, in Job.checkpoint and in the batch script.
    executor = submitit.SlurmExecutor(
        logs.absolute(), max_num_timeout=10**9, python=f"{shlex.quote(str(code / 'slurm' / 'task.sh'))} {python}"
    )
    memory = profile.memory_gb * profile.tasks_per_node
    optional = {
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "constraint": profile.constraint,
        "gpus_per_node": profile.gpus,
        "mem": f"{int(memory * 1024)}M" if memory else "",
        "dependency": dependency,
    }
    executor.update_parameters(
        job_name=name,
        nodes=profile.nodes,
        ntasks_per_node=profile.tasks_per_node,
        cpus_per_task=profile.cpus,
        time=profile.minutes,
        signal_delay_s=profile.signal_seconds,
        wckey=None,
        stderr_to_stdout=True,
        array_parallelism=parallel or 10**6,
        srun_args=["--kill-on-bad-exit=1", "--open-mode=append"],
        setup=[
            *profile.setup,
            f"export PYTHONPATH={shlex.quote(_python_path(code))}${{PYTHONPATH:+:$PYTHONPATH}}",
            "export PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1",
            f"source {shlex.quote(str(code / 'slurm' / 'job.sh'))}",
        ],
        teardown=[f"finish $? {profile.max_restarts}"],
        additional_parameters={"requeue": True, **({"kill-on-invalid-dep": "yes"} if dependency else {})},
        **{key: value for key, value in optional.items() if value},
    )
    return executor


def _python_path(code: Path) -> str:
    """With PYTHONSAFEPATH, which keeps the checkout in the working directory out, the snapshot is what is imported."""
    return f"{code / 'src'}:{code}"


@contextlib.contextmanager
def _environment(profile: Profile, code: Path) -> Iterator[None]:
    """The variables with which sbatch, or this machine's processes, start; the old ones come back."""
    changed = {"SLURM_CONF": profile.slurm_conf} if profile.slurm_conf else {}
    if profile.cluster == "local":
        changed = {"PYTHONPATH": _python_path(code), "PYTHONSAFEPATH": "1"}
    before = {key: os.environ.get(key) for key in changed}
    os.environ |= changed
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value
