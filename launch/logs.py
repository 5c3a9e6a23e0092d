"""What a rank of a job printed: ``python -m launch.logs --help``."""

import os
import re
import sys
import time
from collections import deque
from pathlib import Path
from typing import BinaryIO, NamedTuple

import click

from launch import command, jobs
from launch.jobs import Submitted
from tracekin.config import UserError

NUM_LINES = 100
LOOK = 0.5
"""Seconds between two looks into the file."""
ASK = 5.0
"""Seconds between two questions whether the job is over."""


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80})
@click.argument("name", metavar="JOB|RUN")
@click.option("--rank", type=click.IntRange(0), default=0, show_default=True, help="Whose log.")
@click.option("--follow", "-f", is_flag=True, help="Go on until the job is over, through requeues.")
@click.option("--lines", "-n", type=click.IntRange(0), default=NUM_LINES, show_default=True, help="Last lines to show.")
def logs(name: str, rank: int, follow: bool, lines: int) -> None:
    """Show what a rank of JOB, or of the newest job of RUN that has a log, printed."""
    job = _job_of(name)
    state = _state(job)
    path = _path(job, rank)
    while not path.is_file():
        if not follow or not state.alive:
            raise UserError(_missing(job, rank, state))
        click.echo(f"waiting for {path} (job {job.job} {state.said})", err=True)
        state = _wait_for(path, job, state)
    click.echo(f"{path} (job {job.job}, rank {rank}, {state.said})", err=True)
    with path.open("rb") as file:
        _write(b"".join(deque(file, lines)))
        end = file.tell()
    if follow:
        _follow(path, end, job)


class _State(NamedTuple):
    alive: bool
    said: str
    """As Slurm calls it."""


def _job_of(name: str) -> Submitted:
    """The job itself; of several the newest that has a log, else the newest.

    Raises:
        UserError: nothing of that name, or no job was submitted for it.
    """
    found = jobs.find_jobs([name])
    exact = [job for job in found if job.job == name]
    if exact:
        return exact[-1]
    folders = sorted({job.folder for job in found})
    if len(folders) > 1:
        some = ", ".join(str(folder) for folder in folders[:3])
        raise UserError(f"{name} means {len(folders)} runs; name one of them: {some}{' ...' if folders[3:] else '.'}")
    found.sort(key=lambda job: job.time)
    return next((job for job in reversed(found) if _ranks(job)), found[-1])


def _state(job: Submitted) -> _State:
    known, complaints = jobs.states([job])
    info = known.get(job)
    if info is None:  # who cannot be asked may well run on
        return _State(bool(complaints), complaints[0] if complaints else "state unknown")
    return _State(jobs.is_alive(info), f"{info.state}{f', {info.reason}' if info.reason else ''}")


def _path(job: Submitted, rank: int) -> Path:
    return job.logs / f"{job.job}_{rank}_log.out"


def _ranks(job: Submitted) -> list[int]:
    """The ranks of a job that have a log."""
    pattern = re.compile(rf"{re.escape(job.job)}_(\d+)_log\.out")
    try:
        matches = [pattern.fullmatch(path.name) for path in job.logs.iterdir()]
    except OSError:
        return []
    return sorted(int(match[1]) for match in matches if match)


def _missing(job: Submitted, rank: int, state: _State) -> str:
    ranks = _ranks(job)
    if ranks:
        there = f"{ranks[0]}" if len(ranks) == 1 else f"0 to {ranks[-1]}" if len(ranks) == ranks[-1] + 1 else str(ranks)
        return f"job {job.job} has no rank {rank}; there is {there}."
    hint = "; --follow waits for it" if state.alive else ""
    return f"job {job.job} has no log in {job.logs} ({state.said}){hint}."


def _wait_for(path: Path, job: Submitted, state: _State) -> _State:
    """Return when the log is there, or the job's state has changed."""
    asked = time.monotonic()
    while not path.is_file():
        time.sleep(LOOK)
        if time.monotonic() - asked > ASK:
            now = _state(job)
            if now.said != state.said or now.alive != state.alive:
                return now
            asked = time.monotonic()
    return state


def _follow(path: Path, end: int, job: Submitted) -> None:
    """Print what is appended until the job is over; a file that was replaced or cut is read from its start."""
    file: BinaryIO = path.open("rb")
    file.seek(end)
    state, asked = _state(job), time.monotonic()
    try:
        while True:
            if state.alive and time.monotonic() - asked > ASK:
                state, asked = _state(job), time.monotonic()
            data = file.read()
            if data:
                _write(data)
                continue
            if not state.alive:
                click.echo(f"job {job.job} is over: {state.said}", err=True)
                return
            time.sleep(LOOK)
            file = _reopened(path, file)
    finally:
        file.close()


def _reopened(path: Path, file: BinaryIO) -> BinaryIO:
    """The same file, or the new one of its name."""
    try:
        found = path.stat()
    except OSError:
        return file
    here = os.fstat(file.fileno())
    if (found.st_ino, found.st_dev) == (here.st_ino, here.st_dev) and found.st_size >= file.tell():
        return file
    file.close()
    return path.open("rb")


def _write(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    command.run(logs, "python -m launch.logs")
