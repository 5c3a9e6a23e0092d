"""HAM10000 (Tschandl et al. 2018, doi:10.1038/sdata.2018.161): its official metadata table beside its images."""

from dataclasses import dataclass

from shards.recipes.base import Dataset, Record
from shards.source import Index, Source, join
from tracekin.config import UserError

CLASSES = ["akiec", "bcc", "bkl", "df", "mel", "nv", "vasc"]
TABLE = "HAM10000_metadata.csv"


@dataclass(frozen=True)
class Options:
    """No option: the table says everything."""


def recipe(source: Source | None, options: Options, seed: int) -> Dataset:
    """Images anywhere below the source, diagnoses, lesions as groups; the packer splits them by lesion.

    Raises:
        UserError: no table or several, missing columns, a row without image, an image without row,
            an unknown diagnosis, a row without lesion.
    """
    if source is None:
        raise UserError("the recipe ham10000 needs a SOURCE: a folder or zip with the images and " + TABLE + ".")
    table = source.find_file("ham10000", TABLE)
    records = []
    for where, name, row in join(Index(source, source.require_images()), table, "image_id", ["lesion_id", "dx"]):
        if row["dx"] not in CLASSES:
            raise UserError(f"{where}: dx={row['dx']!r} is not a diagnosis; accepted are {', '.join(CLASSES)}.")
        if not row["lesion_id"]:
            raise UserError(f"{where}: lesion_id is empty; without it a split could leak a lesion.")
        label = CLASSES.index(row["dx"])
        fields = {column: cell for column, cell in row.items() if column not in ("image_id", "lesion_id", "dx")}
        records.append(
            Record(row["image_id"], source.reader(name), label, row["lesion_id"], None, source.stamp(name), fields)
        )
    return Dataset(records, CLASSES, "multiclass")
