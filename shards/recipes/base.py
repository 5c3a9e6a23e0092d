"""What a recipe gives to the packer: records, each with a lazy reader, the classes and the task.

A recipe is a function ``recipe(source, options, seed) -> Dataset`` beside a frozen dataclass ``Options``.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

Task = Literal["multiclass", "multilabel", "unlabelled"]
Label = int | list[int] | None


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
    """train, val or test."""


@dataclass(frozen=True)
class Dataset:
    records: list[Record]
    classes: list[str]
    task: Task


@dataclass(frozen=True)
class Source:
    path: Path


def split_by_group(records: Sequence[Record], shares: dict[str, float], seed: int) -> list[Record]:
    """Give each record a split so that no group is in two of them, stratified by class.

    Groups are shuffled within each class (a group's class is its first record's label) and dealt out so that the
    share of images, class by class, follows ``shares``. The result does not depend on the order of the records.
    """
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in sorted(records, key=lambda r: r.source):
        groups[record.source if record.group is None else record.group].append(record)
    strata: dict[str, list[str]] = defaultdict(list)
    for group in sorted(groups):
        strata[str(groups[group][0].label)].append(group)
    split_of: dict[str, str] = {}
    for number, stratum in enumerate(sorted(strata)):
        names = strata[stratum]
        filled = dict.fromkeys(shares, 0.0)
        for index in np.random.default_rng([seed, number]).permutation(len(names)):
            # the split that is furthest behind its share gets the next group
            chosen = min(shares, key=lambda split: (filled[split] / shares[split], -shares[split]))
            split_of[names[index]] = chosen
            filled[chosen] += len(groups[names[index]])
    return [replace(r, split=split_of[r.source if r.group is None else r.group]) for r in records]
