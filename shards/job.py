"""One shard of the plan: images read, checked, stripped and written; then its entry, which says that it is finished."""

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from shards.images import Channels, Packed, Rejected, add_up, pack_image
from shards.plan import Plan, ShardPlan
from shards.recipes.base import Label, Record
from shards.strip import Parts
from shards.tar import ShardWriter
from shards.workers import Tick, run_jobs
from shards.workfolder import unique, write_atomically
from tracekin.config import UserError

MARKED = 20
LEAST = 16
"""Images in a part of a shard; its last one may have fewer."""


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


def pack_shards(
    folder: Path, plan: Plan, shards: Sequence[ShardPlan], workers: int, progress: Callable[[int], None]
) -> None:
    """Write these shards of the plan and their entries into ``folder``.

    With fewer shards than workers, several workers pack parts of each, which are then put together: same bytes.

    Args:
        folder: where finished shards lie.
        plan: of which they are.
        shards: what is missing.
        workers: processes.
        progress: called now and then with the number of images done.

    Raises:
        UserError: something cannot be written, or a worker was killed.
    """
    divided = {}
    if 0 < len(shards) < workers:
        divided = {shard: _parts_of(shard, math.ceil(workers / len(shards))) for shard in shards}
    jobs = [part for shard in shards for part in divided.get(shard, [shard])]
    run_jobs(partial(_pack_job, folder, plan, jobs), len(jobs), workers, progress)
    if divided:
        run_jobs(partial(_join_job, folder, list(divided.items())), len(divided), workers, lambda images: None)


def _parts_of(shard: ShardPlan, number: int) -> list[ShardPlan]:
    """Shards of their own, under names of their own."""
    step = max(math.ceil(len(shard.items) / number), LEAST)
    return [
        ShardPlan(
            f"{shard.file}.{start:06d}.part",
            shard.split,
            shard.items[start : start + step],
            max(shard.measured - start, 0),
            f"{shard.fingerprint}, {step} from {start}",
        )
        for start in range(0, len(shard.items), step)
    ]


def _pack_job(folder: Path, plan: Plan, shards: Sequence[ShardPlan], number: int, tick: Tick) -> None:
    shard = shards[number]
    _publish(folder, shard, lambda file: _pack(file, plan, shard, tick), tick)


def _join_job(folder: Path, divided: Sequence[tuple[ShardPlan, Sequence[ShardPlan]]], number: int, tick: Tick) -> None:
    shard, parts = divided[number]
    _publish(folder, shard, lambda file: _join(file, folder, shard, parts), tick)
    for part in parts:
        (folder / part.file).unlink()
        (folder / f"{part.file}.json").unlink()


def _publish(folder: Path, shard: ShardPlan, write: Callable[[BinaryIO], Entry], tick: Tick) -> None:
    """Let ``write`` make the tar, give it its name, and write its entry."""
    target, entry = folder / shard.file, folder / f"{shard.file}.json"
    temporary = unique(target)
    try:
        with temporary.open("wb", buffering=1 << 17) as file:
            described = write(file)
        tick(0)  # does not return in a worker that nobody waits for
        entry.unlink(missing_ok=True)  # never the entry of other bytes beside these, not even for a moment
        os.replace(temporary, target)
        write_atomically(entry, json.dumps(described.as_json(), separators=(",", ":")) + "\n")
    except OSError as error:  # not of a source's file: that would be one unreadable image
        raise UserError(
            f"cannot write {target}: {error.strerror}. Finished shards are kept; the same command goes on."
        ) from None


def _pack(file: BinaryIO, plan: Plan, shard: ShardPlan, tick: Tick) -> Entry:
    images: list[Image] = []
    rejected: list[tuple[str, str, str]] = []
    channels: list[Channels] = []
    writer = ShardWriter(file)
    for index, item in enumerate(shard.items):
        record = item.record
        try:
            image = _pack_record(record, plan.size, index < shard.measured)
        except Rejected as error:
            rejected.append((record.source, error.reason, str(error)))
        else:
            group = plan.group(record)
            writer.add(item.key, image.extension, image.parts, plan.describe(record, group))
            mark = mark_of(image.parts)
            images.append(Image(item.key, group, record.label, mark, record.source, record.group or ""))
            channels += [image.channels] if image.channels else []
        tick(1)
    digest = writer.finish()
    return Entry(shard.fingerprint, writer.bytes, digest, writer.samples, images, rejected, add_up(channels))


def _join(file: BinaryIO, folder: Path, shard: ShardPlan, parts: Sequence[ShardPlan]) -> Entry:
    writer = ShardWriter(file)
    entries = [read_entry(folder, part.file, part.fingerprint) for part in parts]
    for part, entry in zip(parts, entries, strict=True):
        assert entry is not None
        with (folder / part.file).open("rb") as packed:
            for _, length, _ in entry.samples:
                writer.copy([packed.read(length)])
    digest = writer.finish()
    found = [entry for entry in entries if entry is not None]
    return Entry(
        shard.fingerprint,
        writer.bytes,
        digest,
        writer.samples,
        [image for entry in found for image in entry.images],
        [rejected for entry in found for rejected in entry.rejected],
        add_up(channels for entry in found for channels in entry.channels),
    )


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
