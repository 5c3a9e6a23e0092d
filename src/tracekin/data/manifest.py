"""manifest.json: what a packed dataset holds and where each sample's bytes lie. The contract of shards/README.md.

``shards`` writes it, training and evaluation read it. Nothing heavy is imported here.
"""

import difflib
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tracekin.config import UserError
from tracekin.files import write_text

FORMAT = 1
SPLITS = ("train", "val", "test")


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
    """[offset, length] of each sample: its tar members, headers and padding included, in bytes."""


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
    folder: Path
    """Where manifest.json lies; not written."""

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
            raise UserError(f"{self.folder / 'manifest.json'} has no split {split!r}; it has {held}.")
        return self.splits[split]


def read_manifest(path: str | Path) -> Manifest:
    """Read and check a manifest; ``path`` is the file or its folder.

    Raises:
        UserError: missing file, not a manifest, other format version, missing shard or a shard of another size.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "manifest.json"
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = difflib.get_close_matches(str(path), [str(p) for p in path.parent.parent.glob("*/manifest.json")], 1)
        hint = (
            f" Did you mean {near[0]}?"
            if near
            else " Make one with: python -m shards.pack SOURCE --recipe NAME --out DIR"
        )
        raise UserError(f"no manifest at {path}.{hint}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"cannot read the manifest {path}: {error}. Pack the dataset again.") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(
            f"{path} is no manifest of format {FORMAT}; pack the dataset again with this version's shards.pack."
        )
    try:
        splits = {name: [Shard(**shard) for shard in shards] for name, shards in content["splits"].items()}
        manifest = Manifest(
            **{key: content[key] for key in ("name", "recipe", "task", "classes", "mean", "std")},
            splits=splits,
            folder=path.parent,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error!r}); pack the dataset again.") from None
    for shard in (shard for shards in splits.values() for shard in shards):
        file = path.parent / shard.file
        if not file.is_file():
            raise UserError(f"{path} names the shard {shard.file}, which is not there; copy it or pack again.")
        if file.stat().st_size != shard.bytes:
            raise UserError(
                f"{file} has {file.stat().st_size} bytes, {path} says {shard.bytes}; copy it or pack again."
            )
    return manifest


def write_manifest(manifest: Manifest) -> Path:
    """Write manifest.json into ``manifest.folder`` through a temporary name; returns its path."""
    content = {"format": FORMAT, **asdict(manifest)}
    del content["folder"]
    path = manifest.folder / "manifest.json"
    write_text(path, json.dumps(content, separators=(",", ":")) + "\n")
    return path
