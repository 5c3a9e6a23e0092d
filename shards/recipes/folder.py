"""Any folder or zip of images: a tree of class folders, images with a CSV, or images alone (unlabelled).

Tree: ``CLASS/...`` or ``train|val|test/CLASS/...``. CSV: columns image, label and, if wanted, group and split; several
labels are separated by ``|`` and make the task multilabel. The CSV decides where there is one.
"""

import difflib
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from shards.recipes.base import Dataset, Label, Record, Task, split_by_group
from shards.source import Source
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
    """Images with labels, groups and splits where the source states them; otherwise 70/10/20 by group, stratified.

    An unlabelled set without splits is all train: nothing could be scored on the rest.

    Raises:
        UserError: a row without image, an image without row, a label outside the declared classes, missing columns, an
            unknown split, splits or labels on some rows only, images outside the class folders.
    """
    if source is None:
        raise UserError("the recipe folder needs a SOURCE: a folder or zip of images.")
    table = _table(source, options)
    rows = _from_table(source, table) if table else _from_tree(source)
    names = sorted({label for _, labels, _ in rows for label in labels})
    classes = [name.strip() for name in options.classes.split(",") if name.strip()] or names
    multilabel = options.multilabel or any(len(labels) > 1 for _, labels, _ in rows)
    task: Task = "unlabelled" if not names else "multilabel" if multilabel else "multiclass"
    if task == "unlabelled":
        classes = []
    records = [replace(r, label=_label(labels, classes, task, where)) for r, labels, where in rows]
    _check_splits(records, [where for _, _, where in rows])
    if records[0].split is None:
        unlabelled = task == "unlabelled"
        records = [replace(r, split="train") for r in records] if unlabelled else split_by_group(records, seed)
    return Dataset(records, classes, task)


Row = tuple[Record, list[str], str]  # a record without label, its label names, where it is stated


def _table(source: Source, options: Options) -> str:
    tables = [name for name in source.names if name.lower().endswith(".csv")]
    if options.csv and options.csv not in tables:
        raise UserError(f"csv={options.csv}: no such table in {source.path}; it has {', '.join(tables) or 'none'}.")
    if not options.csv and len(tables) > 1:
        raise UserError(f"{source.path} holds several tables ({', '.join(tables)}); choose one with --option csv=NAME.")
    return options.csv or (tables[0] if tables else "")


def _from_table(source: Source, table: str) -> list[Row]:
    rows: dict[str, Row] = {}
    for number, row in enumerate(source.table(table, ["image", "label"]), 2):
        where = f"{source.path}: {table} row {number}"
        name = source.find_image(row["image"], where)
        if name in rows:
            raise UserError(f"{where} names the image {row['image']} a second time; remove one of the rows.")
        record = Record(name, source.reader(name), None, row.get("group") or None, row.get("split") or None)
        rows[name] = (record, [label.strip() for label in row["label"].split("|") if label.strip()], where)
    source.refuse_images_without_row(set(rows), table)
    return list(rows.values())


def _from_tree(source: Source) -> list[Row]:
    parts = [PurePosixPath(name).parts for name in source.images]
    common = 0  # a zip often wraps everything in one folder
    while len({p[common] for p in parts}) == 1 and min(map(len, parts)) > common + 1:
        common += 1
    inner = [p[common:] for p in parts]
    has_splits = all(len(p) > 2 and p[0] in SPLITS for p in inner)
    if has_splits:
        split_of = [p[0] for p in inner]
        inner = [p[1:] for p in inner]
    if any(len(p) > 1 for p in inner) and any(len(p) == 1 for p in inner):
        loose = next(name for name, p in zip(source.images, inner, strict=True) if len(p) == 1)
        raise UserError(f"{source.path}: {loose} lies outside the class folders; move it into one or give a CSV.")
    return [
        (
            Record(name, source.reader(name), None, None, split_of[i] if has_splits else None),
            [p[0]] if len(p) > 1 else [],
            f"{source.path}: {name}",
        )
        for i, (name, p) in enumerate(zip(source.images, inner, strict=True))
    ]


def _label(labels: list[str], classes: list[str], task: str, where: str) -> Label:
    for label in labels:
        if label not in classes:
            near = difflib.get_close_matches(label, classes, 1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise UserError(
                f"{where}: label {label!r} is outside the classes; accepted are {', '.join(classes)}.{hint}"
            )
    if task == "unlabelled":
        return None
    indices = sorted({classes.index(label) for label in labels})
    if task == "multilabel":
        return indices
    if not indices:
        raise UserError(f"{where} has no label; accepted are {', '.join(classes)} (or leave every label empty).")
    return indices[0]


def _check_splits(records: list[Record], wheres: list[str]) -> None:
    first: dict[str, tuple[str | None, str]] = {}
    for record, where in zip(records, wheres, strict=True):
        if record.split is None and records[0].split is None:
            continue
        if record.split not in SPLITS:
            raise UserError(f"{where}: split={record.split or ''!r} is not a split; accepted are {', '.join(SPLITS)}.")
        if records[0].split is None:
            raise UserError(f"{where} has a split but {wheres[0]} has none; state it in every row or in none.")
        split, other = first.setdefault(record.group_or_self, (record.split, where))
        if split != record.split:
            raise UserError(
                f"{where} puts the group {record.group} into {record.split}, but {other} into {split}; "
                "a group must lie in one split, or its images leak."
            )
