"""Cancel what still runs or waits: ``python -m launch.cancel --help``."""

from collections import Counter

import click

from launch import command, jobs
from tracekin.config import UserError


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80})
@click.argument("names", nargs=-1, required=True, metavar="SWEEP|RUN|JOB...")
def cancel(names: tuple[str, ...]) -> None:
    """Cancel all jobs of sweeps and runs, or single jobs, that are not over.

    Of a sweep: its pretraining, its evaluations and its table. A job is an id such as
    12_3; 12 is the whole array. What is done stays: submitting again goes on from
    there.
    """
    submitted = jobs.find_jobs(names)
    known, complaints = jobs.states(submitted)
    if complaints:
        raise UserError(f"nothing was cancelled: {complaints[0]}")
    alive = [job for job in submitted if jobs.is_alive(known.get(job))]
    if not alive:
        click.echo(f"nothing to cancel: {_num(len(submitted), 'job')} of {', '.join(names)}, and none is alive.")
        return
    jobs.cancel(alive)
    states = Counter(known[job].state.lower() for job in alive)
    stages = Counter(job.stage for job in alive)
    click.echo(f"cancelled {_num(len(alive), 'job')} ({_listed(stages)}; {_listed(states)})")
    for folder in sorted({job.folder for job in alive})[:10]:
        ids = [job.job for job in alive if job.folder == folder]
        click.echo(f"  {folder}: {' '.join(ids[:10])}{f' and {len(ids) - 10} more' if len(ids) > 10 else ''}")
    if len({job.folder for job in alive}) > 10:
        click.echo(f"  ... in {len({job.folder for job in alive})} folders")


def _num(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {word}" for word, count in counts.most_common())


if __name__ == "__main__":
    command.run(cancel, "python -m launch.cancel")
