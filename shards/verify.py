"""Re-read a packed set: sums, offsets, every image, labels, groups: ``python -m shards.verify DIR``."""

import hashlib
import io
import json
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import click
from PIL import Image

from shards.recipes.base import Task
from shards.workers import ordered_map, usable_cores
from tracekin.config import UserError
from tracekin.data.manifest import Manifest, Shard, read_manifest

SHOWN = 20


@dataclass
class Finding:
    """What one shard holds."""

    keys: list[str] = field(default_factory=list)
    groups: set[str] = field(default_factory=set)
    labels: Counter[int] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


def verify(folder: Path, workers: int = 1) -> tuple[Manifest, dict[str, Finding], list[str]]:
    """Check every byte that the manifest speaks of.

    Returns:
        the manifest, what each split holds, and the problems (empty when all is well).

    Raises:
        UserError: if the manifest itself cannot be read or a shard is missing or of another size.
    """
    manifest = read_manifest(folder)
    shards = [(split, shard) for split, held in manifest.splits.items() for shard in held]
    check = partial(_check_shard, manifest.folder, len(manifest.classes), manifest.task)
    merged = {split: Finding() for split in manifest.splits}
    problems: list[str] = []
    for (split, _), found in zip(shards, ordered_map(check, [s for _, s in shards], workers, chunk=1), strict=True):
        merged[split].keys += found.keys
        merged[split].groups |= found.groups
        merged[split].labels += found.labels
        problems += found.problems
    keys = Counter(key for found in merged.values() for key in found.keys)
    problems += [f"key {key} occurs {times} times" for key, times in keys.items() if times > 1]
    where: dict[str, str] = {}
    for split, found in merged.items():
        problems += [f"group {g} is in {where[g]} and in {split}" for g in sorted(found.groups) if g in where]
        where.update(dict.fromkeys(found.groups, split))
    return manifest, merged, problems


def _check_shard(folder: Path, num_classes: int, task: Task, shard: Shard) -> Finding:
    finding = Finding()
    path = folder / shard.file
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
            finding.problems.append(f"{shard.file} has another sha256 than the manifest says")
        end = 0
        for offset, length in shard.samples:
            if offset != end:
                finding.problems.append(f"{shard.file}: a sample starts at byte {offset}; the last one ended at {end}")
            end = offset + length
            file.seek(offset)
            try:
                _check_sample(file.read(length), num_classes, task, finding)
            # Damaged bytes fail in many ways (tar, JSON, image); each is one problem of this sample.
            except Exception as error:
                finding.problems.append(f"{shard.file}, byte {offset}: {error or repr(error)}")
        file.seek(end)
        if any(file.read()):
            finding.problems.append(f"{shard.file} holds more than the samples of the manifest")
    return finding


def _check_sample(content: bytes, num_classes: int, task: Task, finding: Finding) -> None:
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
        members = {member.name: (tar.extractfile(member) or io.BytesIO()).read() for member in tar}
    keys = {name.partition(".")[0] for name in members}
    extensions = sorted(name.partition(".")[2] for name in members)
    if len(keys) != 1 or extensions not in (["jpg", "json"], ["json", "png"]):
        raise ValueError(f"not one sample KEY.jpg|png + KEY.json but {', '.join(members) or 'nothing'}")
    key = keys.pop()
    described = json.loads(members.pop(f"{key}.json"))
    (image,) = members.values()
    Image.open(io.BytesIO(image), formats=("JPEG", "PNG")).load()
    label = described["label"]
    expected = {"multiclass": int, "multilabel": list, "unlabelled": type(None)}[task]
    indices = label if isinstance(label, list) else [] if label is None else [label]
    if type(label) is not expected or not all(type(i) is int and 0 <= i < num_classes for i in indices):
        raise ValueError(f"sample {key} has the label {label}; accepted: {task}, classes 0 to {num_classes - 1}")
    finding.keys.append(key)
    finding.groups.add(described["group"])
    finding.labels.update(indices)


def _summary(manifest: Manifest, merged: dict[str, Finding]) -> Iterator[str]:
    yield f"{manifest.name}: recipe {manifest.recipe}, {manifest.task}"
    for split, found in merged.items():
        labels = ", ".join(f"{name} {found.labels[i]}" for i, name in enumerate(manifest.classes))
        yield f"  {split}: {len(found.keys)} samples, {len(found.groups)} groups" + (f"; {labels}" if labels else "")


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@click.option("--workers", type=click.IntRange(1), help="Processes. [default: one a core]")
def main(folder: Path, workers: int | None) -> None:
    """Check the packed set in DIR against its manifest: sums, offsets, images, labels, groups."""
    try:
        manifest, merged, problems = verify(folder, workers or usable_cores())
    except UserError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    for line in _summary(manifest, merged):
        click.echo(line)
    if problems:
        more = [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        click.echo("\n".join(["error: copy the set again or pack it again:", *problems[:SHOWN], *more]), err=True)
        sys.exit(2)
    click.echo("all sums, offsets, images, labels and groups are in order")


if __name__ == "__main__":
    main()
