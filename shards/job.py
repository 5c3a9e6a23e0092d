"""One shard of the plan: images read, checked, stripped and written; then its entry, which says that it is finished."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from shards.images import Channels, Packed, Rejected, pack_image
from shards.plan import Plan, ShardPlan
from shards.recipes.base import Label, Record
from shards.strip import Parts
from shards.tar import ShardWriter
from shards.workers import Tick
from shards.workfolder import unique, write_atomically
from tracekin.config import UserError

MARKED = 20


class Image(NamedTuple):
    """A packed sample."""

    key: str
    group: str
    label: Label
    mark: str
    """Equal for identical images, and hardly ever for others."""
    source: str
    """The source's own name of the image ..."""
    source_group: str
    """... and of its group, where it has one."""


@dataclass
class Entry:
    """What became of one shard; lies beside it as JSON."""

    fingerprint: str
    bytes: int
    sha256: str
    samples: list[list[int]]
    """[offset, length, CRC-32], as in the manifest."""
    images: list[Image]
    """One for each sample."""
    rejected: list[tuple[str, str, str]]
    """The source's name of each image left out, the kind of reason, and the reason."""
    channels: list[Channels]
    """Of the measured images: one of all grey ones, one of all others."""

    def as_json(self) -> dict[str, Any]:
        return {**vars(self), "channels": [vars(channels) for channels in self.channels]}


def read_entry(folder: Path, file: str, fingerprint: str) -> Entry | None:
    """The entry of a finished shard; None where it is not finished, or not in this way."""
    try:
        content = json.loads((folder / f"{file}.json").read_text(encoding="utf-8"))
        entry = Entry(**content)
        entry.images = [Image(*image) for image in entry.images]
        entry.channels = [Channels(**channels) for channels in content["channels"]]
        if entry.fingerprint == fingerprint and (folder / file).stat().st_size == entry.bytes:
            return entry
    except (OSError, ValueError, TypeError):
        pass
    return None


def pack_shard(folder: Path, plan: Plan, number: int, tick: Tick) -> None:
    """Write shard ``number`` of the plan and its entry into ``folder``.

    Args:
        folder: where finished shards lie.
        plan: of which it is one shard.
        number: its place in ``plan.shards``.
        tick: called with 1 after each image, and with 0 before the shard takes its name.

    Raises:
        UserError: it cannot be written.
    """
    shard = plan.shards[number]
    target = folder / shard.file
    temporary, entry = unique(target), folder / f"{shard.file}.json"
    try:
        described = _write(temporary, plan, shard, tick)
        tick(0)
        entry.unlink(missing_ok=True)  # never the entry of other bytes beside these, not even for a moment
        os.replace(temporary, target)
        write_atomically(entry, json.dumps(described.as_json(), separators=(",", ":")) + "\n")
    except OSError as error:  # not of a source's file: that would be one unreadable image
        raise UserError(
            f"cannot write {target}: {error.strerror}. Finished shards are kept; the same command goes on."
        ) from None


def _write(temporary: Path, plan: Plan, shard: ShardPlan, tick: Tick) -> Entry:
    images: list[Image] = []
    rejected: list[tuple[str, str, str]] = []
    channels: dict[bool, Channels] = {}
    with temporary.open("wb", buffering=1 << 17) as file:
        writer = ShardWriter(file)
        for item in shard.items:
            record = item.record
            try:
                image = _pack_record(record, plan.size, len(images) < shard.measured)
            except Rejected as error:
                rejected.append((record.source, error.reason, str(error)))
                tick(1)
                continue
            group = plan.group(record)
            writer.add(item.key, image.extension, image.parts, plan.describe(record, group))
            if image.channels is not None:
                so_far = channels.get(image.channels.grey)
                channels[image.channels.grey] = so_far.plus(image.channels) if so_far else image.channels
            mark = mark_of(image.parts)
            images.append(Image(item.key, group, record.label, mark, record.source, record.group or ""))
            tick(1)
        digest = writer.finish()
    found = [channels[grey] for grey in sorted(channels)]
    return Entry(shard.fingerprint, writer.bytes, digest, writer.samples, images, rejected, found)


def _pack_record(record: Record, size: int | None, measure: bool) -> Packed:
    try:
        content = record.read()
    # A file, a zip's member or a DICOM file can fail in many ways: all are one image that cannot be had.
    except Exception as error:
        raise Rejected("unreadable file", " ".join(str(error).split()) or repr(error)) from None
    return pack_image(content, size, measure)


def mark_of(parts: Parts) -> str:
    """The length and the last 20 bytes: the end of the coded pixels, of a PNG also their checksum."""
    last = bytes(parts[-1][-MARKED:])
    if len(last) < MARKED:
        last = b"".join(parts)[-MARKED:]
    return f"{sum(map(len, parts)):x}-{last.hex()}"
