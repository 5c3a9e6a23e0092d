"""Labels in a user's own words: rows of a table or names of folders to a data set, for the recipes folder and dicom."""

import difflib
from dataclasses import dataclass, field, replace

from shards.recipes.base import Dataset, Label, Record, Task
from shards.source import Index, join
from tracekin.config import UserError
from tracekin.data.manifest import SPLITS

COLUMNS = ("image", "label", "group", "split")


@dataclass(frozen=True)
class Stated:
    """What a source says of one image."""

    where: str
    labels: list[str] = field(default_factory=list)
    group: str | None = None
    split: str | None = None
    fields: dict[str, str] = field(default_factory=dict)


def read_labels(index: Index, table: str, key: str = "image") -> dict[str, Stated]:
    """What each row of a table says: ``key`` and label, if wanted group and split; further columns become fields.

    Raises:
        UserError: a row without image, an image without row, two rows of one image, missing columns.
    """
    return {
        name: Stated(
            where,
            [label.strip() for label in row["label"].split("|") if label.strip()],
            row.get("group") or None,
            row.get("split") or None,
            {column: cell for column, cell in row.items() if column not in (key, *COLUMNS)},
        )
        for where, name, row in join(index, table, key, ["label"])
    }


def labelled(rows: list[tuple[Record, Stated]], classes: str, multilabel: bool) -> Dataset:
    """The data set of records that lack their labels; unlabelled, and without splits all train, if none is stated.

    Args:
        rows: records, each with what the source says of it; not empty.
        classes: declared classes in order, separated by commas; by default those that occur, sorted.
        multilabel: read the labels as sets even if no image has several.

    Raises:
        UserError: a label outside the declared classes, labels or splits on some rows only, an unknown split.
    """
    names = sorted({label for _, stated in rows for label in stated.labels})
    chosen = [name.strip() for name in classes.split(",") if name.strip()] or names
    several = multilabel or any(len(stated.labels) > 1 for _, stated in rows)
    task: Task = "unlabelled" if not names else "multilabel" if several else "multiclass"
    _check_splits([stated for _, stated in rows])
    alone = "train" if task == "unlabelled" else None
    records = [replace(r, label=_label(s, chosen, task), split=s.split or alone) for r, s in rows]
    return Dataset(records, [] if task == "unlabelled" else chosen, task)


def _label(stated: Stated, classes: list[str], task: Task) -> Label:
    if task == "unlabelled":
        return None
    for label in stated.labels:
        if label not in classes:
            near = difflib.get_close_matches(label, classes, 1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise UserError(
                f"{stated.where}: label {label!r} is outside the classes; accepted are {', '.join(classes)}.{hint}"
            )
    indices = sorted({classes.index(label) for label in stated.labels})
    if task == "multilabel":
        return indices
    if not indices:
        raise UserError(f"{stated.where} has no label; accepted are {', '.join(classes)} (or leave every label empty).")
    return indices[0]


def _check_splits(rows: list[Stated]) -> None:
    first = rows[0]
    for stated in rows:
        if stated.split is None and first.split is None:
            continue
        if stated.split not in SPLITS:
            raise UserError(
                f"{stated.where}: split={stated.split or ''!r} is not a split; accepted are {', '.join(SPLITS)}."
            )
        if first.split is None:
            raise UserError(f"{stated.where} has a split but {first.where} has none; state it in every row or in none.")
