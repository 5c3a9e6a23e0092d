"""Submit evaluations: ``python -m launch.evaluate RUN... [key=value ...] --profile NAME``."""

from collections.abc import Sequence
from pathlib import Path

import click

from launch import runs, snapshot
from launch.cluster import check_profile, read_profile
from launch.command import run
from launch.job import Job
from launch.pretrain import alive_job
from launch.submit import script, submit
from tracekin.config import EvaluateConfig, UserError, load


@click.command()
@click.argument("arguments", nargs=-1, required=True, metavar="RUN... [KEY=VALUE]...")
@click.option("--profile", "name", default="local", show_default=True, help="A file of slurm/profiles, or a path.")
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="Another value in the profile: cpus=4.")
@click.option("--dry-run", is_flag=True, help="Print the batch script; submit nothing.")
def main(arguments: tuple[str, ...], name: str, changes: Sequence[str], dry_run: bool) -> None:
    """Score the encoders of RUNs (folders): one job each, in one array.

    A run that is still in Slurm is evaluated once it has ended well. KEY=VALUE as
    for tracekin evaluate.
    """
    profile = read_profile(name, changes).of_one_task()
    folders = [Path(argument) for argument in arguments if "=" not in argument]
    overrides = tuple(argument for argument in arguments if "=" in argument)
    if not folders:
        raise UserError("no run folder given; name at least one, for example runs/pretrain.")
    load(EvaluateConfig, None, overrides)
    check_profile(profile)
    waiting = [alive_job(folder, "pretrain") for folder in folders]
    for folder, job in zip(folders, waiting, strict=True):
        if not job and not (folder / "checkpoints" / "latest").is_file():
            raise UserError(f"{folder} has no checkpoint to evaluate and no job in Slurm that would make one.")
    logs = folders[0].parent / "launch" if len(folders) > 1 else folders[0] / "launch"
    awaited = sorted({job.job for job in waiting if job})
    after = ":".join(["afterok", *awaited]) if awaited else ""
    if dry_run:
        code = logs / "code"
        click.echo(script(profile, name="evaluate", logs=logs, code=code, count=len(folders), dependency=after))
        return
    todo = [Job("tracekin.cli", ("evaluate", str(folder), *overrides)) for folder in folders]
    ids = submit(todo, profile, name="evaluate", logs=logs, code=snapshot.take(logs), dependency=after)
    for folder, number in zip(folders, ids, strict=True):
        runs.record(
            folder,
            stage="evaluate",
            job=number,
            profile=name,
            cluster=profile.cluster,
            slurm_conf=profile.slurm_conf,
            logs=str(logs),
            steps=runs.num_steps(folder),
        )
    click.echo(f"{len(ids)} evaluation(s): job {ids[0].partition('_')[0]}; then: tracekin report RUN... --out DIR")


if __name__ == "__main__":
    run(main, "python -m launch.evaluate")
