"""Finished shards as one list of samples, and what their splits leak: groups in several of them, identical images."""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from shards.job import Entry, Image
from shards.tar import read_image
from tracekin.data.manifest import SPLITS


@dataclass(frozen=True)
class Finished:
    """A finished shard."""

    file: str
    split: str
    entry: Entry


@dataclass(frozen=True, eq=False, slots=True)
class Sample:
    """One of its samples."""

    shard: Finished
    index: int

    @property
    def split(self) -> str:
        return self.shard.split

    @property
    def image(self) -> Image:
        return self.shard.entry.images[self.index]

    def read(self, folder: Path) -> bytes:
        """The packed image file; ``folder`` is where the shard lies."""
        with (folder / self.shard.file).open("rb") as file:
            return read_image(file, self.shard.entry.samples[self.index][0])


def list_samples(shards: Sequence[Finished]) -> list[Sample]:
    """In the order of splits, shards and samples."""
    ordered = sorted(shards, key=lambda shard: (SPLITS.index(shard.split), shard.file))
    return [Sample(shard, index) for shard in ordered for index in range(len(shard.entry.images))]


def leaking_groups(samples: Iterable[Sample]) -> list[list[Sample]]:
    """The samples of each group that lies in several splits."""
    return [inside for inside in _alike(samples, lambda sample: sample.image.group) if len(splits_of(inside)) > 1]


def identical_images(samples: Iterable[Sample], folder: Path) -> list[list[Sample]]:
    """Sets of two or more samples whose image files are equal, each in the order of ``samples``.

    Those of one mark are read again and compared by SHA-256: a short checksum proves nothing.
    """
    return [
        same
        for suspects in _alike(samples, lambda sample: sample.image.mark)
        if len(suspects) > 1
        for same in _alike(suspects, lambda sample: hashlib.sha256(sample.read(folder)).hexdigest())
        if len(same) > 1
    ]


def splits_of(samples: Iterable[Sample]) -> list[str]:
    """The splits that hold them, in the order of ``SPLITS``."""
    found = {sample.split for sample in samples}
    return [split for split in SPLITS if split in found]


def _alike(samples: Iterable[Sample], trait: Callable[[Sample], str]) -> Iterable[list[Sample]]:
    found: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        found[trait(sample)].append(sample)
    return found.values()
