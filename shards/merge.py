"""Join finished shards into a packed set: ``python -m shards.merge OUT``. A plain packing ends with the same.

Leaks between splits are found, statistics summed, manifest, report and contact sheet written; then OUT appears.
"""

import json
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from shards.contact_sheet import write_sheet
from shards.copies import Finished, Sample, identical_images, leaking_groups, list_samples, splits_of
from shards.images import UNITS
from shards.job import read_entry
from shards.lists import Rejected, check_mapping, check_rejected, list_leaks, list_rejected, write_mapping
from shards.plan import no_train_image
from shards.report import make_report, show_report
from shards.tar import ShardWriter
from shards.workfolder import WorkFolder, check_out
from tracekin.config import UserError
from tracekin.data.manifest import Manifest, Shard, write_manifest


@dataclass(frozen=True)
class Ending:
    """How a packing ends; none of it decides the bytes of a shard."""

    force: bool = False
    """Replace a packed set."""
    max_rejected: float | None = None
    """Largest share of unreadable images; None takes the plan's."""
    mapping: Path | None = None
    """CSV to write that leads from keys back to the source's names."""


def join(work: WorkFolder, ending: Ending) -> Manifest:
    """Make OUT of the finished shards of a work folder that this process has locked.

    Raises:
        UserError: shards are missing, too many images are unreadable, no train image is left, OUT must not be replaced,
            or something cannot be written.
    """
    plan = work.read_plan()
    shards = _finished_shards(work, plan)
    try:
        return _join(work, plan, shards, ending)
    except OSError as error:
        raise UserError(f"cannot write {work.out}: {error}. Finished shards are kept in {work.path}.") from None


def _join(work: WorkFolder, plan: Mapping[str, Any], shards: Sequence[Finished], ending: Ending) -> Manifest:
    rejected: list[Rejected] = [(name, kind, why) for shard in shards for name, kind, why in shard.entry.rejected]
    limit = plan["max_rejected"] if ending.max_rejected is None else ending.max_rejected
    check_rejected(work, rejected, sum(records for _, _, records, _ in plan["shards"]), limit)
    mean, std = _statistics(shards, work.out)
    samples = list_samples(shards)
    copies = identical_images(samples, work.shards)
    groups, across = leaking_groups(samples), [same for same in copies if len(splits_of(same)) > 1]
    left_out = {} if plan["given_splits"] else _later_copies(across)
    if left_out:
        across, samples = [], [sample for sample in samples if sample not in left_out]
    list_rejected(work, [*rejected, *left_out.values()])
    list_leaks(work, groups, across)
    check_out(work.out, ending.force)  # somebody may have packed meanwhile

    splits = _move(work, shards, left_out)
    leaks = {"groups": len(groups), "images": len(across)}
    manifest = Manifest(
        plan["name"], plan["recipe"], plan["task"], plan["classes"], mean, std, splits, str(work.final), leaks
    )
    write_manifest(manifest)
    kept = [[sample for sample in same if sample not in left_out] for same in copies]
    duplicates = sum(len(same) - len(splits_of(same)) for same in kept)
    kinds = [kind for _, kind, _ in (*rejected, *left_out.values())]
    report = make_report(manifest, samples, kinds, duplicates)
    (work.final / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    write_sheet(work.final / "contact_sheet.png", samples, manifest.classes, work.final)
    if ending.mapping is not None:
        write_mapping(ending.mapping, samples, work)
    work.publish(plan["fingerprint"])
    return replace(manifest, folder=str(work.out))


def _finished_shards(work: WorkFolder, plan: Mapping[str, Any]) -> list[Finished]:
    found, missing = [], []
    for number, (file, split, _, fingerprint) in enumerate(plan["shards"]):
        entry = read_entry(work.shards, file, fingerprint)
        if entry is None:
            missing.append(number)
        else:
            found.append(Finished(file, split, entry))
    if missing:
        raise UserError(
            f"{work.path} cannot be joined yet: {tell_missing(missing, plan['slices'], len(plan['shards']))}."
        )
    return found


def tell_missing(missing: Sequence[int], slices: int, shards: int) -> str:
    """Which shards are not packed yet, and whose commands pack them."""
    of_slices = ", ".join(f"{number}/{slices}" for number in sorted({number % slices for number in missing}))
    again = f"pack with --slice {of_slices}" if slices > 1 else "give the pack command again"
    return f"{len(missing)} of {shards} shards are not packed; {again}"


def _later_copies(copies: Sequence[list[Sample]]) -> dict[Sample, Rejected]:
    """Of identical images in several splits, those that the first of these splits does not hold."""
    found: dict[Sample, Rejected] = {}
    for same in copies:
        first = same[0]
        kind = f"identical to an image of {first.split}"
        for sample in same:
            if sample.split != first.split:
                found[sample] = (sample.image.source, kind, f"{kind}: {first.image.source}")
    return found


def _statistics(shards: Sequence[Finished], out: Path) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, values 0..1, of the measured images; grey counts thrice in RGB."""
    measured = [channels for shard in shards for channels in shard.entry.channels]
    if not measured:
        raise no_train_image(out, {shard.split for shard in shards if shard.entry.images})
    width = 3 if any(not channels.grey for channels in measured) else 1
    pixels = sum(channels.pixels for channels in measured)
    mean, std = [], []
    for channel in range(width):
        total = sum(channels.sums[channel % len(channels.sums)] for channels in measured)
        square = sum(channels.squares[channel % len(channels.squares)] for channels in measured)
        mean.append(total / (pixels * UNITS))
        std.append((square * pixels - total**2) ** 0.5 / (pixels * UNITS))
    return mean, std


def _move(work: WorkFolder, shards: Sequence[Finished], left_out: Collection[Sample]) -> dict[str, list[Shard]]:
    """Bring the shards into ``final``: whole ones as they are, the others copied without what is left out."""
    work.final.mkdir()
    indices: dict[str, set[int]] = {}
    for sample in left_out:
        indices.setdefault(sample.shard.file, set()).add(sample.index)
    splits: dict[str, list[Shard]] = {}
    for shard in shards:
        entry, without = shard.entry, indices.get(shard.file, set())
        if len(without) == len(entry.samples):
            continue
        described = Shard(shard.file, entry.bytes, entry.sha256, entry.samples)
        if without:
            described = _copy(work, described, without)
        else:
            (work.shards / shard.file).rename(work.final / shard.file)
        splits.setdefault(shard.split, []).append(described)
    return splits


def _copy(work: WorkFolder, shard: Shard, without: Collection[int]) -> Shard:
    source, target = work.shards / shard.file, work.final / shard.file
    with source.open("rb") as whole, target.open("wb", buffering=1 << 20) as file:
        writer = ShardWriter(file)
        for index, (offset, length, _) in enumerate(shard.samples):
            if index not in without:
                whole.seek(offset)
                writer.copy([whole.read(length)])
        digest = writer.finish()
    return Shard(shard.file, writer.bytes, digest, writer.samples)


def tell(out: Path) -> None:
    """Print the report of a packed set and where its manifest lies."""
    click.echo(show_report(json.loads((out / "report.json").read_text(encoding="utf-8"))))
    click.echo(out / "manifest.json")


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--max-rejected", type=click.FloatRange(0, 1), help="Unreadable share. [default: as the slices said]")
@click.option("--mapping", type=click.Path(path_type=Path), help="CSV to write: key, group and the source's names.")
@click.option("--force", is_flag=True, help="Replace a packed set in OUT.")
def main(out: Path, **ending: Any) -> None:
    """Join the slices that were packed with --out OUT."""
    chosen = Ending(**ending)
    work = WorkFolder(Path(os.path.abspath(out)))
    try:
        if work.published():
            work.tidy()
        else:
            check_out(work.out, chosen.force)
            if not work.plan.exists():
                raise UserError(f"nothing to join: {work.plan} is not there; pack slices with --out {out} first.")
            if chosen.mapping is not None:
                check_mapping(chosen.mapping, work)
            with work.locked(shared=False):
                join(work, chosen)
    except UserError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        click.echo("interrupted: the slices are kept, and the same command goes on", err=True)
        sys.exit(130)
    tell(out)


if __name__ == "__main__":
    main()
