"""The sample stream: one flat list of stages over reads of any sample by its number.

The order of an epoch, and which part of it a rank's batch holds, is order.py's; bytes come from reader.py. What cannot
be had is replaced by another sample, so that ranks stay in step, and reported with the batch.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import islice, product, repeat
from typing import Any, NamedTuple

import torch
import webdataset as wds
from torch.utils.data import DataLoader, get_worker_info

from tracekin.config import DataConfig, UserError
from tracekin.data.augment import Augmentation, crop, draw, least_side, photometry_parameters, plain_view, resolve
from tracekin.data.batch import Batch, Format, Viewed, collate
from tracekin.data.decode import Sample
from tracekin.data.faults import Fault
from tracekin.data.manifest import SPLITS, Manifest
from tracekin.data.order import Rows, in_order, num_steps_per_epoch, plan, shuffle_of
from tracekin.data.photometry import apply_to_one
from tracekin.data.reader import ShardReader, Skipped

ATTEMPTS = 16
"""Substitutes that are tried for one sample."""
LOOK_SECONDS = 1.0
"""Between two looks of a loader process at whether the process that it works for still lives."""


class Item(NamedTuple):
    epoch: int
    number: int
    sample: Sample
    skipped: Skipped | None
    """What the sample stands for, if it is a substitute."""


def pretrain_batches(
    manifest: Manifest,
    config: DataConfig,
    *,
    seed: int,
    global_batch: int,
    share: slice,
    steps: range,
    views: int = 2,
) -> Iterator[Batch]:
    """Augmented views of this rank's rows of the train split, one batch for each global step in ``steps``.

    One loader serves the whole run: epoch = step // num_steps_per_epoch, and nothing before ``steps.start`` is read.
    A sample that cannot be had is replaced by one of the next global batch and reported in ``Batch.skipped``; the
    caller counts these over all ranks and stops above ``data.max_bad_fraction`` (tracekin.train.skips).

    Args:
        manifest: the dataset.
        config: view size, channels, loader processes, shuffle, cache, augmentation.
        seed: of the order and the augmentation.
        global_batch: images a step over all ranks.
        share: this rank's positions in a global batch (World.share).
        steps: global steps to yield, such as range(resumed, total).
        views: views an image; those after the second are drawn as the second is, and leave the first two as they are.

    Raises:
        UserError: at the call if the split is smaller than a global batch; while iterating if not even the first
            sample of a loader process, nor any in its place, can be had.
    """
    shuffle = shuffle_of(config, seed, global_batch)
    reader = ShardReader(manifest, "train", config)
    num_steps_per_epoch(len(reader), shuffle)
    rows = partial(plan, reader.sizes, shuffle, share=share, steps=steps)
    most_bad = config.max_bad_fraction * len(reader)
    stages = reading(rows, reader, config, most_bad, _least_side(config))
    stages += [partial(_random_views, config, resolve(config.augment), seed, views, (0,))]
    return run_stages(
        [*stages, partial(collate, share.stop - share.start, Format(manifest, config.channels))], config.workers
    )


def evaluation_batches(
    manifest: Manifest, split: str, config: DataConfig, *, batch: int, workers: int
) -> Iterator[Batch]:
    """Every sample of a split once, in order, one plain view each; the last batch may be smaller.

    Nothing is replaced here: a score over other images than the split's is no score of the split.

    Args:
        manifest: the dataset.
        split: train, val or test.
        config: view size, channels, where remote shards are cached.
        batch: samples a batch.
        workers: loader processes.

    Raises:
        UserError: at the call if there is no such split; while iterating if a sample cannot be had.
    """
    reader = ShardReader(manifest, split, config)
    stages = reading(partial(in_order, range(len(reader)), batch, 0), reader, config, None)
    stages += [partial(_plain_views, config.image_size, config.channels)]
    return run_stages([*stages, partial(collate, batch, Format(manifest, config.channels))], workers)


def augmented_batches(
    manifest: Manifest,
    split: str,
    config: DataConfig,
    *,
    seed: int,
    batch: int,
    workers: int,
    draws: int = 1,
    numbers: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """Each sample of a split once, in order, as pairs of augmented views like those of pretraining.

    The last batch may be smaller. Views 2d and 2d + 1 are the pair of draw d. They depend on (seed, draw, split,
    sample) alone: draw and split stand for the epoch, as samples of equal number in two splits would share crop and
    colours otherwise.

    Args:
        manifest: the dataset.
        split: train, val or test.
        config: view size, channels, augmentation.
        seed: of the augmentation.
        batch: samples a batch.
        workers: loader processes.
        draws: pairs of views a sample.
        numbers: the samples to read, in this order; None reads all.

    Raises:
        UserError: at the call if there is no such split; while iterating if a sample cannot be had.
    """
    reader = ShardReader(manifest, split, config)
    numbers = range(len(reader)) if numbers is None else numbers
    rows = partial(in_order, numbers, batch, SPLITS.index(split))
    stages = reading(rows, reader, config, None, _least_side(config))
    epochs = range(0, draws * len(SPLITS), len(SPLITS))
    config = replace(config, augment_on="workers")
    stages += [partial(_random_views, config, resolve(config.augment), seed, 2, epochs)]
    return run_stages([*stages, partial(collate, batch, Format(manifest, config.channels))], workers)


# The stages: each takes the iterator before it.


def reading(
    rows: Callable[[], Iterator[Rows]],
    reader: ShardReader,
    config: DataConfig,
    most_bad: float | None,
    least_side: int | None = None,
) -> list[Callable[..., Any]]:
    """The stages every stream begins with: rows to decoded Items.

    ``most_bad`` is the number of samples that an epoch may replace, None replaces none; ``least_side`` as in
    ``decode_sample``.
    """
    read = partial(_read, reader, least_side, most_bad)
    return [rows, _of_this_worker, partial(_read_ahead, reader, config.read_ahead), read]


def _of_this_worker(source: Iterator[Rows]) -> Iterator[Rows]:
    """Every n-th batch of n loader processes, from which the loader collects them in turn: their order is the plan's.

    webdataset's split_by_worker asks the variables WORKER and NUM_WORKERS first, which a job's script may hold.
    """
    worker = get_worker_info()
    return source if worker is None else islice(source, worker.id, None, worker.num_workers)


def _read_ahead(reader: ShardReader, depth: int, source: Iterator[Rows]) -> Iterator[Rows]:
    """Have the shards of the next ``depth`` batches fetched while this one is worked on; local ones need it not."""
    ahead: deque[Rows] = deque()
    try:
        for rows in source:
            reader.prefetch(rows.numbers)
            ahead.append(rows)
            if len(ahead) > depth or not reader.remote:
                yield ahead.popleft()
        yield from ahead
    finally:
        reader.close()


def _read(
    reader: ShardReader, least_side: int | None, most_bad: float | None, source: Iterator[Rows]
) -> Iterator[Item]:
    """Decode each sample, and put another one in the place of one that cannot be had.

    ``most_bad`` samples an epoch may be replaced; None replaces none. Whether there are more is for the training to
    find, which counts over all workers and ranks and ends all of them together: one that raised here would leave the
    others waiting. Until then the last good sample stands for whatever follows, unread.
    """
    epoch, bad = -1, set[int]()  # a sample that wraps comes twice
    last: Item | None = None
    for rows in source:
        if rows.epoch != epoch:
            epoch, bad = rows.epoch, set()
        numbers = rows.numbers.tolist()
        hopeless = last is not None and most_bad is not None and len(bad) > most_bad
        contents = repeat(None, len(numbers)) if hopeless else reader.contents(numbers)
        for row, (number, content) in enumerate(zip(numbers, contents, strict=True)):
            skipped = None
            try:
                if content is not None:
                    last = Item(epoch, number, _decoded(reader, content, least_side), None)
            except Fault as fault:
                skipped = reader.skipped(number, fault, content or b"")
                if most_bad is None:
                    raise reader.error(skipped) from None
                bad.add(number)
                last = _substitute(reader, rows, row, least_side) or last
            if last is None:
                assert skipped is not None
                raise reader.error(skipped)
            yield last._replace(epoch=epoch, skipped=skipped)


def _substitute(reader: ShardReader, rows: Rows, row: int, least_side: int | None) -> Item | None:
    """Another sample for this row; one that cannot be had either is counted where it stands itself."""
    for attempt in range(1, ATTEMPTS + 1):
        number = rows.substitute(row, attempt)
        (content,) = reader.contents([number])
        with suppress(Fault):
            return Item(rows.epoch, number, _decoded(reader, content, least_side), None)
    return None


def _decoded(reader: ShardReader, content: bytes | Fault, least_side: int | None) -> Sample:
    if isinstance(content, Fault):
        raise content
    return reader.decode(content, least_side)


def _least_side(config: DataConfig) -> int:
    return least_side(resolve(config.augment), config.image_size)


def _random_views(
    config: DataConfig,
    augmentation: Augmentation,
    seed: int,
    num_views: int,
    epochs: Sequence[int],
    source: Iterator[Item],
) -> Iterator[Viewed]:
    """``num_views`` for each of ``epochs``, which count from the item's own: finished here, or crops for the device."""
    size, channels = config.image_size, config.channels
    for epoch, number, sample, skipped in source:
        views, photometry = [], []
        for e, v in product(epochs, range(num_views)):
            u = draw(seed=seed, epoch=epoch + e, sample=number, view=v)
            pixels = crop(sample.image, augmentation, image_size=size, channels=channels, u=u)
            parameters = photometry_parameters(pixels, augmentation, u, v)
            if config.augment_on == "device":
                views.append(pixels)
                photometry.append(parameters)
            else:
                views.append(apply_to_one(pixels, parameters))
        yield Viewed(number, sample.label, sample.group, views, photometry, skipped)


def _plain_views(image_size: int, channels: int, source: Iterator[Item]) -> Iterator[Viewed]:
    for _, number, sample, skipped in source:
        planes = plain_view(sample.image, image_size=image_size, channels=channels)
        yield Viewed(number, sample.label, sample.group, [planes], [], skipped)


def _carry_errors(source: Iterator[Any]) -> Iterator[Any]:
    """Hand a user's error on as a value: raised in a worker, the loader would wrap it in a traceback's text."""
    try:
        yield from source
    except UserError as error:
        yield UserError(*error.args)


def run_stages(stages: list[Callable[..., Any]], workers: int) -> Iterator[Any]:
    """Run the stages in this process or in ``workers`` loader processes, whose batches come back in turn.

    Raises:
        UserError: as a stage raised it.
    """
    loader: DataLoader[Any] = DataLoader(
        wds.DataPipeline(*stages, _carry_errors),
        batch_size=None,
        num_workers=workers,
        worker_init_fn=_start_worker,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else the loader draws its seed from the global one, which is the training's
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch


def _start_worker(worker: int) -> None:
    """Leave a job's signals to the main process, which stops its workers itself, and end soon after it.

    Ctrl-C and Slurm's preemption reach every process; a worker that died of them would break the last checkpoint. Only
    the parent's own SIGTERM, by which the loader ends a worker, is obeyed. A parent that was killed cannot send it, and
    torch's own watch looks only between batches, every 5 s.
    """
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    parent = multiprocessing.parent_process()
    assert parent is not None

    def obey_parent() -> None:
        while os.getppid() == parent.pid:
            came = signal.sigtimedwait({signal.SIGTERM}, LOOK_SECONDS)
            if came is not None and came.si_pid == parent.pid:
                break
        os._exit(0)

    threading.Thread(target=obey_parent, daemon=True).start()
