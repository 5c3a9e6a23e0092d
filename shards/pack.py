"""Pack a folder or zip of images into WebDataset tars and a manifest: ``python -m shards.pack --help``."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from PIL import Image
from tqdm import tqdm

from shards.job import pack_shards, read_entry
from shards.lists import check_mapping
from shards.merge import Ending, join, tell, tell_missing
from shards.plan import Plan, Settings, make_plan
from shards.pseudonym import read_secret
from shards.recipes import RECIPES
from shards.workers import usable_cores
from shards.workfolder import WorkFolder, check_out
from tracekin.config import UserError
from tracekin.data.manifest import Manifest, read_manifest

DRAWN_SECRET = b"tracekin draws these images itself"


def pack(
    source: Path | None,
    recipe: str,
    out: Path,
    settings: Settings,
    options: tuple[str, ...] = (),
    workers: int = 1,
    ending: Ending | None = None,
    part: tuple[int, int] = (0, 1),
) -> Manifest | None:
    """Write the shards and the manifest of a source into ``out``, which appears whole or not at all.

    What is finished stays in ``OUT.packing`` when this is stopped, and the same call goes on from there.

    Args:
        source: folder or zip; None for a recipe that draws its images.
        recipe: a key of ``RECIPES``.
        out: the folder to make.
        settings: what decides the bytes.
        options: ``key=value`` for the recipe.
        workers: processes that read, strip and write.
        ending: how to join the shards.
        part: (i, n) packs shards i, i + n, ... alone and joins nothing.

    Returns:
        the manifest; None for a part.

    Raises:
        UserError: a mistake in the arguments or the source, or more unreadable images than allowed.
    """
    ending = ending or Ending()
    work = WorkFolder(Path(os.path.abspath(out)))  # so that "." has a name and a neighbour
    published = work.published()
    if not published:
        _check_targets(work, ending)
    plan = make_plan(source, recipe, options, settings, work.out)
    if published:
        work.tidy()
        if published == plan.fingerprint:
            return read_manifest(work.out)
        _check_targets(work, ending)
    with work.locked(shared=part[1] > 1):
        work.begin(plan, part[1])
        _pack_shards(work, plan, range(part[0], len(plan.shards), part[1]), workers)
        if part[1] == 1:
            return join(work, ending)
        _tell_part(work, plan, part)
    return None


def _check_targets(work: WorkFolder, ending: Ending) -> None:
    check_out(work.out, ending.force)
    if ending.mapping is not None:
        check_mapping(ending.mapping, work)


def _pack_shards(work: WorkFolder, plan: Plan, numbers: range, workers: int) -> None:
    wanted = [plan.shards[number] for number in numbers]
    finished = {s.file for s in wanted if read_entry(work.shards, s.file, s.fingerprint) is not None}
    kept = sum(len(shard.items) for shard in wanted if shard.file in finished)
    if finished:
        click.echo(f"{len(finished)} of {len(wanted)} shards are finished already ({kept} images)", err=True)
    missing = [shard for shard in wanted if shard.file not in finished]
    Image.preinit()  # before workers are forked, or each of them would import Pillow's formats
    with _progress(sum(len(shard.items) for shard in wanted), kept) as show:
        pack_shards(work.shards, plan, missing, workers, show)


def _tell_part(work: WorkFolder, plan: Plan, part: tuple[int, int]) -> None:
    missing = [n for n, s in enumerate(plan.shards) if read_entry(work.shards, s.file, s.fingerprint) is None]
    click.echo(f"slice {part[0]}/{part[1]} is packed into {work.path}.")
    if missing:
        click.echo(f"{tell_missing(missing, part[1], len(plan.shards))}. Then join them:")
    else:
        click.echo("All shards are packed. Join them:")
    click.echo(f"python -m shards.merge {work.out}")


@contextmanager
def _progress(total: int, kept: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, else about ten plain lines; takes the number of images done since the start."""
    if sys.stderr.isatty():
        tqdm.monitor_interval = 0  # else it starts a thread, and workers are about to be forked
        with tqdm(desc="packing", total=total, initial=kept, unit="image") as bar:

            def move(done: int) -> None:
                bar.update(kept + done - bar.n)

            yield move
        return
    shown, start = 10 * kept // max(total, 1), time.monotonic()

    def show(done: int) -> None:
        nonlocal shown
        if (tenth := 10 * (kept + done) // total) > shown:
            shown = tenth
            left = (time.monotonic() - start) / max(done, 1) * (total - kept - done)
            click.echo(f"packed {kept + done} of {total} images, about {left:.0f} s left", err=True)

    yield show


def _read_part(given: str | None) -> tuple[int, int]:
    if given is None:
        return 0, 1
    first, slash, count = given.partition("/")
    if not (slash and first.isdecimal() and count.isdecimal() and int(first) < int(count)):
        raise UserError(f"--slice {given}: accepted is i/n with 0 <= i < n, for example 0/8 to 7/8.")
    return int(first), int(count)


@click.command()
@click.argument("source", required=False, type=click.Path(path_type=Path))
@click.option("--recipe", required=True, help=f"What the source is: {', '.join(RECIPES)}.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The folder to make.")
@click.option("--option", "-o", "options", multiple=True, metavar="KEY=VALUE", help="A setting of the recipe.")
@click.option("--secret", type=click.Path(path_type=Path), help="File behind the pseudonyms. [default: the user's own]")
@click.option("--seed", default=0, show_default=True, help="Seed of splits and drawings.")
@click.option("--size", type=click.IntRange(8, 4096), help="Shortest side in pixels. [default: pixels untouched]")
@click.option("--max-rejected", default=0.05, show_default=True, type=click.FloatRange(0, 1), help="Unreadable share.")
@click.option("--shard-samples", default=1024, show_default=True, type=click.IntRange(1), help="Samples a shard.")
@click.option("--keep", multiple=True, metavar="FIELD", help="A field of the source that samples shall carry.")
@click.option("--mapping", type=click.Path(path_type=Path), help="CSV to write: key, group and the source's names.")
@click.option("--slice", "given_slice", metavar="I/N", help="Pack one of N slices; then: python -m shards.merge OUT")
@click.option("--workers", type=click.IntRange(1), help="Processes. [default: one a core]")
@click.option("--name", default="", help="The set's name. [default: the folder's]")
@click.option("--force", is_flag=True, help="Replace a packed set in --out.")
def main(
    source: Path | None,
    recipe: str,
    out: Path,
    options: tuple[str, ...],
    secret: Path | None,
    mapping: Path | None,
    given_slice: str | None,
    workers: int | None,
    force: bool,
    **settings: Any,
) -> None:
    """Pack SOURCE, a folder or a zip of images, into shards and a manifest."""
    try:
        part = _read_part(given_slice)
        if part[1] > 1 and mapping is not None:
            raise UserError("--mapping belongs to the command that joins the slices: python -m shards.merge OUT.")
        # Drawn images have nobody to protect: one known secret gives them the same order and bytes everywhere.
        chosen = Settings(DRAWN_SECRET if source is None and secret is None else read_secret(secret), **settings)
        ending = Ending(force, None, mapping)
        manifest = pack(source, recipe, out, chosen, options, workers or usable_cores(), ending, part)
    except UserError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        click.echo("interrupted: finished shards are kept, and the same command goes on from there", err=True)
        sys.exit(130)
    if manifest is not None:
        tell(out)


if __name__ == "__main__":
    main()
