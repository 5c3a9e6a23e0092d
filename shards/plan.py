"""What will be packed: every shard's samples, known before a byte is read. Each shard is a job of its own.

A shard's fingerprint names what decides its bytes, as far as the source can tell without being read. A shard that lies
finished under its fingerprint is done, whoever packed it and when.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import PIL

from shards.pseudonym import pseudonym
from shards.recipes import RECIPES
from shards.recipes.base import Dataset, Record, Task, deal_groups
from shards.source import Source
from tracekin.config import UserError, load
from tracekin.data.manifest import LONGEST_NAME, SPLITS, is_name

VERSION = 1
"""Raised when the packer writes other bytes for the same source, so that nothing old is taken for finished."""
MEASURED = (1 / 128, 128, 1024)
"""Share of the train images that give mean and standard deviation, but at least and at most so many. Decoding takes
longer than all else: one image in 128 costs about a tenth of the rest where images are large."""
_encode = json.JSONEncoder(separators=(",", ":")).encode


@dataclass(frozen=True)
class Settings:
    """What decides the bytes of the output besides the source."""

    secret: bytes
    seed: int = 0
    size: int | None = None
    """Pixels of the shortest side; None leaves the pixels untouched."""
    max_rejected: float = 0.05
    """Largest share of unreadable images."""
    shard_samples: int = 1024
    name: str = ""
    """The manifest's name; empty takes the output folder's."""
    keep: tuple[str, ...] = ()
    """Fields of the source that samples shall carry."""


@dataclass(frozen=True, slots=True)
class Item:
    """One image of the plan."""

    key: str
    record: Record


@dataclass(frozen=True, eq=False)
class ShardPlan:
    file: str
    split: str
    items: list[Item]
    measured: int
    """How many images give their channels to the statistics."""
    fingerprint: str


@dataclass(frozen=True)
class Plan:
    secret: bytes
    recipe: str
    name: str
    task: Task
    classes: list[str]
    given_splits: bool
    """The source states the splits; otherwise they are ours."""
    size: int | None
    """Shortest side to resize to; None leaves the pixels untouched."""
    keep: tuple[str, ...]
    max_rejected: float
    shards: list[ShardPlan]

    @property
    def fingerprint(self) -> str:
        return _hash([self.recipe, self.task, self.classes, self.given_splits, [s.fingerprint for s in self.shards]])

    def group(self, record: Record) -> str:
        """The pseudonym of its group."""
        return pseudonym(self.secret, f"{self.recipe}/group", record.group_or_self)

    def describe(self, record: Record, group: str) -> bytes:
        """The content of ``KEY.json``."""
        label = record.label if isinstance(record.label, int) else _encode(record.label)
        fields = f',"fields":{_encode(_kept(record, self.keep))}' if self.keep else ""
        return f'{{"label":{label},"group":"{group}"{fields}}}\n'.encode()


def make_dataset(
    source: Path | None, recipe: str, options: tuple[str, ...], settings: Settings
) -> tuple[Dataset, Any, bool]:
    """Let a recipe list its records.

    Returns:
        the records, the recipe's options, and whether it draws images at ``settings.size`` itself.

    Raises:
        UserError: unknown recipe or option, or whatever the recipe finds wrong with the source.
    """
    if recipe not in RECIPES:
        raise UserError(f"unknown recipe {recipe!r}; accepted are {', '.join(RECIPES)}.")
    module = RECIPES[recipe]
    draws = any(field.name == "size" for field in fields(module.Options))
    if draws and settings.size is not None:
        options = (*options, f"size={settings.size}")
    chosen: Any = load(module.Options, None, options)
    return module.recipe(None if source is None else Source(source), chosen, settings.seed), chosen, draws


def make_plan(source: Path | None, recipe: str, options: tuple[str, ...], settings: Settings, out: Path) -> Plan:
    """List the source, split it, and cut each split into shards, samples in the order of their keys.

    Raises:
        UserError: a mistake in the arguments or the source, ``keep`` names no field, no image is in the split train.
    """
    dataset, chosen, draws = make_dataset(source, recipe, options, settings)
    keep = tuple(sorted(set(settings.keep)))
    _check_fields(keep, dataset.records)
    given = any(record.split is not None for record in dataset.records)
    split_of = {} if given else deal_groups(dataset.records, settings.seed, dataset.shares)
    size = None if draws else settings.size
    # Not the name, the classes' names or the limit of rejected images: no shard holds them.
    basis = [VERSION, PIL.__version__, recipe, asdict(chosen), settings.seed, size]
    items = _sorted_items(dataset.records, split_of, partial(pseudonym, settings.secret, f"{recipe}/image"))
    shards = list(_cut(items, settings.shard_samples, keep, basis))
    if not any(shard.split == "train" for shard in shards):
        raise no_train_image(out, {shard.split for shard in shards})
    name = settings.name or out.name
    if not is_name(name):
        raise UserError(f"--name {name!r}: accepted are up to {LONGEST_NAME} characters that print.")
    secret = settings.secret
    return Plan(secret, recipe, name, dataset.task, dataset.classes, given, size, keep, settings.max_rejected, shards)


def no_train_image(out: Path, splits: Iterable[str]) -> UserError:
    held = ", ".join(split for split in SPLITS if split in splits) or "no image at all"
    return UserError(f"no readable image falls into the split train of {out}; it has {held}.")


def _sorted_items(
    records: Iterable[Record], split_of: Mapping[str, str], key_of: Callable[[str], str]
) -> dict[str, list[Item]]:
    items: dict[str, list[Item]] = {split: [] for split in SPLITS}
    for record in records:
        items[record.split or split_of[record.group_or_self]].append(Item(key_of(record.source), record))
    for inside in items.values():
        inside.sort(key=lambda item: item.key)
    assert len({item.key for inside in items.values() for item in inside}) == sum(map(len, items.values()))
    return items


def _cut(items: dict[str, list[Item]], step: int, keep: tuple[str, ...], basis: list[Any]) -> Iterable[ShardPlan]:
    for split, inside in items.items():
        starts = range(0, len(inside), step)
        share, least, most = MEASURED
        wanted = min(max(int(share * len(inside)), least), most)
        # Evenly over the shards; keys are a fixed shuffle, so the first samples of a shard are a random choice.
        measured = step if len(inside) <= wanted else math.ceil(wanted / len(starts))
        for number, start in enumerate(starts):
            part = inside[start : start + step]
            count = min(measured, len(part)) if split == "train" else 0
            rows = [[i.key, r.group_or_self, r.label, r.stamp, _kept(r, keep)] for i in part for r in (i.record,)]
            yield ShardPlan(f"{split}-{number:06d}.tar", split, part, count, _hash([basis, count, rows]))


def _check_fields(keep: tuple[str, ...], records: list[Record]) -> None:
    accepted = sorted({name for record in records for name in record.fields}) if keep else []
    for name in keep:
        if name not in accepted:
            raise UserError(
                f"--keep {name}: the source has no such field; accepted are {', '.join(accepted) or 'none'}."
            )


def _kept(record: Record, keep: tuple[str, ...]) -> dict[str, str]:
    return {name: record.fields[name] for name in keep if name in record.fields}


def _hash(value: Any) -> str:
    return hashlib.sha256(_encode(value).encode()).hexdigest()[:32]
