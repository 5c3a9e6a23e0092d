"""What a recipe gives to the packer: records, each with a lazy reader, the classes and the task.

A recipe is one module with a frozen dataclass ``Options`` and a function ``recipe(source, options, seed) -> Dataset``,
and one line in the registry (``shards/recipes/__init__.py``).
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

Task = Literal["multiclass", "multilabel", "unlabelled"]
Label = int | list[int] | None

SHARES = {"train": 0.7, "val": 0.1, "test": 0.2}


@dataclass(frozen=True)
class Record:
    """One image of a source."""

    source: str
    """The image's identifier, unique in its source; it never reaches the output, its pseudonym does."""
    read: Callable[[], bytes]
    """Reads the encoded image; picklable, since worker processes call it."""
    label: Label
    group: str | None = None
    """Patient or lesion; None makes the image a group of its own."""
    split: str | None = None
    """train, val or test as the source states it; None on every record lets the packer split."""
    stamp: str = ""
    """Changes when the image's bytes change, without reading them: size and time of a file, size and CRC of a zip's
    member. A packing that goes on after a kill redoes a shard whose stamps are others."""
    fields: Mapping[str, str] = field(default_factory=dict)
    """What else the source says of the image (age, sex, a DICOM keyword); reaches a sample only by ``--keep``."""

    @property
    def group_or_self(self) -> str:
        return f"image {self.source}" if self.group is None else f"group {self.group}"


@dataclass(frozen=True)
class Dataset:
    records: list[Record]
    classes: list[str]
    task: Task
    shares: Mapping[str, float] = field(default_factory=lambda: dict(SHARES))
    """Share of the images for each split, where no record states one."""


def split_by_group(records: Sequence[Record], seed: int, shares: Mapping[str, float] = SHARES) -> list[Record]:
    """Give each record the split that :func:`deal_groups` gives to its group."""
    split_of = deal_groups(records, seed, shares)
    return [replace(record, split=split_of[record.group_or_self]) for record in records]


def deal_groups(records: Sequence[Record], seed: int, shares: Mapping[str, float] = SHARES) -> dict[str, str]:
    """A split for each group (``Record.group_or_self``), stratified by class.

    One label an image: groups are shuffled within each class (a group's class is that of its first image) and dealt out
    so that the share of images, class by class, follows ``shares``. Several labels an image: groups are dealt out from
    the largest to the smallest, shuffled among those of one size, each to the split where it brings the counts of all
    labels, of images without label and of images closest to their shares. The result depends on the seed, not on the
    order of the records.
    """
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in sorted(records, key=lambda r: r.source):
        groups[record.group_or_self].append(record)
    deal = _deal_sets if any(isinstance(record.label, list) for record in records) else _deal_classes
    return deal(groups, seed, shares)


def _deal_classes(groups: Mapping[str, list[Record]], seed: int, shares: Mapping[str, float]) -> dict[str, str]:
    strata: dict[str, list[str]] = defaultdict(list)
    for group in sorted(groups):
        strata[str(groups[group][0].label)].append(group)
    split_of: dict[str, str] = {}
    for number, stratum in enumerate(sorted(strata)):
        names = strata[stratum]
        filled = dict.fromkeys(shares, 0)
        for index in np.random.default_rng([seed, number]).permutation(len(names)):
            # The split that is furthest behind its share gets the next group; on a tie the larger share.
            chosen = min(shares, key=lambda split: (filled[split] / shares[split], -shares[split]))
            split_of[names[index]] = chosen
            filled[chosen] += len(groups[names[index]])
    return split_of


def _deal_sets(groups: Mapping[str, list[Record]], seed: int, shares: Mapping[str, float]) -> dict[str, str]:
    counts = {group: _count_labels(groups[group]) for group in sorted(groups)}
    total: Counter[int] = sum(counts.values(), Counter())
    filled: dict[str, Counter[int]] = {split: Counter() for split in shares}
    names = list(counts)
    shuffled = [names[index] for index in np.random.default_rng(seed).permutation(len(names))]
    split_of: dict[str, str] = {}
    for group in sorted(shuffled, key=lambda name: -len(groups[name])):
        own = counts[group]
        chosen = min(shares, key=lambda split: _growth(own, filled[split], total, shares[split]))
        split_of[group] = chosen
        filled[chosen].update(counts[group])
    return split_of


def _growth(own: Counter[int], filled: Counter[int], total: Counter[int], share: float) -> float:
    """How much sum((count - wanted)**2 / wanted) grows; the sum is exact, so that no CPU decides a near tie."""
    wanted = {label: share * total[label] for label in own}
    return math.fsum(n * (2 * (filled[label] - wanted[label]) + n) / wanted[label] for label, n in own.items())


def _count_labels(records: list[Record]) -> Counter[int]:
    """How many of the images have each label; -1 counts those without label, -2 all."""
    counts = Counter({-2: len(records)})
    for record in records:
        assert isinstance(record.label, list)
        counts.update(record.label or [-1])
    return counts
