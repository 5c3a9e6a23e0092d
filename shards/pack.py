"""Pack a folder or zip of images into WebDataset tars and a manifest: ``python -m shards.pack --help``."""

import csv
import hashlib
import io
import json
import os
import shutil
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from shards.images import Packed, pack_image
from shards.pseudonym import pseudonym, read_secret
from shards.recipes import RECIPES
from shards.recipes.base import Dataset, Record
from shards.source import Source
from shards.workers import ordered_map, usable_cores
from tracekin.config import UserError, load
from tracekin.data.manifest import SPLITS, Manifest, Shard, write_manifest

DRAWN_SECRET = b"tracekin draws these images itself"


@dataclass(frozen=True)
class Settings:
    """What decides the bytes of the output besides the source."""

    secret: bytes
    seed: int = 0
    size: int | None = None
    """Pixels of the shortest side; None leaves the pixels untouched."""
    max_rejected: float = 0.05
    """Largest share of unreadable images."""
    shard_samples: int = 1024
    name: str = ""
    """The manifest's name; empty takes the output folder's."""


def make_dataset(
    source: Path | None, recipe: str, options: tuple[str, ...], settings: Settings
) -> tuple[Dataset, bool]:
    """Let a recipe list its records; also says whether it drew them at ``settings.size`` itself.

    Raises:
        UserError: unknown recipe or option, or whatever the recipe finds wrong with the source.
    """
    if recipe not in RECIPES:
        raise UserError(f"unknown recipe {recipe!r}; accepted are {', '.join(RECIPES)}.")
    module = RECIPES[recipe]
    draws = any(field.name == "size" for field in fields(module.Options))
    if draws and settings.size is not None:
        options = (*options, f"size={settings.size}")
    chosen: Any = load(module.Options, None, options)
    return module.recipe(None if source is None else Source(source), chosen, settings.seed), draws


def pack(
    source: Path | None,
    recipe: str,
    out: Path,
    settings: Settings,
    options: tuple[str, ...] = (),
    workers: int = 1,
    force: bool = False,
) -> Manifest:
    """Write the shards and the manifest of a source into ``out``, all or nothing.

    Args:
        source: folder or zip; None for a recipe that draws its images.
        recipe: a key of ``RECIPES``.
        out: the folder to make.
        settings: what decides the bytes.
        options: ``key=value`` for the recipe.
        workers: processes that read, decode and strip.
        force: replace a packed set in ``out``.

    Raises:
        UserError: a mistake in the arguments or the source, or more unreadable images than allowed.
    """
    out = Path(os.path.abspath(out))  # so that "." has a name and a neighbour
    _check_out(out, force)
    dataset, draws = make_dataset(source, recipe, options, settings)
    keys = partial(pseudonym, settings.secret)
    ordered = sorted((SPLITS.index(r.split or ""), keys(f"{recipe}/image", r.source), r) for r in dataset.records)
    job = partial(_pack_record, size=None if draws else settings.size)
    rejected: list[tuple[str, str]] = []
    with _all_or_nothing(out, force) as folder:
        writer = _Writer(folder, settings.shard_samples)
        results = ordered_map(job, [record for _, _, record in ordered], workers)
        progress = _progress(results, len(ordered))
        for (split, key, record), result in zip(ordered, progress, strict=True):
            if isinstance(result, str):
                rejected.append((record.source, result))
            else:
                group = keys(f"{recipe}/group", record.group_or_self)
                writer.add(SPLITS[split], key, result, {"label": record.label, "group": group})
        writer.close()
        _report_rejected(out, rejected, len(ordered), settings.max_rejected)
        mean, std = writer.statistics(out)
        name = settings.name or out.name
        manifest = Manifest(name, recipe, dataset.task, dataset.classes, mean, std, writer.splits, folder)
        write_manifest(manifest)
    return replace(manifest, folder=out)


def _pack_record(record: Record, size: int | None) -> Packed | str:
    """The packed image, or why it is unreadable."""
    try:
        return pack_image(record.read(), size)
    # A zip member or file can fail in many ways (checksum, compression, permission): all are one rejected image.
    except Exception as error:
        return " ".join(str(error).split()) or repr(error)


class _Writer:
    """Writes samples into tars of bounded length and sums up the train split's channels."""

    def __init__(self, folder: Path, shard_samples: int) -> None:
        self.splits: dict[str, list[Shard]] = {}
        self._folder, self._limit = folder, shard_samples
        self._split, self._file = "", ""
        self._tar: tarfile.TarFile | None = None
        self._samples: list[list[int]] = []
        self._channels: dict[bool, tuple[int, list[int], list[int]]] = {}

    def add(self, split: str, key: str, image: Packed, described: dict[str, Any]) -> None:
        if split != self._split or len(self._samples) >= self._limit:
            self.close()
            self._split, self._file = split, f"{split}-{len(self.splits.get(split, [])):06d}.tar"
            self._tar = tarfile.open(self._folder / self._file, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        assert self._tar is not None
        start = self._tar.offset
        label = json.dumps(described, separators=(",", ":")).encode() + b"\n"
        for extension, content in ((image.extension, image.content), ("json", label)):
            member = tarfile.TarInfo(f"{key}.{extension}")  # its defaults: time 0, owner 0, no names
            member.size = len(content)
            self._tar.addfile(member, io.BytesIO(content))
        self._samples.append([start, self._tar.offset - start])
        if split == "train":
            pixels, sums, squares = self._channels.get(image.grey, (0, [0] * len(image.sums), [0] * len(image.sums)))
            sums = [a + b for a, b in zip(sums, image.sums, strict=True)]
            squares = [a + b for a, b in zip(squares, image.squares, strict=True)]
            self._channels[image.grey] = (pixels + image.pixels, sums, squares)

    def close(self) -> None:
        if self._tar is None:
            return
        self._tar.close()
        path = self._folder / self._file
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        shard = Shard(self._file, path.stat().st_size, digest, self._samples)
        self.splits.setdefault(self._split, []).append(shard)
        self._tar, self._samples = None, []

    def statistics(self, out: Path) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel over the train split, values 0..1; grey counts thrice in RGB."""
        if not self._channels:
            raise UserError(f"no readable image falls into the split train of {out}; it has {', '.join(self.splits)}.")
        width = 3 if False in self._channels else 1
        pixels = sum(total for total, _, _ in self._channels.values())
        mean, std = [], []
        for channel in range(width):
            total = sum(sums[channel % len(sums)] for _, sums, _ in self._channels.values())
            square = sum(squares[channel % len(squares)] for _, _, squares in self._channels.values())
            mean.append(total / (pixels * 65535))
            std.append((square * pixels - total**2) ** 0.5 / (pixels * 65535))
        return mean, std


def _check_out(out: Path, force: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder to make.")
    inside = [path.name for path in out.iterdir()]
    if "manifest.json" in inside and not force:
        raise UserError(f"--out {out} holds a packed set already; name another folder, or replace it with --force.")
    foreign = [name for name in inside if name != "manifest.json" and not name.endswith(".tar")]
    if foreign or (inside and "manifest.json" not in inside):
        raise UserError(f"--out {out} holds other files ({(foreign or inside)[0]}); name a new or empty folder.")


@contextmanager
def _all_or_nothing(out: Path, force: bool) -> Iterator[Path]:
    """A temporary folder beside ``out`` that takes its name at the end, or vanishes."""
    temporary = out.parent / f".{out.name}.packing-{os.getpid()}"
    old = out.parent / f".{out.name}.replaced-{os.getpid()}"
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot write beside --out {out}: {error.strerror}.") from None
    try:
        yield temporary
        _check_out(out, force)  # someone may have packed meanwhile
        if out.exists():
            out.rename(old)
        temporary.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if old.exists() and not out.exists():  # the second rename failed: what was there comes back
            old.rename(out)


def _report_rejected(out: Path, rejected: list[tuple[str, str]], total: int, limit: float) -> None:
    """List unreadable images beside ``out``, where the user's own names may stand; raise UserError above the limit."""
    path = out.parent / f"{out.name}.rejected.csv"
    if not rejected:
        path.unlink(missing_ok=True)  # of an earlier packing
        return
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("image", "reason"), *sorted(rejected)])
    message = f"{len(rejected)} of {total} images are unreadable, for example {rejected[0][0]}: {rejected[0][1]}"
    if len(rejected) > limit * total:
        raise UserError(
            f"{message}; all are listed in {path}. Accepted is a share of {limit:g}: mend them or raise --max-rejected."
        )
    click.echo(f"{message}; packed without them, all are listed in {path}.", err=True)


def _progress(results: Iterator[Packed | str], total: int) -> Iterator[Packed | str]:
    """A bar on a terminal, else about ten plain lines."""
    if sys.stderr.isatty():
        yield from tqdm(results, "packing", total, unit="image")
        return
    for number, result in enumerate(results, 1):
        yield result
        if number == total or number % max(1, total // 10) == 0:
            click.echo(f"packed {number} of {total} images", err=True)


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
@click.option("--workers", type=click.IntRange(1), help="Processes. [default: one a core]")
@click.option("--name", default="", help="The set's name. [default: the folder's]")
@click.option("--force", is_flag=True, help="Replace a packed set in --out.")
def main(
    source: Path | None,
    recipe: str,
    out: Path,
    options: tuple[str, ...],
    secret: Path | None,
    workers: int | None,
    force: bool,
    **settings: Any,
) -> None:
    """Pack SOURCE, a folder or a zip of images, into shards and a manifest."""
    try:
        # Drawn images have nobody to protect: one known secret gives them the same order and bytes everywhere.
        chosen = Settings(DRAWN_SECRET if source is None and secret is None else read_secret(secret), **settings)
        manifest = pack(source, recipe, out, chosen, options, workers or usable_cores(), force)
    except UserError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    counts = ", ".join(f"{split} {manifest.count(split)}" for split in manifest.splits)
    click.echo(f"{out / 'manifest.json'}: {counts}; {manifest.task}, {len(manifest.classes)} classes")


if __name__ == "__main__":
    main()
