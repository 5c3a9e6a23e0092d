"""The ``tracekin`` command. Thin: torch is imported only once the arguments have proved sound.

Exit codes: 0 done, 1 program error or a training gone wrong, 2 the user's mistake, 3 a newer start of the run took
over, 75 try again (a signal asked for the end and all is saved, or a rank was lost, stalled or drifted), 130
interrupted (all is saved at the first Ctrl-C; a second one ends at once).
"""

import os
import sys
import textwrap
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from tracekin import __version__
from tracekin.config import Config, EvaluateConfig, InfluenceConfig, UserError, load
from tracekin.export import SUFFIXES

OVERRIDES = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
TRY_AGAIN = 75
"""sysexits.h's EX_TEMPFAIL: the same command again goes on."""
INTERRUPTED = 130
"""What shells report of a process that Ctrl-C ended."""
_CODES = {"INT": INTERRUPTED, "USR2": TRY_AGAIN, "TERM": TRY_AGAIN}


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80})
@click.version_option(__version__, prog_name="tracekin")
def cli() -> None:
    """Pretrain an image encoder: BYOL or a sibling (objective.name), with positives mined by influence."""


@cli.command()
@click.argument("config")
@OVERRIDES
@click.option(
    "--allow-config-change", is_flag=True, help="Continue a run of another config or dataset; says what differs."
)
def pretrain(config: str, overrides: tuple[str, ...], allow_config_change: bool) -> Any:
    """Pretrain as CONFIG (a YAML file) says; the same command again continues.

    One process: tracekin pretrain CONFIG. Several: torchrun --nproc-per-node N
    -m tracekin.cli pretrain CONFIG, or srun. Every key and its meaning stands in
    tracekin/config/knobs.py; KEY=VALUE overrides CONFIG: train.epochs=3.
    """
    loaded = load(Config, config, overrides)
    # Known to be wrong in a blink, or after seconds of importing torch and DeepSpeed.
    from tracekin.data.manifest import read_manifest
    from tracekin.distributed.world import world_from_environment
    from tracekin.monitor.sinks import check_login
    from tracekin.train.checks import check_run

    world = world_from_environment()
    manifest = read_manifest(loaded.data.manifest, complete=False)
    check_run(loaded, manifest, world, allow_change=allow_config_change)
    if world.is_main:  # the rank that logs: what others know of a key does not count
        check_login(loaded.monitor)

    from tracekin.train.loop import pretrain as run

    return run(loaded, allow_change=allow_config_change)


@cli.command()
@click.argument("arguments", nargs=-1, required=True, metavar="RUN... [KEY=VALUE]...")
def evaluate(arguments: tuple[str, ...]) -> None:
    """Score the encoders of finished RUNs (folders) with kNN and a linear probe."""
    runs, overrides = _split(arguments)
    config = load(EvaluateConfig, None, overrides)
    for run in runs:
        _require_run(run)

    from tracekin.evaluate.run import evaluate_run
    from tracekin.evaluate.summary import collect
    from tracekin.evaluate.table import table

    for run in runs:
        evaluate_run(run, config)
    click.echo(table(collect(runs)))


@cli.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of summary.json and index.html.")
def report(runs: tuple[Path, ...], out: Path) -> None:
    """Compare evaluated RUNs: one table, summary.json and an HTML page."""
    for run in runs:
        _require_run(run)

    from tracekin.evaluate.table import summarise, table

    click.echo(table(summarise(list(runs), out)))
    click.echo(f"written: {out / 'summary.json'} {out / 'index.html'}")


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@OVERRIDES
@click.option("--split", default="val", show_default=True, help="Split of the images to explain: train, val or test.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Parquet file; its page is beside it.")
def influence(run: Path, overrides: tuple[str, ...], split: str, out: Path) -> None:
    """Name the training images that speak for and against images of RUN.

    For each image of a split: the training images whose loss gradients agree most
    with its own (proponents) and those most opposed (opponents), summed over the
    run's checkpoints (TracInCP). Writes a Parquet table, and beside it an HTML page
    of the pictures. Keys: InfluenceConfig in tracekin/config/knobs.py; for example
    k=20 images=KEY,KEY normalise=false.
    """
    config = load(InfluenceConfig, None, overrides)
    _require_run(run)
    _require_file(out, ".parquet", "; the HTML page gets the same name with .html")
    _require_new(out.with_suffix(".html"))

    from tracekin.evaluate.influence import find_influences, prepare
    from tracekin.evaluate.influence_table import write_influences

    study = prepare(run, split, config)
    for sentence in write_influences(study, find_influences(study), out):
        click.echo(textwrap.fill(sentence, 80))
    click.echo(f"written: {out} {out.with_suffix('.html')}")


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--format", "form", required=True, type=click.Choice(list(SUFFIXES)), help="What is to load it.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="The file; without it RUN/export/NAME-STEP and a suffix. A file that is there is never overwritten.",
)
@click.option("--manifest", help="Where the run's manifest.json lies now, if it moved; its shards are not needed.")
def export(run: Path, form: str, out: Path | None, manifest: str | None) -> None:
    """Write the encoder of RUN's newest checkpoint for use without tracekin.

    It maps normalised images to features, as evaluation does. torchvision: a state
    dict (.pth, its facts beside it in .json). timm: for timm.create_model.
    safetensors: the same weights for whoever reads them. torchscript: a program for
    torch.jit.load. onnx: a program for ONNX Runtime, any batch size. Preprocessing
    and provenance (run, step, data, config, versions) are in the file's metadata;
    the command prints the lines that load it.
    """
    _require_run(run)
    if out is not None:
        _require_file(out, SUFFIXES[form])

    from tracekin.export.formats import described
    from tracekin.export.formats import export as write

    click.echo(described(write(run, form, out, manifest)))


def _split(arguments: tuple[str, ...]) -> tuple[list[Path], list[str]]:
    runs = [Path(argument) for argument in arguments if "=" not in argument]
    if not runs:
        raise UserError("no run folder given; name at least one, for example runs/pretrain.")
    return runs, [argument for argument in arguments if "=" in argument]


def _require_run(run: Path) -> None:
    if not os.path.isfile(run / "config.yaml"):  # Path.is_file raises where a name is too long
        near = ", ".join(sorted(str(p.parent) for p in run.parent.glob("*/config.yaml"))[:8])
        raise UserError(f"{run} is no run folder (it has no config.yaml).{f' Beside it are: {near}.' if near else ''}")


def _require_file(out: Path, suffix: str, more: str = "") -> None:
    """Whether --out names a file that can be made."""
    if out.suffix != suffix:
        raise UserError(f"--out {out} must end in {suffix}{more}.")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}; make it first.")
    _require_new(out)


def _require_new(path: Path) -> None:
    if path.exists():
        raise UserError(f"{path} is there already; remove it or name another file with --out.")


def _speaks_for_its_node() -> bool:
    """The ranks of a node make the same mistake: one of them says so."""
    from tracekin.distributed.world import world_from_environment

    try:
        return world_from_environment().local_rank == 0
    except UserError:
        return True


def call(arguments: Sequence[str]) -> tuple[int, Any]:
    """Run a command line; returns its exit code and what the command returned.

    One clear line for whatever is not a program error, which gets its traceback.
    """
    try:
        outcome = cli.main(list(arguments), prog_name="tracekin", standalone_mode=False)
        return _CODES.get(getattr(outcome, "preempted", ""), 0), outcome
    except UserError as error:
        _say(str(error))
        return 2, None
    except click.ClickException as error:
        error.show()
        return error.exit_code, None
    except (KeyboardInterrupt, click.Abort):
        _say("interrupted; the same command again goes on from what is done.")
        return INTERRUPTED, None
    except Exception as error:
        return _code_of(error), None


def _code_of(error: Exception) -> int:
    """The exit code of an error that is not the user's."""
    if "torch" in sys.modules:
        from tracekin.distributed.collectives import lost_a_rank
        from tracekin.train.errors import DivergedError, DriftError, FencedError

        codes: dict[type[Exception], int] = {FencedError: 3, DivergedError: 1, DriftError: TRY_AGAIN}
        if type(error) in codes:
            _say(str(error))
            return codes[type(error)]
        if lost_a_rank(error):
            traceback.print_exc()
            _say("another process of this run was lost; the same command again goes on from the last checkpoint.")
            return TRY_AGAIN
    traceback.print_exc()
    return 1


def _say(line: str) -> None:
    if _speaks_for_its_node():
        print(f"tracekin: {line}", file=sys.stderr, flush=True)


def main() -> None:
    """Entry point."""
    sys.exit(call(sys.argv[1:])[0])


if __name__ == "__main__":
    main()
