"""Pack an archive as an array of jobs: ``python -m launch.pack SOURCE --recipe NAME --out DIR --profile P``."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import click

from launch import runs, snapshot
from launch.cluster import check_profile, read_profile
from launch.command import run
from launch.job import Job
from launch.jobs import alive_job
from launch.submit import script, submit
from shards.pack import main as pack
from shards.recipes import RECIPES
from tracekin.config import UserError


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[SOURCE] [OPTION OF shards.pack]...")
@click.option("--recipe", required=True, help="What the source is.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The folder to make.")
@click.option("--slices", default=8, show_default=True, type=click.IntRange(1), help="Jobs that share the shards.")
@click.option("--mapping", help="CSV for the merge to write: key, group and the source's names.")
@click.option("--profile", "name", default="local", show_default=True, help="A file of slurm/profiles, or a path.")
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="Another value in the profile: cpus=16.")
@click.option("--dry-run", is_flag=True, help="Print the batch script; submit nothing.")
def main(
    words: tuple[str, ...],
    recipe: str,
    out: Path,
    slices: int,
    mapping: str | None,
    name: str,
    changes: Sequence[str],
    dry_run: bool,
) -> None:
    """Pack SOURCE with an array of jobs, and join the shards when all are done.

    Options of python -m shards.pack that are not listed here are handed on to it.
    A slice that is preempted or killed goes on where it stopped.
    """
    profile = read_profile(name, changes).of_one_task()
    if profile.cluster != "slurm":
        raise UserError(
            f"profile {name}: cluster={profile.cluster}; without Slurm python -m shards.pack uses all cores."
        )
    if recipe not in RECIPES:
        raise UserError(f"--recipe {recipe} is not known; accepted: {', '.join(RECIPES)}.")
    if words and not words[0].startswith("-") and not Path(words[0]).exists():
        raise UserError(f"there is no source {words[0]}.")
    if (out / "manifest.json").exists() and "--force" not in words:
        raise UserError(f"{out} holds a packed set already; name another --out, or add --force.")
    check_profile(profile)
    logs = out.with_name(f"{out.name}.launch")
    if waiting := alive_job(logs, "merge" if slices > 1 else "pack"):
        click.echo(f"{out} is being packed: job {waiting.job} waits or runs. Nothing is submitted.")
        return
    table = ("--mapping", mapping) if mapping else ()
    ends = (*(["--force"] if "--force" in words else []), *table)
    common = ("--recipe", recipe, "--out", str(out), "--workers", str(profile.cpus))
    parts = [Job("shards.pack", (*words, *common, "--slice", f"{n}/{slices}")) for n in range(slices)]
    if slices == 1:
        parts = [Job("shards.pack", (*words, *common, *table))]
    pack.make_context("shards.pack", list(parts[0].arguments))  # refuses what shards.pack does not know
    if dry_run:
        click.echo(script(profile, name="pack", logs=logs, code=snapshot.place(logs), count=slices))
        return
    logs.mkdir(mode=0o700, exist_ok=True)  # like OUT.packing: an error may name the source's files
    code = snapshot.take(logs)
    send = partial(submit, profile=profile, logs=logs, code=code)
    note = partial(runs.record, logs, profile=name, cluster="slurm", slurm_conf=profile.slurm_conf, logs=str(logs))
    ids = send(parts, name="pack")
    for number in ids:
        note(stage="pack", job=number)
    last = ids[0].partition("_")[0]
    if slices > 1:
        merge = Job("shards.merge", (str(out), *ends))
        (last,) = send([merge], name="merge", dependency=f"afterok:{last}")
        note(stage="merge", job=last)
    click.echo(
        f"{out}: {slices} slice(s), job {ids[0].partition('_')[0]}; the manifest is there once job {last} is done"
    )


if __name__ == "__main__":
    run(main, "python -m launch.pack")
