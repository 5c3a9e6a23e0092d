"""manifest.json: what a packed dataset holds and where each sample's bytes lie. The contract of shards/README.md.

``shards`` writes it, training and evaluation read it. Nothing heavy is imported here.
"""

import difflib
import hashlib
import json
import os
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from tracekin.config import UserError, holds_control
from tracekin.data.remote import is_remote, read_text
from tracekin.files import write_text

FORMAT = 2
SPLITS = ("train", "val", "test")
TASKS = ("multiclass", "multilabel", "unlabelled")
LONGEST_NAME = 100
"""Characters of a set's name: files of evaluations are called after it."""
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Shard:
    """One WebDataset tar."""

    file: str
    """Path relative to the manifest."""
    bytes: int
    """Size of the file."""
    sha256: str
    """Of the whole file, hexadecimal."""
    samples: list[list[int]]
    """[offset, length, CRC-32] of each sample: its tar members, headers and padding included, in bytes."""


@dataclass(frozen=True)
class Manifest:
    name: str
    recipe: str
    task: Literal["multiclass", "multilabel", "unlabelled"]
    """multiclass: KEY.json holds a class index under `label`; multilabel: a list of them; unlabelled: null."""
    classes: list[str]
    mean: list[float]
    """Of each channel over the train split, pixel values in 0..1; one number for grey images, three for RGB."""
    std: list[float]
    splits: dict[str, list[Shard]]
    folder: str
    """Where manifest.json lies: a folder or a URL (s3://, gs://, https://), without a slash at its end; not written."""
    leaks: dict[str, int] = field(default_factory=dict)
    """What the source's own splits leak: `groups` that lie in several splits, and `images` of which several splits hold
    identical copies. Splits that shards.pack makes leak no group and no identical file."""

    @property
    def path(self) -> str:
        return f"{self.folder}/manifest.json"

    def count(self, split: str) -> int:
        return sum(len(shard.samples) for shard in self.shards(split))

    def fingerprint(self) -> str:
        """Names these very shards: equal for copies, different as soon as one byte of a sample is."""
        sums = [shard.sha256 for split in sorted(self.splits) for shard in self.splits[split]]
        return hashlib.sha256("".join(sums).encode()).hexdigest()[:16]

    def shards(self, split: str) -> list[Shard]:
        """The split's shards.

        Raises:
            UserError: if there is no such split.
        """
        if not self.splits.get(split):
            held = ", ".join(name for name, shards in self.splits.items() if shards) or "none"
            raise UserError(f"{self.path} has no split {split!r}; it has {held}.")
        return self.splits[split]


def read_manifest(path: str | Path, complete: bool = True) -> Manifest:
    """Read and check a manifest.

    Args:
        path: manifest.json, or its folder if that is local; or the URL of a manifest.json.
        complete: refuse a local set that lacks shards. Whether those of a URL are there shows when they are read.

    Raises:
        UserError: missing file, not a manifest, other format version, missing shard or a shard of another size.
    """
    where = str(path)
    if is_remote(where):
        folder, text = where.rpartition("/")[0], read_text(where)
    else:
        local = Path(path)
        local = local / "manifest.json" if os.path.isdir(local) else local
        where, folder, text = str(local), str(local.parent), _local_text(local)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:  # not JSON, a number of thousands of digits, nested too deeply
        raise UserError(f"cannot read the manifest {where}: {error}. Pack the dataset again.") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(
            f"{where} is no manifest of format {FORMAT}; pack the dataset again with this version's shards.pack."
        )
    manifest = _parsed(content, folder, where)
    if complete and (absent := absent_shards(manifest)):
        raise UserError(f"{where} {absent[0][1]}; copy it or pack again.")
    return manifest


def absent_shards(manifest: Manifest, splits: Collection[str] = SPLITS) -> list[tuple[Shard, str]]:
    """Shards of these splits that are missing or of another size, each with what is wrong; none of a remote set."""
    found: list[tuple[Shard, str]] = []
    if is_remote(manifest.folder):
        return found
    for shard in (shard for split in splits for shard in manifest.splits.get(split, [])):
        try:
            size = (Path(manifest.folder) / shard.file).stat().st_size
        except OSError as error:
            found.append((shard, f"names the shard {shard.file}, which is not there ({error.strerror})"))
            continue
        if size != shard.bytes:
            found.append((shard, f"says that {shard.file} has {shard.bytes} bytes, but it has {size}"))
    return found


def write_manifest(manifest: Manifest) -> Path:
    """Write manifest.json into ``manifest.folder``, a local one, through a temporary name; returns its path."""
    # Not asdict, which copies every sample's numbers.
    splits = {split: [vars(shard) for shard in shards] for split, shards in manifest.splits.items()}
    content = {"format": FORMAT, **vars(manifest), "splits": splits}
    del content["folder"]
    path = Path(manifest.path)
    write_text(path, json.dumps(content, separators=(",", ":")) + "\n")
    return path


def is_name(value: object) -> bool:
    """Whether a value can be a set's name."""
    return _is_text(value) and len(str(value)) <= LONGEST_NAME


def _local_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(str(path), [str(p) for p in path.parent.parent.glob("*/manifest.json")], 1)
        hint = (
            f" Did you mean {near[0]}?"
            if near
            else " Make one with: python -m shards.pack SOURCE --recipe NAME --out DIR"
        )
        raise UserError(f"no manifest at {path}.{hint}") from None
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a NUL in the path
        raise UserError(f"cannot read the manifest {path}: {error}. Pack the dataset again.") from None


def _parsed(content: dict[str, Any], folder: str, where: str) -> Manifest:
    """The manifest, its types and its shards' names and extents checked: it is data from elsewhere."""
    try:
        splits = {str(name): [Shard(**shard) for shard in shards] for name, shards in content["splits"].items()}
        keys = ("name", "recipe", "task", "classes", "mean", "std", "leaks")
        manifest = Manifest(**{key: content[key] for key in keys}, splits=splits, folder=folder)
        _check_facts(manifest)
        for shard in (shard for shards in splits.values() for shard in shards):
            _check_shard(shard)
    except KeyError as error:
        raise UserError(f"{where} is damaged: it lacks {error}; pack the dataset again.") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{where} is damaged: {error}; pack the dataset again.") from None
    return manifest


def _check_facts(manifest: Manifest) -> None:
    if unknown := manifest.splits.keys() - set(SPLITS):
        raise ValueError(f"its splits {sorted(unknown)} are none of {', '.join(SPLITS)}")
    if not all(is_name(text) for text in (manifest.name, manifest.recipe)):
        raise ValueError(f"its name or recipe is no text of at most {LONGEST_NAME} characters that print")
    if manifest.task not in TASKS:
        raise ValueError(f"its task is none of {', '.join(TASKS)}")
    if not isinstance(manifest.classes, list) or not all(_is_text(name) for name in manifest.classes):
        raise ValueError("its classes are no list of names")
    if not isinstance(manifest.leaks, dict) or not all(type(count) is int for count in manifest.leaks.values()):
        raise ValueError("its leaks are no whole numbers by kind")
    if not isinstance(manifest.mean, list) or not isinstance(manifest.std, list):
        raise ValueError("its mean or std is no list")
    numbers = [*manifest.mean, *manifest.std]
    if len(numbers) not in (2, 6) or not all(type(x) in (int, float) and 0 <= x <= 1 for x in numbers):
        raise ValueError("its mean and std are not one or three numbers of 0 to 1 each")


def _is_text(value: object) -> bool:
    return isinstance(value, str) and not holds_control(value)


def _check_shard(shard: Shard) -> None:
    path = PurePosixPath(shard.file)
    if not path.parts or path.is_absolute() or ".." in path.parts or set(":\\") & set(shard.file):
        raise ValueError(f"the shard's name {shard.file!r} is no relative path inside its folder")
    if not shard.file.isprintable():
        raise ValueError(f"the shard's name {shard.file!r} has characters that do not print")
    if type(shard.bytes) is not int or not isinstance(shard.sha256, str) or not _SHA256.fullmatch(shard.sha256):
        raise ValueError(f"bytes of {shard.file} is no whole number, or its sha256 not 64 hexadecimal digits")
    if not isinstance(shard.samples, list):
        raise ValueError(f"the samples of {shard.file} are no list")
    for offset, length, checksum in shard.samples:
        if not type(offset) is type(length) is type(checksum) is int:
            raise ValueError(f"{shard.file} has a sample whose place is not given by whole numbers")
        if not (0 <= offset <= offset + length <= shard.bytes < 2**63 and 0 <= checksum < 2**32):
            raise ValueError(f"{shard.file} has a sample outside its {shard.bytes} bytes")
