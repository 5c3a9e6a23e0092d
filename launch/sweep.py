"""Submit a sweep: ``python -m launch.sweep SWEEP.yaml --profile NAME``.

One array of pretrainings, one of evaluations that wait for them element by element, and one job that makes the table.
"""

import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import click

from launch import jobs, runs, snapshot, submit
from launch.cluster import Profile, check_profile, longest_array, read_profile
from launch.command import run
from launch.grid import Element, SweepConfig, describe, elements, read_plan, read_sweep, sweep_folder, write_plan
from launch.job import Job
from launch.jobs import alive_job
from launch.plan import Run, Todo, find_todo, submit_runs
from launch.pretrain import check_submission, freeze
from launch.status import NUM_SHOWN, draw
from launch.table import collect_table
from tracekin.config import EvaluateConfig, UserError, load, to_yaml

POLL_SECONDS = 5


@click.command()
@click.argument("file")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--profile", "name", required=True, help="A file of slurm/profiles, or a path.")
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="Another value in the profile: nodes=4.")
@click.option("--dry-run", is_flag=True, help="Print elements, batch script and one config; submit nothing.")
@click.option("--wait", is_flag=True, help="Show the status until the table is there.")
def main(
    file: str, overrides: tuple[str, ...], name: str, changes: Sequence[str], dry_run: bool, wait: bool
) -> int | None:
    """Submit what is missing of the sweep that FILE describes.

    KEY=VALUE overrides FILE: grid.seed=[0,1,2] parallel=8. A run is named after
    what it computes, so the same sweep again starts only what is missing or failed.
    """
    profile = read_profile(name, changes)
    if profile.cluster != "slurm":
        raise UserError(
            f"profile {name} has cluster={profile.cluster}; a sweep needs Slurm (slurm/dev-cluster is one)."
        )
    sweep = read_sweep(file, overrides)
    every = elements(sweep)
    folder = sweep_folder(sweep)
    for each in (profile, profile.of_one_task()):
        check_profile(each)
    steps = _check_elements(every, profile)
    planned = [_run_of(element, number) for element, number in steps]
    todo = find_todo(planned, load(EvaluateConfig, None, sweep.evaluate))
    if dry_run:
        _show(sweep, every, todo, profile)
        return None
    _submit(sweep, every, todo, profile, name)
    return _watch(folder) if wait else None


def _run_of(element: Element, steps: int) -> Run:
    folder = element.config.run_folder
    return Run(folder, str(folder / "launch" / "config.yaml"), steps, element.config.data.manifest)


def _check_elements(every: Sequence[Element], profile: Profile) -> list[tuple[Element, int]]:
    """The elements and their numbers of steps; what does not depend on the seed is the same for many of them."""
    known: dict[object, int] = {}
    found = []
    for element in every:
        alike = replace(element.config, seed=0, name="any")
        fresh = not (element.config.run_folder / "config.yaml").exists()
        if alike not in known or not fresh:
            try:
                known[alike] = check_submission(element.config, profile)
            except UserError as error:
                raise UserError(f"{describe(element.assignment)}: {error}") from None
        found.append((element, known[alike]))
    return found


def _submit(sweep: SweepConfig, every: Sequence[Element], todo: Todo, profile: Profile, name: str) -> None:
    folder, began = sweep_folder(sweep), time.monotonic()
    write_plan(folder, sweep, every)
    waiting = alive_job(folder, "table")
    if todo.is_empty and (waiting if todo.alive else not _table_is_old(folder, every)):
        rest = f"{len(every) - todo.finished} in Slurm" if todo.alive else f"the table is {folder / 'table.md'}"
        click.echo(f"{folder}: {todo.finished} of {len(every)} runs are finished, {rest}. Nothing is submitted.")
        return
    _write_configs(every, todo)
    logs = folder / "launch"
    send = partial(_send, sweep=sweep, logs=logs, code=snapshot.take(logs))
    note = partial(runs.record, profile=name, cluster="slurm", slurm_conf=profile.slurm_conf, logs=str(logs))
    count, awaited = Counter[str](), set(todo.alive)
    for stage, one, job in submit_runs(todo, profile, sweep.evaluate, longest_array(profile), send):
        note(one.folder, stage=stage, job=job, steps=one.steps)
        count[stage] += 1
        awaited.add(job)
    if waiting:
        jobs.cancel([waiting])  # it waits for other jobs than the new one
    after = ":".join(["afterany", *sorted({job.partition("_")[0] for job in awaited})]) if awaited else ""
    (job,) = send("table", [Job("launch.table", (str(folder), "--publish"))], profile.of_one_task(), after)
    note(folder, stage="table", job=job, steps=None)
    click.echo(
        f"{folder}: {len(every)} runs; submitted {count['pretrain']} trainings, {count['evaluate']} evaluations and the"
        f" table in {time.monotonic() - began:.1f} s"
    )


def _table_is_old(folder: Path, every: Sequence[Element]) -> bool:
    """Whether an evaluation or the plan was written after the table, or there is no table."""
    table = folder / "table.md"
    if not table.is_file():
        return True
    found = [path for element in every for path in (element.config.run_folder / "evaluations").glob("*.json")]
    return any(path.stat().st_mtime > table.stat().st_mtime for path in (*found, folder / "elements.json"))


def _write_configs(every: Sequence[Element], todo: Todo) -> None:
    configs = {element.config.run_folder: element.config for element in every}
    for one in todo.train:
        freeze(configs[one.folder], one.folder / "launch")


def _send(
    stage: str, those: Sequence[Job], profile: Profile, dependency: str, *, sweep: SweepConfig, logs: Path, code: Path
) -> list[str]:
    name = f"{sweep.name}-{stage}"
    return submit.submit(
        those, profile, name=name, logs=logs, code=code, dependency=dependency, parallel=sweep.parallel
    )


def _show(sweep: SweepConfig, every: Sequence[Element], todo: Todo, profile: Profile) -> None:
    """What would be submitted."""
    logs = sweep_folder(sweep) / "launch"
    code = snapshot.place(logs)
    for element in every:
        click.echo(f"{element.name}: {describe(element.assignment)}")
    later = len(todo.evaluate_now) + sum(map(len, todo.evaluate_after.values()))
    click.echo(
        f"# {len(every)} runs, {todo.finished} finished; to submit: {len(todo.train)} trainings,"
        f" {len(todo.train) + later} evaluations"
    )
    if todo.train:
        name, count = f"{sweep.name}-pretrain", len(todo.train)
        click.echo(submit.script(profile, name=name, logs=logs, code=code, count=count, parallel=sweep.parallel))
        first = next(element for element in every if element.config.run_folder == todo.train[0].folder)
        click.echo(f"# {todo.train[0].config}\n{to_yaml(first.config)}")


def _watch(folder: Path) -> int:
    """Show the status until the table's job has ended; returns 0 if every run is finished and evaluated, else 1."""
    shown = ""
    while True:
        lines = draw([str(folder)], None if not sys.stdout.isatty() else NUM_SHOWN)
        if sys.stdout.isatty():
            click.echo("\x1b[2J\x1b[H" + "\n".join(lines))
        elif lines[-1] != shown:  # the counts, not every step
            click.echo("\n".join([*lines, ""]))
            shown = lines[-1]
        if not alive_job(folder, "table"):
            break
        time.sleep(POLL_SECONDS)
    click.echo(collect_table(folder, publish=False))
    click.echo(f"written: {folder / 'table.csv'} {folder / 'table.md'} {folder / 'table.html'}")
    _, planned = read_plan(folder)
    return 0 if all(runs.is_finished(p.run) and list((p.run / "evaluations").glob("*.json")) for p in planned) else 1


if __name__ == "__main__":
    run(main, "launch.sweep")
