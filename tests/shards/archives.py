"""Tiny sources in official layouts, and what a recipe makes of them."""

import io
from pathlib import Path

import numpy as np

from shards.recipes import RECIPES
from shards.source import Source
from tests.shards.sources import image_bytes
from tracekin.config import load

ISIC_TRUTH, ISIC_METADATA = "ISIC_2019_Training_GroundTruth.csv", "ISIC_2019_Training_Metadata.csv"
ISIC_COLUMNS = ["MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC", "UNK"]
CHEST_HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],"
)


def listed(recipe, path: Path | None, *options: str, seed=0):
    """The recipe's data set, as the packer asks for it."""
    module = RECIPES[recipe]
    return module.recipe(None if path is None else Source(path), load(module.Options, None, options), seed)


def isic_source(number=12, unknown=False):
    truth, metadata = [",".join(["image", *ISIC_COLUMNS])], ["image,age_approx,anatom_site_general,lesion_id,sex"]
    files = {}
    for i in range(number):
        name = f"ISIC_{i:07d}" + ("_downsampled" if i % 2 else "")
        diagnosis = 8 if unknown and i == 0 else i % 8
        truth.append(",".join([name, *("1.0" if k == diagnosis else "0.0" for k in range(9))]))
        lesion = "" if i % 3 == 0 else f"BCN_{i // 4:07d}"
        metadata.append(f"{name},{5 * i}.0,anterior torso,{lesion},female")
        files[f"ISIC_2019_Training_Input/{name}.jpg"] = image_bytes(i)
    return files | {
        ISIC_TRUTH: "\n".join(truth) + "\n",
        f"tables/{ISIC_METADATA}": "\n".join([metadata[0], *metadata[:0:-1]]) + "\n",
    }


def chest_source(patients=8, lists=False, table="Data_Entry_2017.csv"):
    findings = ["No Finding", "Mass", "Mass|Nodule", "Pleural_Thickening|Hernia|Atelectasis"]
    rows, files, names = [CHEST_HEADER], {}, []
    for patient in range(patients):
        for view in range(1 + patient % 3):
            name = f"{patient:08d}_{view:03d}.png"
            finding = findings[(patient + view) % 4]
            rows.append(f"{name},{finding},{view},{patient},058Y,M,PA,2682,2749,0.143,0.143,")
            files[f"images_{1 + patient % 2:03d}/images/{name}"] = image_bytes(10 * patient + view, "PNG", "L")
            names.append(name)
    files[table] = "\n".join(rows) + "\n"
    if lists:
        test = [name for name in names if int(name[:8]) % 4 == 0]
        files["test_list.txt"] = "\n".join(test)
        files["train_val_list.txt"] = "\n".join(name for name in names if name not in test) + "\n"
    return files


def medmnist_arrays(number=10, channels=3, width=1, side=9, classes=4, seed=0):
    rng = np.random.default_rng(seed)
    arrays = {}
    for split, count in (("train", number), ("val", 3), ("test", 4)):
        shape = (count, side, side, *((3,) if channels == 3 else ()))
        arrays[f"{split}_images"] = rng.integers(0, 256, shape, np.uint8)
        labels = rng.integers(0, 2 if width > 1 else classes, (count, width), np.uint8)
        if width == 1 and split == "train":
            labels[0] = classes - 1
        arrays[f"{split}_labels"] = labels
    return arrays


def npz_bytes(arrays):
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()
