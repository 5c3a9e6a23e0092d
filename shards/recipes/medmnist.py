"""MedMNIST (Yang et al. 2023, doi:10.1038/s41597-022-01721-8): any of its 2-D .npz files with its own splits."""

import io
import os
import shutil
import tempfile
import weakref
import zipfile
import zlib
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shards.recipes.base import Dataset, Label, Record, Task
from shards.source import Source
from tracekin.config import UserError
from tracekin.data.manifest import SPLITS

_ORGANS = "bladder|femur-left|femur-right|heart|kidney-left|kidney-right|liver|lung-left|lung-right|pancreas|spleen"
OFFICIAL = {
    "pathmnist": "adipose|background|debris|lymphocytes|mucus|smooth muscle|normal colon mucosa|"
    "cancer-associated stroma|colorectal adenocarcinoma epithelium",
    "chestmnist": "atelectasis|cardiomegaly|effusion|infiltration|mass|nodule|pneumonia|pneumothorax|consolidation|"
    "edema|emphysema|fibrosis|pleural|hernia",
    "dermamnist": "actinic keratoses and intraepithelial carcinoma|basal cell carcinoma|benign keratosis-like lesions|"
    "dermatofibroma|melanoma|melanocytic nevi|vascular lesions",
    "octmnist": "choroidal neovascularization|diabetic macular edema|drusen|normal",
    "pneumoniamnist": "normal|pneumonia",
    "retinamnist": "0|1|2|3|4",
    "breastmnist": "malignant|normal, benign",
    "bloodmnist": "basophil|eosinophil|erythroblast|"
    "immature granulocytes(myelocytes, metamyelocytes and promyelocytes)|lymphocyte|monocyte|neutrophil|platelet",
    "tissuemnist": "Collecting Duct, Connecting Tubule|Distal Convoluted Tubule|Glomerular endothelial cells|"
    "Interstitial endothelial cells|Leukocytes|Podocytes|Proximal Tubule Segments|Thick Ascending Limb",
    "organamnist": _ORGANS,
    "organcmnist": _ORGANS,
    "organsmnist": _ORGANS,
}  # class names by the file's name
PNG_LEVEL = 1  # of 9; 6 takes about three times as long for a few per cent


@dataclass(frozen=True)
class Options:
    classes: str = ""
    """Names of the classes in order, separated by commas; by default the official ones of the set after which the file
    is called, or "0", "1", ..."""


def recipe(source: Source | None, options: Options, seed: int) -> Dataset:
    """The images of an .npz with arrays ``train_images``, ``train_labels`` and the same of val and test.

    Images are uint8 [N, H, W] or [N, H, W, 3]. Labels [N, 1] are class indices; [N, C] with C > 1 hold 0 or 1 for each
    class. Each image is its own group. Image arrays are decompressed into temporary files, which every worker maps;
    they go with the last record or at the end of the process (a kill leaves them in the system's temporary folder).

    Raises:
        UserError: no .npz or several, a missing array, another shape or type (3-D sets have a fourth axis), labels out
            of range, a wrong number of classes, no room for the temporary files.
    """
    if source is None:
        raise UserError("the recipe medmnist needs a SOURCE: an .npz file of MedMNIST or a folder that holds it.")
    archive = _archive(source)
    labels = {split: _labels(archive, split) for split in SPLITS}
    sizes = {split: _check_images(archive, split) for split in SPLITS}
    for split in SPLITS:
        if len(labels[split]) != sizes[split]:
            raise UserError(
                f"{archive.path} has {sizes[split]} {split}_images but {len(labels[split])} {split}_labels; "
                "download it again."
            )
    task, number = _task(archive, labels)
    classes = _classes(archive, options, number)
    records = []
    for split in SPLITS:
        member = f"{split}_images.npy"
        array, stamp = _Array(archive, member), archive.stamp(member)
        for index, row in enumerate(labels[split].tolist()):
            label: Label = row[0] if task == "multiclass" else [k for k, value in enumerate(row) if value]
            records.append(Record(f"{split}/{index}", partial(array.read, index), label, None, split, stamp))
    return Dataset(records, classes, task)


class _Array:
    """One array of an .npz in a temporary file, mapped by whoever reads an image; pickles to the file's name.

    The file is removed when the object goes, at the latest at the end of the process that made it; copies in other
    processes leave it alone.
    """

    def __init__(self, archive: Source, member: str) -> None:
        descriptor, self.path = tempfile.mkstemp(prefix="tracekin-medmnist-", suffix=".npy")
        weakref.finalize(self, _remove, Path(self.path), os.getpid())
        where = f"{archive.path}: {member}"
        try:
            with os.fdopen(descriptor, "wb") as file, archive.opener(member)() as packed:
                shutil.copyfileobj(packed, file, 1 << 20)
        except OSError as error:
            raise UserError(
                f"{where} cannot be decompressed into {self.path}: {error.strerror or error}; "
                "choose another folder with TMPDIR."
            ) from None
        except (EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{where} is damaged: {error}; download it again.") from None

    def read(self, index: int) -> bytes:
        """One image as PNG."""
        buffer = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(_map(self.path)[index])).save(buffer, "PNG", compress_level=PNG_LEVEL)
        return buffer.getvalue()


def _remove(path: Path, owner: int) -> None:
    if os.getpid() == owner:  # not where a forked worker ends
        path.unlink(missing_ok=True)


@lru_cache(maxsize=len(SPLITS))
def _map(path: str) -> NDArray[np.uint8]:
    return np.asanyarray(np.load(path, mmap_mode="r", allow_pickle=False))


def _archive(source: Source) -> Source:
    """The .npz, which is a zip of .npy files, as a source of its own."""
    if source.zipped and any(name.endswith(".npy") for name in source.names):
        return source
    found = [name for name in source.names if name.endswith(".npz")]
    if source.zipped or len(found) != 1:
        what = "a zip, but no .npz" if source.zipped else f"a folder with {len(found)} .npz files"
        raise UserError(f"{source.path} is {what}; the recipe medmnist needs one .npz file: name it as SOURCE.")
    return Source(source.path / found[0])


def _check_images(archive: Source, split: str) -> int:
    """How many images there are; refuses what is no array of 2-D images before any of it is decompressed."""
    member = f"{split}_images.npy"
    with _open(archive, member) as file:
        try:
            read_header: Any = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[np.lib.format.read_magic(file)]
            shape, fortran, dtype = read_header(file)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{archive.path}: {member} cannot be read: {error}; download it again.") from None
    if len(shape) == 4 and shape[3] != 3:
        raise UserError(
            f"{archive.path}: {member} has the shape {shape}: volumes. Accepted are images, [N, H, W] or [N, H, W, 3]."
        )
    if len(shape) not in (3, 4) or 0 in shape[1:] or dtype != np.uint8 or fortran:
        raise UserError(
            f"{archive.path}: {member} is {dtype} of the shape {shape}; accepted is uint8 [N, H, W] or [N, H, W, 3]."
        )
    return int(shape[0])


def _labels(archive: Source, split: str) -> NDArray[np.int64]:
    """[N, C], integers."""
    member = f"{split}_labels.npy"
    with _open(archive, member) as file:
        try:
            labels = np.lib.format.read_array(file, allow_pickle=False)
        except (OSError, ValueError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{archive.path}: {member} cannot be read: {error}; download it again.") from None
    if labels.ndim != 2 or labels.dtype.kind not in "iub" or labels.shape[1] == 0:
        raise UserError(
            f"{archive.path}: {member} is {labels.dtype} of the shape {labels.shape}; accepted are integers [N, C]."
        )
    return labels.astype(np.int64)


def _task(archive: Source, labels: dict[str, NDArray[np.int64]]) -> tuple[Task, int]:
    """The task and the number of classes."""
    widths = {split: part.shape[1] for split, part in labels.items()}
    if len(set(widths.values())) > 1:
        raise UserError(f"{archive.path}: labels are {widths} columns wide; download it again.")
    values = np.concatenate([part.ravel() for part in labels.values()])
    low, high = (int(values.min()), int(values.max())) if len(values) else (0, 0)
    width = widths[SPLITS[0]]
    if low < 0 or (width > 1 and high > 1):
        accepted = "0 and 1 for each class" if width > 1 else "class indices from 0"
        raise UserError(f"{archive.path}: labels go from {low} to {high}; accepted are {accepted}.")
    return ("multilabel", width) if width > 1 else ("multiclass", high + 1)


def _classes(archive: Source, options: Options, number: int) -> list[str]:
    declared = [name.strip() for name in options.classes.split(",") if name.strip()]
    if declared and len(declared) != number:
        raise UserError(f"classes={options.classes} names {len(declared)} classes; {archive.path} has {number}.")
    official = OFFICIAL.get(archive.path.stem.split("_")[0].lower(), "").split("|")
    return declared or (official if len(official) == number else [str(index) for index in range(number)])


def _open(archive: Source, member: str) -> BinaryIO:
    if member not in archive.names:
        raise UserError(
            f"{archive.path} lacks the array {member.removesuffix('.npy')}; it has "
            f"{', '.join(name.removesuffix('.npy') for name in archive.names) or 'none'}."
        )
    try:
        return archive.opener(member)()
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise UserError(f"{archive.path}: {member} cannot be read: {error}; download it again.") from None
