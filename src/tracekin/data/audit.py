"""Does the stream keep its promise on a set? It is read for real, world after world (python -m tracekin.data.audit)."""

import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import click
import webdataset as wds

from tracekin.config import DataConfig, UserError, load
from tracekin.data.chance import random_words
from tracekin.data.manifest import Manifest, read_manifest
from tracekin.data.order import Shuffle, left_over, num_steps_per_epoch, plan, shuffle_of
from tracekin.data.reader import ShardReader
from tracekin.data.stream import Item, reading, run_stages

STOPS = (0, 0, 4)
"""Place of the stops' random words in the counter space (order.py has the others)."""


class Seen(NamedTuple):
    """One batch of one rank."""

    epoch: int
    keys: list[str]
    skipped: int


@dataclass
class Report:
    """What was wrong, over all worlds, worker counts and epochs."""

    missing: int = 0
    """Samples that an epoch did not see, beyond those that ``last_batch`` leaves out."""
    repeated: int = 0
    """Samples that an epoch saw again, beyond those that ``last_batch`` wraps."""
    out_of_order: int = 0
    """Places of a global batch that held another sample than in one process without loader processes."""
    skipped: int = 0
    """Samples that could not be read and were replaced."""
    samples: int = 0
    """Samples read."""
    first_batch: list[float] = field(default_factory=list)
    """Seconds from each resumption to its first batch, loader processes started."""


def audit(
    manifest: Manifest,
    split: str,
    config: DataConfig,
    shuffle: Shuffle,
    *,
    worlds: Sequence[int],
    workers: Sequence[int],
    epochs: int,
    resume: bool,
) -> Report:
    """Read ``epochs`` epochs in every world with every number of loader processes, and compare.

    The keys that must come are read by webdataset, from the tars alone; the order that must come is that of the first
    reading, by one process. With ``resume`` each reading is also stopped in the middle of an epoch and continued in the
    next of ``worlds``.

    Raises:
        UserError: no such split, too few samples, a world that does not divide the global batch, or a negative
            number of loader processes.
    """
    reader = ShardReader(manifest, split, config)
    steps = epochs * num_steps_per_epoch(len(reader), shuffle)
    for size in worlds:
        if size < 1 or shuffle.global_batch % size:
            raise UserError(f"--world {size} does not divide --global-batch {shuffle.global_batch}; use divisors.")
    if min(workers) < 0:
        raise UserError(f"--workers {min(workers)} is no number of processes; use 0 or more.")
    report = Report()
    read = partial(_read_world, reader, config, shuffle, report)
    keys = set(_keys(reader))
    reference = list(read(1, 0, range(steps)))
    spare = left_over(len(reader), shuffle)
    report.missing += max(0, len(reader) - len(keys))  # webdataset stops where a tar is damaged
    _compare(report, reference, reference, keys, spare)
    for number, size in enumerate(worlds):
        for processes in workers:
            click.echo(f"world of {size}, {processes} loader processes a rank", err=True)
            _compare(report, list(read(size, processes, range(steps))), reference, keys, spare)
            if not resume or steps < 2:
                continue
            stop = 1 + int(random_words(shuffle.seed, size, STOPS, 1)[0]) % (steps - 1)
            before = list(read(size, processes, range(stop)))
            other = worlds[(number + 1) % len(worlds)]
            after = list(read(other, processes, range(stop, steps), time.perf_counter()))
            _compare(report, before + after, reference, keys, spare)
    return report


def _read_world(
    reader: ShardReader,
    config: DataConfig,
    shuffle: Shuffle,
    report: Report,
    size: int,
    workers: int,
    steps: range,
    began: float | None = None,
) -> Iterator[Seen]:
    """The global batches that the ranks of a world see together; one process plays the ranks in turn."""
    each = shuffle.global_batch // size
    ranks: list[list[Seen]] = []
    for rank in range(size):
        rows = partial(plan, reader.sizes, shuffle, share=slice(rank * each, (rank + 1) * each), steps=steps)
        most_bad = config.max_bad_fraction * len(reader)
        batches = run_stages([*reading(rows, reader, config, most_bad), partial(_seen, each)], workers)
        seen = list(islice(batches, 1))
        if began is not None and not rank and seen:
            report.first_batch.append(time.perf_counter() - began)
        ranks.append(seen + list(batches))
    for parts in zip(*ranks, strict=True):  # unequal ranks would fail here
        report.skipped += sum(part.skipped for part in parts)
        report.samples += shuffle.global_batch
        yield Seen(parts[0].epoch, [key for part in parts for key in part.keys], 0)


def _seen(size: int, source: Iterator[Item]) -> Iterator[Seen]:
    while items := list(islice(source, size)):
        skipped = sum(item.skipped is not None for item in items)
        yield Seen(items[0].epoch, [item.sample.key for item in items], skipped)


def _compare(report: Report, seen: list[Seen], reference: list[Seen], keys: set[str], spare: int) -> None:
    report.out_of_order += sum(
        a != b for one, other in zip(seen, reference, strict=True) for a, b in zip(one.keys, other.keys, strict=True)
    )
    for epoch in {batch.epoch for batch in reference}:
        times = Counter(key for batch in seen if batch.epoch == epoch for key in batch.keys)
        once = len(keys & times.keys())
        report.missing += max(0, len(keys) - once - max(spare, 0))
        report.repeated += max(0, times.total() - once - max(-spare, 0))


def _keys(reader: ShardReader) -> Iterator[str]:
    """The keys in the split's tars: of local ones as webdataset finds them, without our offsets."""
    if reader.remote:
        yield from map(reader.key, range(len(reader)))
        return
    urls = [f"{reader.folder}/{shard.file}" for shard in reader.shards]
    for sample in wds.WebDataset(urls, shardshuffle=False, empty_check=False):
        yield str(sample["__key__"])


class _Numbers(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    name = "N,N,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        try:
            numbers = tuple(int(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is no list of whole numbers such as 1,2,4", param, ctx)
        return numbers


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80})
@click.argument("manifest")
@click.option("--split", default="train", show_default=True)
@click.option("--global-batch", default=24, show_default=True, type=click.IntRange(1))
@click.option("--world", "worlds", default="1,2", show_default=True, type=_Numbers(), help="World sizes to play.")
@click.option("--workers", default="0,2", show_default=True, type=_Numbers(), help="Loader processes a rank.")
@click.option("--epochs", default=1, show_default=True, type=click.IntRange(1))
@click.option("--resume", is_flag=True, help="Also stop in an epoch's middle and go on in another world.")
@click.option("--seed", default=0, show_default=True)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def main(manifest: str, split: str, global_batch: int, seed: int, overrides: tuple[str, ...], **options: Any) -> None:
    """Read MANIFEST's split as trainings of several worlds would, and count.

    missing: samples that an epoch did not see; repeated: seen again;
    out_of_order: places of a global batch with another sample than one process
    sees. KEY=VALUE are keys of the config's data section: last_batch=wrap
    shuffle_shards=16 streams=2. The last line is one JSON object; the exit code
    is 0 if all three are zero, else 1.
    """
    try:
        config = load(DataConfig, None, overrides)
        shuffle = shuffle_of(config, seed, global_batch)
        report = audit(read_manifest(manifest), split, config, shuffle, **options)
    except UserError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    found = asdict(report)
    latest = max(found.pop("first_batch"), default=None)
    click.echo(json.dumps({"manifest": manifest, "split": split, **found, "slowest_first_batch_seconds": latest}))
    sys.exit(any((report.missing, report.repeated, report.out_of_order)))


if __name__ == "__main__":
    main()
