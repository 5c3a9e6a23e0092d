"""Tiny packed datasets with classes that a small net can learn: the orientation and frequency of a grating."""

import hashlib
import io
import json
import math
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from webdataset import TarWriter

from tracekin.data.manifest import Manifest, Shard, write_manifest


def make_dataset(
    folder: str | Path,
    *,
    train: int = 24,
    val: int = 8,
    test: int = 8,
    classes: int = 3,
    group_size: int = 2,
    size: int = 24,
    channels: int = 3,
    task: Literal["multiclass", "multilabel", "unlabelled"] = "multiclass",
    shard_size: int = 10,
    seed: int = 0,
    encode: Callable[[Image.Image], tuple[str, bytes]] | None = None,
) -> Manifest:
    """Write tar shards and manifest.json into ``folder`` (made if missing) and return the manifest.

    Args:
        train, val, test: images in each split; 0 leaves the split out.
        classes: number of classes; image n of a split belongs to group n // group_size, and group g to class
            g % classes (multilabel: also to the next class where g is odd).
        group_size: images that share a group pseudonym.
        size: side of the square images, pixels.
        channels: 1 writes grey images, 3 RGB.
        shard_size: samples a shard.
        encode: turns an image into (extension, bytes); PNG by default.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    splits = {}
    for split, count in (("train", train), ("val", val), ("test", test)):
        shards = []
        for start in range(0, count, shard_size):
            file = folder / f"{split}-{start // shard_size:06d}.tar"
            with TarWriter(str(file), compress=False, mtime=0) as writer:
                for number in range(start, min(start + shard_size, count)):
                    writer.write(_sample(split, number, classes, group_size, size, channels, task, seed, encode))
            shards.append(describe(file))
        splits[split] = shards
    manifest = Manifest(
        name="tiny",
        recipe="tiny",
        task=task,
        classes=[] if task == "unlabelled" else [f"class{c}" for c in range(classes)],
        mean=[0.5] * channels,
        std=[0.25] * channels,
        splits=splits,
        folder=str(folder),
    )
    write_manifest(manifest)
    return manifest


def describe(file: Path) -> Shard:
    """The manifest's entry of a tar: its samples are the runs of members that share a key."""
    with tarfile.open(file) as archive:
        members = archive.getmembers()
    content = file.read_bytes()
    samples: list[list[int]] = []
    last = None
    for member in members:
        key = member.name.split(".")[0]
        end = member.offset_data + math.ceil(member.size / 512) * 512
        if key == last:
            samples[-1][1] = end - samples[-1][0]
        else:
            samples.append([member.offset, end - member.offset])
        last = key
    samples = [[start, length, zlib.crc32(content[start : start + length])] for start, length in samples]
    return Shard(file.name, len(content), hashlib.sha256(content).hexdigest(), samples)


def texture(label: int, size: int, channels: int, generator: np.random.Generator) -> Image.Image:
    """A noisy grating whose orientation and frequency tell the class; phase and colour tell nothing."""
    y, x = np.mgrid[:size, :size] / size
    angle = label * 2.4 + generator.normal(0, 0.1)
    wave = np.sin(2 * np.pi * (2 + label % 3) * (np.cos(angle) * x + np.sin(angle) * y) + generator.uniform(0, 6.3))
    colour = generator.uniform(0.3, 0.7, channels)
    pixels = colour + 0.25 * wave[..., None] + generator.normal(0, 0.03, (size, size, channels))
    grey_or_rgb = (pixels.clip(0, 1) * 255).astype(np.uint8)
    return Image.fromarray(grey_or_rgb[..., 0] if channels == 1 else grey_or_rgb)


def _sample(
    split: str,
    number: int,
    classes: int,
    group_size: int,
    size: int,
    channels: int,
    task: str,
    seed: int,
    encode: Callable[[Image.Image], tuple[str, bytes]] | None,
) -> dict[str, object]:
    group = number // group_size
    first = group % classes
    labels = {"multiclass": first, "unlabelled": None}
    label = labels[task] if task in labels else sorted({first, (first + group % 2) % classes})
    generator = np.random.default_rng([seed, ("train", "val", "test").index(split), number])
    image = texture(first, size, channels, generator)
    extension, content = (encode or _png)(image)
    described = {"label": label, "group": _pseudonym(f"group {split} {group}")}
    return {
        "__key__": _pseudonym(f"image {split} {number}"),
        extension: content,
        "json": json.dumps(described).encode(),
    }


def _pseudonym(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:32]


def _png(image: Image.Image) -> tuple[str, bytes]:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "png", buffer.getvalue()
