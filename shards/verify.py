"""Re-read a packed set and prove what it claims: ``python -m shards.verify DIR [--privacy SOURCE]``."""

import hashlib
import io
import json
import re
import sys
import textwrap
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import click
from PIL import Image

from shards.members import members
from shards.privacy.contents import MEMBER
from shards.privacy.scan import Scan, describe, describe_leak, scan
from shards.pseudonym import DIGITS
from shards.recipes.base import Task
from shards.strip import PNG_START, strip_jpeg, strip_png
from shards.workers import ordered_map, usable_cores
from tracekin.config import UserError
from tracekin.data.manifest import Manifest, Shard, read_manifest

SHOWN = 20
_GROUP = re.compile(rf"[0-9a-f]{{{DIGITS}}}")


@dataclass
class Finding:
    """What one shard or split holds."""

    keys: list[str] = field(default_factory=list)
    groups: set[str] = field(default_factory=set)
    images: dict[bytes, list[str]] = field(default_factory=dict)
    """The keys of each stored image, by the image's SHA-256."""
    labels: Counter[int] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    @property
    def duplicates(self) -> int:
        """Images of which an identical one stands before."""
        return sum(len(keys) - 1 for keys in self.images.values())


def verify(folder: str | Path, workers: int = 1) -> tuple[Manifest, dict[str, Finding], list[str]]:
    """Check every byte that the manifest speaks of; decode every image in full.

    Returns:
        the manifest, what each split holds, and the problems (empty when all is well; leaks that the manifest declares
        are none).

    Raises:
        UserError: ``folder`` is remote, the manifest itself cannot be read, or a shard is missing or of another size.
    """
    if "://" in str(folder):
        raise UserError(f"{folder} is remote; accepted is a local folder: copy the set first.")
    manifest = read_manifest(folder)
    shards = [(split, shard) for split, held in manifest.splits.items() for shard in held]
    check = partial(_check_shard, Path(manifest.folder), len(manifest.classes), manifest.task)
    merged = {split: Finding() for split in manifest.splits}
    problems: list[str] = []
    for (split, _), found in zip(shards, ordered_map(check, [s for _, s in shards], workers, chunk=1), strict=True):
        merged[split].keys += found.keys
        merged[split].groups |= found.groups
        for digest, keys in found.images.items():
            merged[split].images.setdefault(digest, []).extend(keys)
        merged[split].labels += found.labels
        problems += found.problems
    counts = Counter(key for found in merged.values() for key in found.keys)
    problems += [f"key {key} occurs {times} times" for key, times in counts.items() if times > 1]
    problems += _undeclared(
        manifest, "groups", [f"group {group} is in {held}" for group, held in _leaking_groups(merged)]
    )
    problems += _undeclared(manifest, "images", [f"one image is in {held}" for held in _leaking_images(merged)])
    problems += _check_report(manifest, merged)
    return manifest, merged, problems


def _leaking_groups(merged: dict[str, Finding]) -> Iterator[tuple[str, str]]:
    """Each group that lies in several splits, and in which."""
    splits: dict[str, list[str]] = {}
    for split, found in merged.items():
        for group in found.groups:
            splits.setdefault(group, []).append(split)
    yield from ((group, " and in ".join(held)) for group, held in sorted(splits.items()) if len(held) > 1)


def _leaking_images(merged: dict[str, Finding]) -> Iterator[str]:
    """For each image of which several splits hold an identical copy: a key in each."""
    places: dict[bytes, list[str]] = {}
    for split, found in merged.items():
        for digest, keys in found.images.items():
            places.setdefault(digest, []).append(f"{split} ({keys[0]})")
    yield from (" and in ".join(held) for held in places.values() if len(held) > 1)


def _undeclared(manifest: Manifest, kind: str, leaks: list[str]) -> list[str]:
    """The leaks, where there are more than the manifest declares: which of them are meant it does not say."""
    declared = manifest.leaks.get(kind, 0)
    if len(leaks) <= declared:
        return []
    first = f"{len(leaks)} {kind} leak across splits, but the manifest declares {declared}"
    return [first, *leaks]


def _check_report(manifest: Manifest, merged: dict[str, Finding]) -> list[str]:
    """What report.json, where there is one, counts otherwise than is there."""
    path = Path(manifest.folder) / "report.json"
    if not path.exists():
        return []
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        counted = {key: report[key] for key in ("name", "images", "groups", "classes", "duplicates", "leaks")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"report.json cannot be read: {error!r}"]
    found = {
        "name": manifest.name,
        "images": {split: len(held.keys) for split, held in merged.items()},
        "groups": {split: len(held.groups) for split, held in merged.items()},
        "classes": {
            split: {name: held.labels[index] for index, name in enumerate(manifest.classes)}
            for split, held in merged.items()
        },
        "duplicates": sum(held.duplicates for held in merged.values()),
        "leaks": manifest.leaks,
    }
    return [
        f"report.json has {counted[key]} {key}, but there are {found[key]}"
        for key in found
        if counted[key] != found[key]
    ]


def _check_shard(folder: Path, num_classes: int, task: Task, shard: Shard) -> Finding:
    finding = Finding()
    with (folder / shard.file).open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
            finding.problems.append(f"{shard.file} has another sha256 than the manifest says")
        end = 0
        for offset, length, checksum in shard.samples:
            if offset != end:
                finding.problems.append(f"{shard.file}: a sample starts at byte {offset}; the last one ended at {end}")
            end = offset + length
            file.seek(offset)
            content = file.read(length)
            if zlib.crc32(content) != checksum:
                finding.problems.append(f"{shard.file}, byte {offset}: another CRC-32 than the manifest says")
            try:
                _check_sample(content, num_classes, task, finding)
            # Damaged bytes fail in many ways (tar, JSON, image); each is one problem of this sample.
            except Exception as error:
                finding.problems.append(f"{shard.file}, byte {offset}: {error or repr(error)}")
        file.seek(end)
        while block := file.read(1 << 20):
            if any(block):
                finding.problems.append(f"{shard.file} holds more than the samples of the manifest")
                break
    return finding


def _check_sample(content: bytes, num_classes: int, task: Task, finding: Finding) -> None:
    bodies = {member.name: content[member.start : member.start + member.size] for member in members(content)}
    keys = {name.partition(".")[0] for name in bodies}
    extensions = [name.partition(".")[2] for name in bodies]
    if len(keys) != 1 or extensions not in (["jpg", "json"], ["png", "json"]) or not all(map(MEMBER.fullmatch, bodies)):
        shown = ", ".join(bodies) or "nothing"
        raise ValueError(f"not one sample KEY.jpg|png + KEY.json, KEY of {DIGITS} hexadecimal digits, but {shown}")
    image, text = bodies.values()
    key = keys.pop()
    described = json.loads(text)
    _check_image(image, key)
    label = described["label"]
    expected = {"multiclass": int, "multilabel": list, "unlabelled": type(None)}[task]
    indices = label if isinstance(label, list) else [] if label is None else [label]
    if type(label) is not expected or not all(type(i) is int and 0 <= i < num_classes for i in indices):
        raise ValueError(f"sample {key} has the label {label}; accepted: {task}, classes 0 to {num_classes - 1}")
    _check_rest(described, key)
    finding.keys.append(key)
    finding.groups.add(described["group"])
    finding.images.setdefault(hashlib.sha256(image).digest(), []).append(key)
    finding.labels.update(indices)


def _check_image(image: bytes, key: str) -> None:
    """Raise ValueError or what Pillow raises, unless it decodes in full and holds nothing but pixels."""
    Image.open(io.BytesIO(image), formats=("JPEG", "PNG")).load()
    try:
        bare = b"".join(strip_png(image) if image[:8] == PNG_START else strip_jpeg(image)) == image
    except ValueError as error:
        raise ValueError(f"the image of {key} is none that shards.pack writes: {error}") from None
    if not bare:
        raise ValueError(f"the image of {key} holds metadata or bytes after its end")


def _check_rest(described: dict[str, Any], key: str) -> None:
    """Raise ValueError, unless the group is a pseudonym and there is nothing but the contract's fields."""
    if not isinstance(described["group"], str) or not _GROUP.fullmatch(described["group"]):
        raise ValueError(f"sample {key} has the group {described['group']!r}; accepted are {DIGITS} hexadecimal digits")
    spare = described.keys() - {"label", "group", "fields"}
    if spare:
        raise ValueError(f"sample {key} has the key {min(spare)!r}; accepted are label, group and fields")
    fields = described.get("fields", {})
    if not isinstance(fields, dict) or not all(isinstance(value, str) for value in fields.values()):
        raise ValueError(f"sample {key} has fields that are no texts by name")


def _summary(manifest: Manifest, merged: dict[str, Finding]) -> Iterator[str]:
    yield f"{manifest.name}: recipe {manifest.recipe}, {manifest.task}"
    for split, found in merged.items():
        twice = f", {found.duplicates} duplicates" if found.duplicates else ""
        labels = ", ".join(f"{name} {found.labels[i]}" for i, name in enumerate(manifest.classes))
        yield f"  {split}: {len(found.keys)} samples, {len(found.groups)} groups{twice}" + (labels and f"; {labels}")
    for kind, leaking in (("groups", list(_leaking_groups(merged))), ("images", list(_leaking_images(merged)))):
        if leaking and len(leaking) <= manifest.leaks.get(kind, 0):
            yield f"  {len(leaking)} {kind} lie in several splits, as the source states them and the manifest declares"


@click.command()
@click.argument("folder", metavar="DIR")
@click.option(
    "--privacy", type=click.Path(path_type=Path), metavar="SOURCE", help="Search DIR for SOURCE's identifiers."
)
@click.option("--keep", multiple=True, metavar="FIELD", help="A field that samples carry, as given to shards.pack.")
@click.option("--workers", type=click.IntRange(1), help="Processes. [default: one a core]")
def main(folder: str, privacy: Path | None, keep: tuple[str, ...], workers: int | None) -> None:
    """Check the packed set in DIR: sums, offsets, images, labels, groups, leaks between splits.

    With --privacy, search every byte of it for every name, identifier, date and path of SOURCE, the folder or zip that
    it was packed from.
    """
    workers = workers or usable_cores()
    try:
        if keep and privacy is None:
            raise UserError("--keep belongs to --privacy SOURCE; give both.")
        manifest, merged, problems = verify(folder, workers)
        searched = scan(manifest, privacy, keep, workers) if privacy else None
    except UserError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    for line in _summary(manifest, merged):
        click.echo(textwrap.fill(line, 80, subsequent_indent="    "))
    failed = _report(problems, "copy the set again or pack it again:")
    if not failed:
        click.echo("all sums, offsets, images, labels, groups and splits are in order")
    if searched is not None:
        failed = _report_scan(searched) or failed
    if failed:
        sys.exit(2)


def _report(problems: list[str], advice: str) -> bool:
    """Print problems, if there are any; says whether."""
    if problems:
        more = [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        click.echo("\n".join([f"error: {advice}", *problems[:SHOWN], *more]), err=True)
    return bool(problems)


def _report_scan(searched: Scan) -> bool:
    for line in describe(searched):
        click.echo(line)
    told = _report(searched.problems, "some bytes cannot be told, and might hide anything:")
    leaked = _report([describe_leak(leak) for leak in searched.leaks], "identifiers of the source are in the set:")
    if not told and not leaked:
        click.echo("no identifier of the source is in the set")
    return told or leaked


if __name__ == "__main__":
    main()
