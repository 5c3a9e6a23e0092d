"""HAM10000 (Tschandl et al. 2018, doi:10.1038/sdata.2018.161): its official metadata table beside its images."""

from dataclasses import dataclass
from pathlib import PurePosixPath

from shards.recipes.base import Dataset, Record, split_by_group
from shards.source import Source
from tracekin.config import UserError

CLASSES = ["akiec", "bcc", "bkl", "df", "mel", "nv", "vasc"]
TABLE = "HAM10000_metadata.csv"


@dataclass(frozen=True)
class Options:
    """No option: the table says everything."""


def recipe(source: Source | None, options: Options, seed: int) -> Dataset:
    """Images anywhere below the source; train, val, test 70/10/20 by lesion, stratified by diagnosis.

    Raises:
        UserError: no table or several, missing columns, a row without image, an image without row,
            an unknown diagnosis.
    """
    if source is None:
        raise UserError("the recipe ham10000 needs a SOURCE: a folder or zip with the images and " + TABLE + ".")
    tables = [name for name in source.names if PurePosixPath(name).name == TABLE]
    if len(tables) != 1:
        raise UserError(
            f"{source.path} holds {len(tables)} files called {TABLE}; the recipe ham10000 needs exactly one."
        )
    records: dict[str, Record] = {}
    for number, row in enumerate(source.table(tables[0], ["lesion_id", "image_id", "dx"]), 2):
        where = f"{source.path}: {tables[0]} row {number}"
        name = source.find_image(row["image_id"], where)
        if name in records:
            raise UserError(f"{where} names the image {row['image_id']} a second time; remove one of the rows.")
        if row["dx"] not in CLASSES:
            raise UserError(f"{where}: dx={row['dx']!r} is not a diagnosis; accepted are {', '.join(CLASSES)}.")
        if not row["lesion_id"]:
            raise UserError(f"{where}: lesion_id is empty; without it a split could leak a lesion.")
        label = CLASSES.index(row["dx"])
        records[name] = Record(row["image_id"], source.reader(name), label, row["lesion_id"])
    source.refuse_images_without_row(set(records), tables[0])
    return Dataset(split_by_group(list(records.values()), seed), CLASSES, "multiclass")
