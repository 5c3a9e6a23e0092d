"""In which order an epoch sees its samples, and which of them a rank's batch holds: arithmetic on numbers alone.

The order is a permutation from (seed, epoch) and the shards' sizes; global batch k is its k-th slice. So every world
size and worker count sees the same global batches, resuming at a step is starting the plan there, and the whole state
of the stream is one integer, the step.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tracekin.config import DataConfig, UserError
from tracekin.data.chance import random_words

Numbers = NDArray[np.int64]

# Each use of the counter space of Philox has a place of its own (augment.py has the views').
ALL, SHARDS, WINDOWS = (0, 0, 1), (0, 0, 2), (0, 0, 3)


@dataclass(frozen=True)
class Shuffle:
    """What decides the order besides the epoch; the fields of DataConfig, and the run's seed and global batch."""

    seed: int
    global_batch: int
    last_batch: Literal["drop", "wrap"] = "drop"
    shuffle_shards: int = 0
    streams: int = 1


def shuffle_of(config: DataConfig, seed: int, global_batch: int) -> Shuffle:
    """The shuffle of a run."""
    return Shuffle(seed, global_batch, config.last_batch, config.shuffle_shards, config.streams)


class Rows(NamedTuple):
    """One batch of a rank: places in an epoch's order."""

    epoch: int
    order: Numbers
    """The whole epoch's."""
    places: Numbers
    """[B] int64, this batch's."""
    stride: int
    """Places from a sample to the one that stands in its position of the next global batch."""

    @property
    def numbers(self) -> Numbers:
        """[B] int64, the samples' numbers in their split."""
        return self.order[self.places]

    def substitute(self, row: int, attempt: int) -> int:
        """The sample that takes the place of an unreadable one: that of the same row in a later global batch.

        It depends on the order alone, so it is the same for every world size and worker count, and it mostly lies in
        the same window of shards. Past the epoch's end the rows are the next ones, else few steps an epoch would have
        the same few samples tried again and again.
        """
        place = int(self.places[row]) + attempt * self.stride
        return int(self.order[(place + place // len(self.order)) % len(self.order)])


def epoch_order(sizes: Sequence[int], shuffle: Shuffle, epoch: int) -> Numbers:
    """The permutation of a split's samples in which an epoch sees them, [sum(sizes)] int64.

    With ``shuffle_shards`` 0 and one stream it is a uniform random permutation. Otherwise the shards are put in random
    order and their samples cut into ``streams`` equal parts; in each part runs of ``shuffle_shards`` shards are
    shuffled; and global batches take equal shares of the parts in turn, what is left over coming last. After
    mosaicml streaming's canonical nodes. Sorting random keys depends on Philox's specification alone, where a
    library's shuffle may change between versions.

    Args:
        sizes: samples of each shard, in the manifest's order.
        shuffle: seed, global batch and the shape of the shuffle.
        epoch: 0 or more.
    """
    count, streams = sum(sizes), shuffle.streams
    if streams == 1 and not 0 < shuffle.shuffle_shards < len(sizes):
        return np.argsort(random_words(shuffle.seed, epoch, ALL, count), kind="stable")
    shards = np.argsort(random_words(shuffle.seed, epoch, SHARDS, len(sizes)), kind="stable")
    lengths = np.asarray(sizes, dtype=np.int64)
    starts = np.cumsum(lengths) - lengths
    # Samples shard by shard in the new order; the shard's place in that order is `of`.
    of = np.repeat(np.arange(len(sizes)), lengths[shards])
    first = np.cumsum(lengths[shards]) - lengths[shards]
    samples = np.arange(count) - first[of] + starts[shards][of]
    stream = np.arange(count) * streams // max(count, 1)
    if shuffle.shuffle_shards:
        opening = of[np.searchsorted(stream, np.arange(streams), side="left").clip(max=count - 1)]
        window = (of - opening[stream]) // shuffle.shuffle_shards
    else:
        window = np.zeros(count, dtype=np.int64)
    keys = random_words(shuffle.seed, epoch, WINDOWS, count)
    samples = samples[np.lexsort((keys, window, stream))]
    return _dealt(samples, stream, shuffle.global_batch, streams)


def num_steps_per_epoch(count: int, shuffle: Shuffle) -> int:
    """Global batches an epoch; the same for every rank.

    Raises:
        UserError: fewer samples than one global batch, or streams that do not divide it.
    """
    batch = shuffle.global_batch
    if count < batch:
        raise UserError(
            f"the split has {count} samples, fewer than the global batch of {batch}: set train.global_batch to {count}"
            " or less, or pack more images."
        )
    if batch % shuffle.streams:
        raise UserError(
            f"data.streams={shuffle.streams} does not divide train.global_batch={batch}; use 1 or a divisor."
        )
    return count // batch if shuffle.last_batch == "drop" else -(-count // batch)


def left_over(count: int, shuffle: Shuffle) -> int:
    """Samples that an epoch drops (negative: that it sees a second time) to end in a whole global batch."""
    return count - num_steps_per_epoch(count, shuffle) * shuffle.global_batch


def plan(sizes: Sequence[int], shuffle: Shuffle, *, share: slice, steps: Iterable[int]) -> Iterator[Rows]:
    """This rank's rows of each global step: positions ``share`` of global batch ``step % steps_per_epoch``."""
    count, batch = sum(sizes), shuffle.global_batch
    steps_per_epoch = num_steps_per_epoch(count, shuffle)
    mine = np.arange(batch)[share]
    known, order = -1, np.empty(0, dtype=np.int64)
    for step in steps:
        epoch, k = divmod(step, steps_per_epoch)
        if epoch != known:
            known, order = epoch, epoch_order(sizes, shuffle, epoch)
        yield Rows(epoch, order, (k * batch + mine) % count, batch)


def in_order(numbers: Sequence[int], batch: int, epoch: int) -> Iterator[Rows]:
    """These samples once, in this order; the last batch may be smaller."""
    order = np.array(numbers, dtype=np.int64)
    for start in range(0, len(order), batch):
        yield Rows(epoch, order, np.arange(start, min(start + batch, len(order))), batch)


def _dealt(samples: Numbers, stream: Numbers, global_batch: int, streams: int) -> Numbers:
    """Samples stream after stream, as global batches that take an equal share of each; the rest last."""
    steps, share = len(samples) // global_batch, global_batch // streams
    place = np.arange(len(samples)) - np.searchsorted(stream, stream, side="left")  # in its own stream
    dealt = place < steps * share
    batches = samples[dealt].reshape(streams, steps, share).swapaxes(0, 1)
    return np.concatenate((batches.reshape(-1), samples[~dealt]))
