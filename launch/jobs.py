"""Jobs that were submitted for runs: found by name, asked after in Slurm or on this machine, cancelled.

A job of ``--cluster local`` is a process of this machine, and its id is the process id.
"""

import difflib
import os
import re
import signal
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from launch import runs, slurm
from launch.slurm import ALIVE, Info
from tracekin.config import UserError

ROOT = Path("runs")
_OUTCOMES = {
    "finished": "COMPLETED",
    "failed": "FAILED",
    "preempted": "PREEMPTED",
    "interrupted": "CANCELLED",
    "lost": "FAILED",
    "stalled": "FAILED",
}


class Submitted(NamedTuple):
    """A line of a folder's submissions.jsonl."""

    folder: Path
    stage: str
    job: str
    time: str
    cluster: str
    slurm_conf: str
    logs: Path


def submitted(folders: Iterable[Path]) -> list[Submitted]:
    """All jobs submitted for the folders, oldest first in each."""
    return [
        Submitted(
            folder=folder,
            stage=str(line.get("stage", "")),
            job=str(line["job"]),
            time=str(line.get("time", "")),
            cluster=str(line.get("cluster", "slurm")),
            slurm_conf=str(line.get("slurm_conf") or ""),
            logs=Path(line.get("logs") or folder / "launch"),
        )
        for folder in folders
        for line in runs.submissions(folder)
        if "job" in line
    ]


def states(jobs: Collection[Submitted]) -> tuple[dict[Submitted, Info], list[str]]:
    """What is known of each job, one question to each Slurm, unknown jobs absent; and why a Slurm gave no answer."""
    found: dict[Submitted, Info] = {}
    complaints = []
    for conf in sorted({job.slurm_conf for job in jobs if job.cluster == "slurm"}):
        asked = [job for job in jobs if job.cluster == "slurm" and job.slurm_conf == conf]
        try:
            known = slurm.jobs([job.job for job in asked], conf)
        except UserError as error:
            complaints.append(str(error))
            continue
        found.update({job: known[job.job] for job in asked if job.job in known})
    for job in jobs:
        if job.cluster != "slurm":
            found[job] = _local(job)
    return found, complaints


def cancel(jobs: Collection[Submitted]) -> None:
    """Cancel jobs that are alive.

    Raises:
        UserError: Slurm refuses or does not answer.
    """
    for conf in sorted({job.slurm_conf for job in jobs if job.cluster == "slurm"}):
        slurm.cancel([job.job for job in jobs if job.cluster == "slurm" and job.slurm_conf == conf], conf)
    for job in jobs:
        if job.cluster != "slurm" and _is_here(job):
            os.kill(int(job.job), signal.SIGTERM)  # submitit's controller hands it on to the ranks, which save and end


def find_folders(names: Sequence[str], root: Path = ROOT) -> list[Path]:
    """The folders with submissions that names mean: of a run, or of a sweep and all its runs; all without a name.

    A name is a path, or what follows ``runs/`` or ``runs/sweeps/`` in one; a sweep's YAML file means its folder.

    Raises:
        UserError: no such run or sweep; it names what comes near.
    """
    if not names:
        return runs.find_runs(root)
    found: dict[Path, None] = {}
    for name in names:
        folders = _folders_of(name, root)
        if not folders:
            raise UserError(_unknown(name, root))
        found.update(dict.fromkeys(folders))
    return list(found)


def find_jobs(names: Sequence[str], root: Path = ROOT) -> list[Submitted]:
    """The jobs that names mean: a job id (``12`` is also all of 12_0, 12_1, ...), a run or a sweep.

    Raises:
        UserError: no such job, run or sweep.
    """
    found: dict[Submitted, None] = {}
    known: list[Submitted] | None = None
    for name in names:
        jobs = submitted(_folders_of(name, root))
        if not jobs and re.fullmatch(r"\d+(_\d+)?", name):
            known = submitted(runs.find_runs(root)) if known is None else known
            jobs = [job for job in known if job.job == name or job.job.startswith(f"{name}_")]
        if not jobs:
            raise UserError(_unknown(name, root))
        found.update(dict.fromkeys(jobs))
    return list(found)


def _folders_of(name: str, root: Path) -> list[Path]:
    sweep = Path(name).stem if name.endswith(".yaml") else name
    for folder in (Path(name), root / name, root / "sweeps" / sweep, Path(f"{name.rstrip('/')}.launch")):
        if folder.is_dir() and folder != Path("."):
            found = runs.find_runs(folder)
            if found:
                return found
            if (folder / "config.yaml").is_file():
                return [folder]  # a run that nobody submitted has its metrics all the same
    return []


def _unknown(name: str, root: Path) -> str:
    known = runs.find_runs(root)
    ids = [job.job for job in submitted(known)]
    paths = [str(folder) for folder in known]
    names = {path: path for path in paths} | {Path(path).name: path for path in paths} | {job: job for job in ids}
    near = list(dict.fromkeys(names[match] for match in difflib.get_close_matches(name, list(names), 8, 0.5)))[:4]
    hint = f"did you mean {' or '.join(near)}?" if near else "python -m launch.status --all lists what there is."
    kind = f"job {name}" if re.fullmatch(r"\d+(_\d+)?", name) else name
    return f"nothing was submitted as {kind} below {root}; {hint}"


def starts_of(job: Submitted) -> list[dict[str, Any]]:
    """The lines of starts.jsonl that the job wrote, oldest first."""
    names = {job.job} if job.cluster == "slurm" else {job.job, ""}  # a run learns its job's name from Slurm alone
    lines = [line for line in runs.starts(job.folder) if line.get("job") in names]
    if job.cluster == "local":  # the lines of an earlier one look alike
        return [line for line in lines if str(line.get("time", "")) >= job.time]
    return lines


def last_end(job: Submitted) -> dict[str, Any]:
    """How the job's last start ended: of several ranks' lines the one with the cause; {} if it left none."""
    ends: list[dict[str, Any]] = []
    for line in starts_of(job):
        ends = [] if line.get("event") == "start" else [*ends, line]
    return next((line for line in ends if line.get("outcome") == "failed"), ends[-1] if ends else {})


def _local(job: Submitted) -> Info:
    restarts = max(0, sum(line.get("event") == "start" for line in starts_of(job)) - 1)
    state = "RUNNING" if _is_here(job) else _OUTCOMES.get(str(last_end(job).get("outcome", "")), "ENDED")
    return Info(job.job, state, "", restarts, "", "", "")


def _is_here(job: Submitted) -> bool:
    """Whether the controller that submitit started for the job still runs; ids of processes are used again."""
    try:
        words = Path(f"/proc/{int(job.job)}/cmdline").read_bytes()
    except (OSError, ValueError):
        return False
    return b"submitit.local" in words


def alive_job(folder: Path, stage: str) -> Submitted | None:
    """The newest job of this stage for a folder, if it runs or waits.

    Raises:
        UserError: Slurm does not answer.
    """
    newest = [job for job in submitted([folder]) if job.stage == stage][-1:]
    known, complaints = states(newest)
    if complaints:
        raise UserError(complaints[0])
    return newest[0] if newest and is_alive(known.get(newest[0])) else None


def is_alive(info: Info | None) -> bool:
    """Whether the job runs or is still to run, as far as anyone knows."""
    return info is not None and info.state in ALIVE
