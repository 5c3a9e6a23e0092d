"""NIH ChestX-ray14 (Wang et al. 2017, doi:10.1109/CVPR.2017.369): its table and split lists beside its images."""

from dataclasses import dataclass, replace

from shards.recipes.base import Dataset, Record, split_by_group
from shards.source import Index, Source, join
from tracekin.config import UserError

FINDINGS = [  # in the order of the paper
    *("Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax"),
    *("Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia"),
]
NONE = "No Finding"
TABLES = ("Data_Entry_2017.csv", "Data_Entry_2017_v2020.csv")
TRAIN_VAL, TEST = "train_val_list.txt", "test_list.txt"
SHARES = {"train": 7 / 8, "val": 1 / 8}  # of the official train_val list, by patient; the archive names no val split


@dataclass(frozen=True)
class Options:
    partial: bool = False
    """Leave out rows whose image is not there, as in a download of some of the archive's parts."""


def recipe(source: Source | None, options: Options, seed: int) -> Dataset:
    """Images anywhere below the source, 14 findings as sets ("No Finding" is the empty one), patients as groups.

    With the official lists, test is ``test_list.txt``, and ``train_val_list.txt`` is dealt out to train and val 7:1 by
    patient, stratified. Without them the packer splits.

    Raises:
        UserError: no table or several, missing columns, a row without image (unless ``partial``), an image without row,
            an unknown finding, a row without patient, one list without the other, an image in none or both of them.
    """
    if source is None:
        raise UserError(f"the recipe chestxray14 needs a SOURCE: a folder or zip with the images and {TABLES[0]}.")
    table = source.find_file("chestxray14", *TABLES)
    index = Index(source, source.require_images())
    records = []
    for where, name, row in join(index, table, "Image Index", ["Finding Labels", "Patient ID"], options.partial):
        image, label, patient = (
            row.pop("Image Index"),
            _findings(row.pop("Finding Labels"), where),
            row.pop("Patient ID"),
        )
        if not patient:
            raise UserError(f"{where}: Patient ID is empty; without it a split could leak a patient.")
        records.append(Record(image, source.reader(name), label, patient, None, source.stamp(name), row))
    return Dataset(_official_splits(source, records, seed), FINDINGS, "multilabel")


def _findings(cell: str, where: str) -> list[int]:
    names = [name.strip() for name in cell.split("|")]
    if names == [NONE]:
        return []
    unknown = [name for name in names if name not in FINDINGS]
    if unknown:
        raise UserError(
            f"{where}: Finding Labels has {unknown[0]!r}; accepted are {', '.join(FINDINGS)}, or {NONE} alone."
        )
    return sorted({FINDINGS.index(name) for name in names})


def _official_splits(source: Source, records: list[Record], seed: int) -> list[Record]:
    present = [any(name.split("/")[-1] == each for name in source.names) for each in (TRAIN_VAL, TEST)]
    if not any(present):
        return records
    if not all(present):
        has, lacks = (TRAIN_VAL, TEST) if present[0] else (TEST, TRAIN_VAL)
        raise UserError(f"{source.path} holds {has} but not {lacks}; add it, or remove both and let the packer split.")
    listed = [set(source.text(source.find_file("chestxray14", each)).split()) for each in (TRAIN_VAL, TEST)]
    for record in records:
        times = sum(record.source in names for names in listed)
        if times != 1:
            what = "neither" if times == 0 else "both"
            raise UserError(
                f"{source.path}: the image {record.source} stands in {what} of {TRAIN_VAL} and {TEST}; "
                "accepted is one of them (or remove both lists and let the packer split)."
            )
    test = [replace(record, split="test") for record in records if record.source in listed[1]]
    return split_by_group([record for record in records if record.source in listed[0]], seed, SHARES) + test
