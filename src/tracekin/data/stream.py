"""The sample stream: one flat list of stages over reads of any sample by its number.

The order of an epoch is a permutation from (seed, epoch) alone and global batch k is its k-th slice: every world size
and worker count sees the same global batches, and resuming at a step is starting the plan there.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
import webdataset as wds
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from tracekin.config import DataConfig, UserError
from tracekin.data.augment import LUMA, Augmentation, Planes, plain_view, random_words, resolve, view
from tracekin.data.decode import Sample, ShardReader, group_number, label_list
from tracekin.data.manifest import SPLITS, Manifest


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

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        return self._map(Tensor.pin_memory)

    def _map(self, f: Callable[[Tensor], Tensor]) -> "Batch":
        return Batch(f(self.views), f(self.index), f(self.group), f(self.label))


class Rows(NamedTuple):
    """The numbers of the samples of one batch, in order."""

    epoch: int
    numbers: NDArray[np.int64]


class Item(NamedTuple):
    epoch: int
    number: int
    sample: Sample


class Viewed(NamedTuple):
    number: int
    label: int | list[int] | None
    group: str
    views: list[Planes]


def num_steps_per_epoch(manifest: Manifest, split: str, global_batch: int) -> int:
    """Whole global batches in the split; the samples left over in an epoch's order wait for another epoch.

    Raises:
        UserError: if the split holds fewer samples than one global batch, or does not exist.
    """
    count = manifest.count(split)
    if count < global_batch:
        raise UserError(
            f"the {split} split of {manifest.path} has {count} samples, fewer than the global "
            f"batch of {global_batch}: set train.global_batch to {count} or less, or pack more images."
        )
    return count // global_batch


def epoch_order(num_samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The permutation of range(num_samples) in which an epoch sees its samples, [num_samples] int64.

    Sorting random keys depends on Philox's specification alone, where a library's shuffle may change between versions.
    """
    return np.argsort(random_words(seed, epoch, (0, 0, 1), num_samples), kind="stable")


def plan(num_samples: int, *, seed: int, global_batch: int, share: slice, steps: Iterable[int]) -> Iterator[Rows]:
    """This rank's rows of each global step: positions ``share`` of global batch ``step % steps_per_epoch``."""
    steps_per_epoch = num_samples // global_batch
    known, order = -1, np.empty(0, dtype=np.int64)
    for step in steps:
        epoch, k = divmod(step, steps_per_epoch)
        if epoch != known:
            known, order = epoch, epoch_order(num_samples, seed, epoch)
        yield Rows(epoch, order[k * global_batch : (k + 1) * global_batch][share])


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

    Args:
        manifest: the dataset.
        config: view size, channels, loader processes, augmentation.
        seed: of the order and the augmentation.
        global_batch: images a step over all ranks.
        share: this rank's positions in a global batch (World.share).
        steps: global steps to yield, such as range(resumed, total).
        views: views an image; those after the second are drawn as the second is, and leave the first two as they are.

    Raises:
        UserError: at the call if the split is smaller than a global batch; while iterating if a sample is damaged.
    """
    num_steps_per_epoch(manifest, "train", global_batch)
    reader = ShardReader(manifest, "train")
    rows = partial(plan, len(reader), seed=seed, global_batch=global_batch, share=share, steps=steps)
    viewed = partial(_random_views, resolve(config.augment), config.image_size, config.channels, seed, views, (0,))
    collate = partial(_collate, share.stop - share.start, _Format(manifest, config.channels))
    return _load([rows, wds.split_by_worker, partial(_read, reader), viewed, collate, _carry_errors], config.workers)


def evaluation_batches(
    manifest: Manifest, split: str, *, image_size: int, channels: int, batch: int, workers: int
) -> Iterator[Batch]:
    """Every sample of a split once, in order, one plain view each; the last batch may be smaller.

    Raises:
        UserError: at the call if there is no such split; while iterating if a sample is damaged.
    """
    reader = ShardReader(manifest, split)
    rows = partial(_in_order, range(len(reader)), batch, 0)
    views = partial(_plain_views, image_size, channels)
    collate = partial(_collate, batch, _Format(manifest, channels))
    return _load([rows, wds.split_by_worker, partial(_read, reader), views, collate, _carry_errors], workers)


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
        UserError: at the call if there is no such split; while iterating if a sample is damaged.
    """
    reader = ShardReader(manifest, split)
    numbers = range(len(reader)) if numbers is None else numbers
    rows = partial(_in_order, numbers, batch, SPLITS.index(split))
    epochs = range(0, draws * len(SPLITS), len(SPLITS))
    viewed = partial(_random_views, resolve(config.augment), config.image_size, config.channels, seed, 2, epochs)
    collate = partial(_collate, batch, _Format(manifest, config.channels))
    return _load([rows, wds.split_by_worker, partial(_read, reader), viewed, collate, _carry_errors], workers)


# The stages: each takes the iterator before it. split_by_worker deals whole batches out to the loader workers, from
# which the loader collects them in turn, so that their order is the plan's.


def _in_order(numbers: Sequence[int], batch: int, epoch: int) -> Iterator[Rows]:
    for start in range(0, len(numbers), batch):
        yield Rows(epoch, np.array(numbers[start : start + batch], dtype=np.int64))


def _read(reader: ShardReader, source: Iterator[Rows]) -> Iterator[Item]:
    for epoch, numbers in source:
        for number in numbers.tolist():
            yield Item(epoch, number, reader.read(number))


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
    for epoch, number, sample in source:
        one = partial(view, sample.image, augmentation, image_size=image_size, channels=channels)
        views = [one(seed=seed, epoch=epoch + e, sample=number, view=v) for e in epochs for v in range(num_views)]
        yield Viewed(number, sample.label, sample.group, views)


def _plain_views(image_size: int, channels: int, source: Iterator[Item]) -> Iterator[Viewed]:
    for _, number, sample in source:
        planes = plain_view(sample.image, image_size=image_size, channels=channels)
        yield Viewed(number, sample.label, sample.group, [planes])


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
        )


def _carry_errors(source: Iterator[Batch]) -> Iterator[Batch | UserError]:
    """Hand a user's error on as a value: raised in a worker, the loader would wrap it in a traceback's text."""
    try:
        yield from source
    except UserError as error:
        yield UserError(*error.args)


def _load(stages: list[Callable[..., Any]], workers: int) -> Iterator[Batch]:
    loader: DataLoader[Batch | UserError] = DataLoader(
        wds.DataPipeline(*stages),
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
