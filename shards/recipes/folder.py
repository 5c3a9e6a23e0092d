"""Any folder or zip of images: a tree of class folders, images with a CSV, or images alone (unlabelled).

Tree: ``CLASS/...`` or ``train|val|test/CLASS/...``. CSV: columns image, label and, if wanted, group and split; several
labels are separated by ``|`` and make the task multilabel. The CSV decides where there is one.
"""

from dataclasses import dataclass
from pathlib import PurePosixPath

from shards.recipes.base import Dataset, Record
from shards.recipes.labels import Stated, labelled, read_labels
from shards.source import Index, Source
from tracekin.config import UserError
from tracekin.data.manifest import SPLITS


@dataclass(frozen=True)
class Options:
    csv: str = ""
    """The table's name inside the source; by default the only .csv file in it."""
    classes: str = ""
    """Declared classes in order, separated by commas; by default those that occur, sorted."""
    multilabel: bool = False
    """Read the labels as sets even if no row has several."""


def recipe(source: Source | None, options: Options, seed: int) -> Dataset:
    """Images with labels, groups and splits where the source states them; without splits the packer makes them.

    Splits are taken as they are, even where a group or an image lies in several. An unlabelled set without splits is
    all train: nothing could be scored on the rest.

    Raises:
        UserError: a row without image, an image without row, a label outside the declared classes, missing columns, an
            unknown split, splits or labels on some rows only, images outside the class folders.
    """
    if source is None:
        raise UserError("the recipe folder needs a SOURCE: a folder or zip of images.")
    source.require_images()
    table = _table(source, options)
    stated = read_labels(Index(source, source.images), table) if table else _from_tree(source)
    rows = [
        (Record(name, source.reader(name), None, said.group, None, source.stamp(name), said.fields), said)
        for name, said in stated.items()
    ]
    return labelled(rows, options.classes, options.multilabel)


def _table(source: Source, options: Options) -> str:
    tables = source.tables
    if options.csv and options.csv not in tables:
        raise UserError(f"csv={options.csv}: no such table in {source.path}; it has {', '.join(tables) or 'none'}.")
    if not options.csv and len(tables) > 1:
        raise UserError(f"{source.path} holds several tables ({', '.join(tables)}); choose one with --option csv=NAME.")
    return options.csv or (tables[0] if tables else "")


def _from_tree(source: Source) -> dict[str, Stated]:
    parts = [PurePosixPath(name).parts for name in source.images]
    common = 0  # a zip often wraps everything in one folder
    while len({p[common] for p in parts}) == 1 and min(map(len, parts)) > common + 1:
        common += 1
    inner = [p[common:] for p in parts]
    splits: list[str | None] = [None] * len(inner)
    if all(len(p) > 2 and p[0] in SPLITS for p in inner):
        splits = [p[0] for p in inner]
        inner = [p[1:] for p in inner]
    if any(len(p) > 1 for p in inner) and any(len(p) == 1 for p in inner):
        loose = next(name for name, p in zip(source.images, inner, strict=True) if len(p) == 1)
        raise UserError(f"{source.path}: {loose} lies outside the class folders; move it into one or give a CSV.")
    return {
        name: Stated(f"{source.path}: {name}", [p[0]] if len(p) > 1 else [], None, split)
        for name, p, split in zip(source.images, inner, splits, strict=True)
    }
