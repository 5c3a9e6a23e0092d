"""Submit one pretraining: ``python -m launch.pretrain CONFIG [key=value ...] --profile NAME``."""

from collections.abc import Sequence
from pathlib import Path

import click

from launch import runs, snapshot
from launch.cluster import Profile, check_grace, check_profile, read_profile
from launch.command import run
from launch.job import Job
from launch.jobs import alive_job
from launch.submit import script, submit
from tracekin.config import Config, load, to_yaml
from tracekin.data.manifest import read_manifest
from tracekin.data.order import num_steps_per_epoch, shuffle_of
from tracekin.distributed.world import World
from tracekin.files import write_text
from tracekin.train.checks import check_run


def check_submission(config: Config, profile: Profile, *, allow_change: bool = False) -> int:
    """Check a run against its data, its folder and the ranks that the profile gives it; returns how many steps it has.

    Raises:
        UserError: whatever would end the job at its start.
    """
    manifest = read_manifest(config.data.manifest, complete=False)
    check_run(config, manifest, World(0, profile.num_tasks, 0, profile.tasks_per_node), allow_change=allow_change)
    check_grace(profile, config)
    shuffle = shuffle_of(config.data, config.seed, config.train.global_batch)
    return config.train.epochs * num_steps_per_epoch(manifest.count("train"), shuffle)


def freeze(config: Config, folder: Path) -> str:
    """Write the resolved config beside the run's logs, for its job; returns the path."""
    path = folder / "config.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, to_yaml(config))
    return str(path)


@click.command()
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--profile", "name", default="local", show_default=True, help="A file of slurm/profiles, or a path.")
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="Another value in the profile: nodes=4.")
@click.option("--cluster", type=click.Choice(["slurm", "local", "debug"]), help="Instead of the profile's.")
@click.option("--dry-run", is_flag=True, help="Print batch script and resolved config; submit nothing.")
@click.option("--allow-config-change", is_flag=True, help="Continue a run of another config or dataset.")
def main(
    config: str,
    overrides: tuple[str, ...],
    name: str,
    changes: Sequence[str],
    cluster: str | None,
    dry_run: bool,
    allow_config_change: bool,
) -> None:
    """Submit a pretraining as CONFIG (a YAML file) says; the same command again continues.

    KEY=VALUE overrides CONFIG. The code and the config are frozen into the run
    folder: editing the checkout changes neither a waiting nor a requeued job.
    """
    if cluster == "debug":
        changes = (*changes, "tasks=1", "gpus=0") if not any(c.startswith("gpus") for c in changes) else changes
    profile = read_profile(name, changes, cluster)
    loaded = load(Config, config, overrides)
    steps = check_submission(loaded, profile, allow_change=allow_config_change)
    check_profile(profile)
    folder = loaded.run_folder
    launch = folder / "launch"
    job_name = loaded.name.replace("/", "-")
    if dry_run:
        click.echo(script(profile, name=job_name, logs=launch, code=snapshot.place(launch)))
        click.echo(f"# {launch / 'config.yaml'}\n{to_yaml(loaded)}")
        return
    if runs.last_step(folder) >= steps:
        click.echo(f"{folder} is finished: {steps} steps. Nothing is submitted.")
        return
    if waiting := alive_job(folder, "pretrain"):
        click.echo(f"{folder} has job {waiting.job} waiting or running already. Nothing is submitted.")
        return
    allowed = ("--allow-config-change",) if allow_config_change else ()
    job = Job("tracekin.cli", ("pretrain", freeze(loaded, launch), *allowed))
    code = snapshot.take(launch)
    (number,) = submit([job], profile, name=job_name, logs=launch, code=code)
    runs.record(
        folder,
        stage="pretrain",
        job=number,
        profile=name,
        cluster=profile.cluster,
        slurm_conf=profile.slurm_conf,
        logs=str(launch),
        steps=steps,
    )
    if profile.cluster == "debug":
        return
    click.echo(f"{folder}: job {number}, {steps} steps on {profile.num_tasks} rank(s)")
    click.echo(f"python -m launch.status {folder} · python -m launch.logs {folder} --follow")


if __name__ == "__main__":
    run(main, "launch.pretrain")
