"""Submit evaluations: ``python -m launch.evaluate RUN... [key=value ...] --profile NAME``."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import click

from launch import runs, snapshot
from launch.cluster import Profile, check_profile, longest_array, read_profile
from launch.command import run
from launch.job import Job
from launch.jobs import alive_job
from launch.plan import Run, Todo, submit_runs
from launch.submit import script, submit
from tracekin.config import EvaluateConfig, UserError, load


@click.command()
@click.argument("arguments", nargs=-1, required=True, metavar="RUN... [KEY=VALUE]...")
@click.option("--profile", "name", default="local", show_default=True, help="A file of slurm/profiles, or a path.")
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="Another value in the profile: cpus=4.")
@click.option("--dry-run", is_flag=True, help="Print the batch script; submit nothing.")
def main(arguments: tuple[str, ...], name: str, changes: Sequence[str], dry_run: bool) -> None:
    """Score the encoders of RUNs (folders), one job each.

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
    todo = _find_todo(folders, profile)
    count = len(todo.evaluate_now) + sum(map(len, todo.evaluate_after.values()))
    logs = folders[0].parent / "launch" if len(folders) > 1 else folders[0] / "launch"
    if dry_run:
        shown = partial(script, profile, name="evaluate", logs=logs, code=snapshot.place(logs))
        if todo.evaluate_now:
            click.echo(shown(count=len(todo.evaluate_now)))
        for job, those in todo.evaluate_after.items():
            click.echo(shown(count=len(those), dependency=f"afterok:{job}"))
        return
    if todo.is_empty:
        click.echo("Each of them has an evaluation waiting or running. Nothing is submitted.")
        return
    code = snapshot.take(logs)
    longest = longest_array(profile) if profile.cluster == "slurm" else count

    def send(stage: str, jobs: Sequence[Job], one: Profile, dependency: str) -> list[str]:
        return submit(jobs, one, name=stage, logs=logs, code=code, dependency=dependency)

    note = partial(runs.record, profile=name, cluster=profile.cluster, slurm_conf=profile.slurm_conf, logs=str(logs))
    for stage, one, job in submit_runs(todo, profile, overrides, longest, send):
        note(one.folder, stage=stage, job=job, steps=one.steps or None)
    click.echo(f"{count} evaluation(s) submitted; then: tracekin report RUN... --out DIR")


def _find_todo(folders: Sequence[Path], profile: Profile) -> Todo:
    """The runs to score now, and those whose training they wait for.

    Raises:
        UserError: a run without checkpoint that nobody trains, or whose training this profile cannot wait for.
    """
    todo = Todo()
    for folder in folders:
        one = Run(folder, "", runs.num_steps(folder) or 0, "")
        training = alive_job(folder, "pretrain")
        if training and (training.cluster, profile.cluster) != ("slurm", "slurm"):
            raise UserError(
                f"{folder} is still being trained (job {training.job}, {training.cluster}), and cluster="
                f"{profile.cluster} cannot wait for it; evaluate it when it is finished."
            )
        if not training and not (folder / "checkpoints" / "latest").is_file():
            raise UserError(f"{folder} has no checkpoint to evaluate and no job in Slurm that would make one.")
        if alive_job(folder, "evaluate"):
            continue
        if training:
            todo.evaluate_after.setdefault(training.job, []).append(one)
        else:
            todo.evaluate_now.append(one)
    return todo


if __name__ == "__main__":
    run(main, "python -m launch.evaluate")
