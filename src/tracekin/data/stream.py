"""The sample stream: one flat list of stages over reads of any sample by its number.

The order of an epoch, and which part of it a rank's batch holds, is order.py's; bytes come from reader.py. What cannot
be had is replaced by another sample, so that ranks stay in step, and reported with the batch.
"""

import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
import webdataset as wds
from torch import Tensor
from torch.utils.data import DataLoader

from tracekin.config import DataConfig, UserError
from tracekin.data.augment import LUMA, Augmentation, Planes, plain_view, resolve, view
from tracekin.data.decode import Sample, group_number, label_list
from tracekin.data.faults import Fault
from tracekin.data.manifest import SPLITS, Manifest
from tracekin.data.order import Rows, in_order, num_steps_per_epoch, plan, shuffle_of
from tracekin.data.reader import ShardReader, Skipped

ATTEMPTS = 16
"""Substitutes that are tried for one sample."""


@dataclass
class Batch:
    """V views of B images; V is 2 or more for pretraining, 1 for evaluation, 2 a draw for influence."""

    views: Tensor
    """[V, B, C, S, S] float32, normalised by the manifest's mean and std."""
    index: Tensor
    """[B] int64, the sample's number in its split."""
    group: Tensor
    """[B] int64, the leading digits of the group's pseudonym."""
    label: Tensor
    """[B, num_classes] float32, one for each of the image's classes; no columns where the manifest has no classes."""
    skipped: list[Skipped] = field(default_factory=list)
    """Samples that belonged into this batch and could not be had; others stand in their places."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        return self._map(Tensor.pin_memory)

    def _map(self, f: Callable[[Tensor], Tensor]) -> "Batch":
        return Batch(f(self.views), f(self.index), f(self.group), f(self.label), self.skipped)


class Item(NamedTuple):
    epoch: int
    number: int
    sample: Sample
    skipped: Skipped | None
    """What the sample stands for, if it is a substitute."""


class Viewed(NamedTuple):
    number: int
    label: int | list[int] | None
    group: str
    views: list[Planes]
    skipped: Skipped | None


def too_many(skipped: Sequence[Skipped], bad: int, count: int) -> UserError:
    """The end of a run whose data is bad; ``skipped`` are some of the ``bad`` samples among ``count``."""
    reasons = ", ".join(f"{reason} {n}" for reason, n in Counter(s.reason for s in skipped).most_common())
    last = skipped[-1]
    return UserError(
        f"{bad} of {count} train images could not be read in one epoch, more than data.max_bad_fraction allows (the "
        f"last ones: {reasons}); for example {last.shard}, sample {last.key or '(no key)'} at byte {last.offset}: "
        f"{last.detail}. Check the set with python -m shards.verify, or raise data.max_bad_fraction."
    )


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
    A sample that cannot be had is replaced by one of the next global batch and reported in ``Batch.skipped``.

    Args:
        manifest: the dataset.
        config: view size, channels, loader processes, shuffle, cache, augmentation.
        seed: of the order and the augmentation.
        global_batch: images a step over all ranks.
        share: this rank's positions in a global batch (World.share).
        steps: global steps to yield, such as range(resumed, total).
        views: views an image; those after the second are drawn as the second is, and leave the first two as they are.

    Raises:
        UserError: at the call if the split is smaller than a global batch; while iterating if more samples than
            data.max_bad_fraction allows cannot be had.
    """
    shuffle = shuffle_of(config, seed, global_batch)
    reader = ShardReader(manifest, "train", config)
    num_steps_per_epoch(len(reader), shuffle)
    rows = partial(plan, reader.sizes, shuffle, share=share, steps=steps)
    most_bad = config.max_bad_fraction * len(reader)
    stages = reading(rows, reader, config, most_bad)
    stages += [partial(_random_views, resolve(config.augment), config.image_size, config.channels, seed, views, (0,))]
    stages += [partial(_collate, share.stop - share.start, _Format(manifest, config.channels))]
    return load(stages, config.workers)


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
    return load([*stages, partial(_collate, batch, _Format(manifest, config.channels))], workers)


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
    stages = reading(partial(in_order, numbers, batch, SPLITS.index(split)), reader, config, None)
    epochs = range(0, draws * len(SPLITS), len(SPLITS))
    stages += [partial(_random_views, resolve(config.augment), config.image_size, config.channels, seed, 2, epochs)]
    return load([*stages, partial(_collate, batch, _Format(manifest, config.channels))], workers)


# The stages: each takes the iterator before it. split_by_worker deals whole batches out to the loader workers, from
# which the loader collects them in turn, so that their order is the plan's.


def reading(
    rows: Callable[[], Iterator[Rows]], reader: ShardReader, config: DataConfig, most_bad: float | None
) -> list[Callable[..., Any]]:
    """The stages every stream begins with: rows to decoded Items; ``most_bad`` as in ``_read``."""
    read = partial(_read, reader, None, most_bad)
    return [rows, wds.split_by_worker, partial(_read_ahead, reader, config.read_ahead), read]


def _read_ahead(reader: ShardReader, depth: int, source: Iterator[Rows]) -> Iterator[Rows]:
    """Have the shards of the next ``depth`` batches fetched while this one is worked on; local ones need it not."""
    ahead: deque[Rows] = deque()
    for rows in source:
        reader.prefetch(rows.numbers)
        ahead.append(rows)
        if len(ahead) > depth or not reader.remote:
            yield ahead.popleft()
    yield from ahead


def _read(
    reader: ShardReader, least_side: int | None, most_bad: float | None, source: Iterator[Rows]
) -> Iterator[Item]:
    """Decode each sample, and put another one in the place of one that cannot be had.

    ``most_bad`` samples an epoch may be replaced; None replaces none. The training counts over all workers and ranks,
    but a worker that exceeds it alone need not wait for that.
    """
    epoch, bad = -1, 0
    for rows in source:
        if rows.epoch != epoch:
            epoch, bad = rows.epoch, 0
        numbers = rows.numbers.tolist()
        for row, (number, content) in enumerate(zip(numbers, reader.contents(numbers), strict=True)):
            try:
                yield Item(epoch, number, _decoded(reader, content, least_side), None)
                continue
            except Fault as fault:
                skipped = reader.skipped(number, fault, content)
            bad += 1
            if most_bad is None:
                raise reader.error(skipped)
            if bad > most_bad:
                raise too_many([skipped], bad, len(reader))
            yield _substitute(reader, rows, row, skipped, least_side)


def _substitute(reader: ShardReader, rows: Rows, row: int, skipped: Skipped, least_side: int | None) -> Item:
    """Another sample for this row; one that cannot be had either is counted where it stands itself."""
    for attempt in range(1, ATTEMPTS + 1):
        number = rows.substitute(row, attempt)
        (content,) = reader.contents([number])
        try:
            return Item(rows.epoch, number, _decoded(reader, content, least_side), skipped)
        except Fault:
            continue
    raise reader.error(skipped)


def _decoded(reader: ShardReader, content: bytes | Fault, least_side: int | None) -> Sample:
    if isinstance(content, Fault):
        raise content
    return reader.decode(content, least_side)


def _random_views(
    augmentation: Augmentation,
    image_size: int,
    channels: int,
    seed: int,
    num_views: int,
    epochs: Sequence[int],
    source: Iterator[Item],
) -> Iterator[Viewed]:
    """``num_views`` for each of ``epochs``, which count from the item's own."""
    for epoch, number, sample, skipped in source:
        one = partial(view, sample.image, augmentation, image_size=image_size, channels=channels)
        views = [one(seed=seed, epoch=epoch + e, sample=number, view=v) for e in epochs for v in range(num_views)]
        yield Viewed(number, sample.label, sample.group, views, skipped)


def _plain_views(image_size: int, channels: int, source: Iterator[Item]) -> Iterator[Viewed]:
    for _, number, sample, skipped in source:
        planes = plain_view(sample.image, image_size=image_size, channels=channels)
        yield Viewed(number, sample.label, sample.group, [planes], skipped)


class _Format:
    """What a batch's tensors need to know of the manifest."""

    def __init__(self, manifest: Manifest, channels: int) -> None:
        self.num_classes = len(manifest.classes)
        mean, std = (np.array(values, dtype=np.float32) for values in (manifest.mean, manifest.std))
        if channels == 1 and len(mean) == 3:
            mean, std = LUMA @ mean, LUMA @ std  # of the luma; for std a bound, near where channels move together
        self.mean, self.std = (np.broadcast_to(x, channels).reshape(-1, 1, 1).astype(np.float32) for x in (mean, std))


def _collate(batch: int, form: _Format, source: Iterator[Viewed]) -> Iterator[Batch]:
    while rows := list(islice(source, batch)):
        views = np.stack([np.stack(planes) for planes in zip(*(row.views for row in rows), strict=True)])
        label = np.zeros((len(rows), form.num_classes), dtype=np.float32)
        for position, row in enumerate(rows):
            label[position, label_list(row.label)] = 1
        yield Batch(
            views=torch.from_numpy((views - form.mean) / form.std),
            index=torch.tensor([row.number for row in rows]),
            group=torch.tensor([group_number(row.group) for row in rows]),
            label=torch.from_numpy(label),
            skipped=[row.skipped for row in rows if row.skipped is not None],
        )


def _carry_errors(source: Iterator[Any]) -> Iterator[Any]:
    """Hand a user's error on as a value: raised in a worker, the loader would wrap it in a traceback's text."""
    try:
        yield from source
    except UserError as error:
        yield UserError(*error.args)


def load(stages: list[Callable[..., Any]], workers: int) -> Iterator[Any]:
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
    """Leave a job's signals to the main process, which stops its workers itself.

    Ctrl-C and Slurm's preemption reach every process; a worker that died of them would break the last checkpoint. Only
    the parent's own SIGTERM, by which the loader ends a worker, is obeyed.
    """
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    parent = os.getppid()

    def obey_parent() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=obey_parent, daemon=True).start()
