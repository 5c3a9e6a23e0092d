"""ISIC 2019, training part (HAM10000, BCN20000 and MSK together): its two official tables beside its images."""

from dataclasses import dataclass

from shards.recipes.base import Dataset, Record
from shards.source import Index, Source, join
from tracekin.config import UserError

DIAGNOSES = ["MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC"]
UNKNOWN = "UNK"  # the ninth column, of which the official training table has no image
TRUTH, METADATA = "ISIC_2019_Training_GroundTruth.csv", "ISIC_2019_Training_Metadata.csv"


@dataclass(frozen=True)
class Options:
    """No option: the tables say everything."""


def recipe(source: Source | None, options: Options, seed: int) -> Dataset:
    """Images and tables anywhere below the source; groups are lesions, an image without lesion is its own.

    Classes are the eight diagnoses, whether or not each occurs, and UNK only if it occurs. The packer splits by lesion.

    Raises:
        UserError: a table missing or twice, missing columns, a row without image, an image without row in either table,
            a row with no diagnosis or several.
    """
    if source is None:
        raise UserError(f"the recipe isic2019 needs a SOURCE: a folder or zip with the images, {TRUTH} and {METADATA}.")
    truth, metadata = source.find_file("isic2019", TRUTH), source.find_file("isic2019", METADATA)
    about = _metadata(source, metadata)
    columns = [*DIAGNOSES, UNKNOWN]
    records = []
    for where, name, row in join(Index(source, source.require_images()), truth, "image", columns):
        if row["image"] not in about:
            raise UserError(f"{where} names the image {row['image']}, which has no row in {metadata}; add it.")
        fields = about[row["image"]]
        label = _diagnosis(row, columns, where)
        lesion = fields.pop("lesion_id") or None
        records.append(Record(row["image"], source.reader(name), label, lesion, None, source.stamp(name), fields))
    classes = columns if any(record.label == columns.index(UNKNOWN) for record in records) else DIAGNOSES
    return Dataset(records, classes, "multiclass")


def _metadata(source: Source, table: str) -> dict[str, dict[str, str]]:
    rows: dict[str, dict[str, str]] = {}
    for number, row in enumerate(source.table(table, ["image", "lesion_id"]), 2):
        image = row.pop("image")
        if image in rows:
            raise UserError(f"{source.path}: {table} row {number} names the image {image} a second time; remove one.")
        rows[image] = row
    return rows


def _diagnosis(row: dict[str, str], columns: list[str], where: str) -> int:
    try:
        values = [float(row[column]) for column in columns]
    except ValueError:
        values = []
    if sorted(values) != [0.0] * (len(columns) - 1) + [1.0]:
        stated = ", ".join(f"{column}={row[column]}" for column in columns if row[column] not in ("0", "0.0"))
        raise UserError(
            f"{where} states {stated or 'no diagnosis'}; accepted: 1.0 in one of {', '.join(columns)}, 0.0 else."
        )
    return values.index(1.0)
