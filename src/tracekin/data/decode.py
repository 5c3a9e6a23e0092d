"""Any sample of a split by its number: one positioned read from a tar shard, parsed and decoded from memory.

Shards are data: nothing in them is unpickled, and nothing is extracted to a path that they name.
"""

import io
import json
import os
import tarfile
from bisect import bisect_right
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from tracekin.config import UserError
from tracekin.data.manifest import Manifest

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png")
GROUP_DIGITS = 15
"""Leading hex digits of a group pseudonym that make its number: 60 bits, so that it fits an int64."""
MAX_OPEN_SHARDS = 256
HEADERS = 4096
"""Bytes that hold a tar member's headers, long names included."""


class Sample(NamedTuple):
    key: str
    image: Image.Image
    """Mode L or RGB with 0..255 a channel, or F with 0..255 where the file has 16 bits; alpha is dropped."""
    label: int | list[int] | None
    group: str


class ShardReader:
    """Reads samples of one split by number: shards in the manifest's order, samples in their shard's order.

    Files are opened at their first use in each process and read with ``pread``, so that forked loader workers and
    several ranks share neither a file position nor a lock.
    """

    def __init__(self, manifest: Manifest, split: str) -> None:
        """Index the split.

        Raises:
            UserError: if the manifest has no such split.
        """
        shards = manifest.shards(split)
        self._folder = manifest.folder
        self._num_classes = len(manifest.classes)
        self._files = [Path(manifest.folder) / shard.file for shard in shards]
        self._ends = list(accumulate(len(shard.samples) for shard in shards))
        # One array, not the manifest's lists: workers that touch it copy no pages and count no references.
        self._extents = np.concatenate([np.array(s.samples, dtype=np.int64).reshape(-1, 2) for s in shards])
        self._open: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._extents)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # a file descriptor means nothing in another process

    def read(self, index: int) -> Sample:
        """Read and decode sample number ``index``, 0 <= index < len(self).

        Raises:
            UserError: if it cannot be read, parsed or decoded, naming the shard, the key and the offset.
        """
        shard, offset, length = self._place(index)
        key = ""
        try:
            content = os.pread(self._descriptor(shard), length, offset)
            if len(content) < length:
                raise ValueError(f"the shard ends {length - len(content)} bytes early")
            key, members = _members(content)
            image = _decode(members)
            label, group = _described(members, self._num_classes)
        # Pillow and tarfile answer damaged bytes with many types of error; every one of them means the same here.
        except Exception as error:
            raise UserError(
                f"{self._files[shard]}: sample {key or '(no key)'} at byte {offset} cannot be read: {_reason(error)}. "
                f"Find every such sample with: python -m shards.verify {self._folder}"
            ) from error
        return Sample(key, image, label, group)

    def key(self, index: int) -> str:
        """The key of sample number ``index``, from its first tar header alone.

        Raises:
            UserError: if that header is damaged.
        """
        shard, offset, length = self._place(index)
        try:
            head = os.pread(self._descriptor(shard), min(length, HEADERS), offset)
            with tarfile.open(fileobj=io.BytesIO(head), mode="r:") as archive:
                member = archive.next()
            if member is None:
                raise ValueError("it has no members")
            return member.name.partition(".")[0]
        except (OSError, ValueError, tarfile.TarError) as error:
            raise UserError(
                f"{self._files[shard]}: the sample at byte {offset} has no readable name: {_reason(error)}. "
                f"Find every such sample with: python -m shards.verify {self._folder}"
            ) from error

    def _place(self, index: int) -> tuple[int, int, int]:
        """Shard, offset and length of a sample."""
        offset, length = (int(number) for number in self._extents[index])
        return bisect_right(self._ends, index), offset, length

    def _descriptor(self, shard: int) -> int:
        if shard not in self._open:
            if len(self._open) >= MAX_OPEN_SHARDS:
                os.close(self._open.pop(next(iter(self._open))))
            self._open[shard] = os.open(self._files[shard], os.O_RDONLY | os.O_CLOEXEC)
        return self._open[shard]


def group_number(group: str) -> int:
    """The int64 that stands for a group pseudonym (hexadecimal) on tensors."""
    return int(group[:GROUP_DIGITS], 16)


def label_list(label: int | list[int] | None) -> list[int]:
    return [] if label is None else label if isinstance(label, list) else [label]


def _members(content: bytes) -> tuple[str, dict[str, bytes]]:
    """The key and the extension -> content of a sample's tar members."""
    members: dict[str, bytes] = {}
    key = ""
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
        for member in archive:
            file = archive.extractfile(member)
            if file is not None:
                key, _, extension = member.name.partition(".")
                members[extension.lower()] = file.read()
    return key, members


def _decode(members: dict[str, bytes]) -> Image.Image:
    content = next((members[extension] for extension in IMAGE_EXTENSIONS if extension in members), None)
    if content is None:
        raise ValueError(f"it has no member {', '.join(IMAGE_EXTENSIONS)}")
    image: Image.Image = Image.open(io.BytesIO(content), formats=("JPEG", "PNG"))
    image.load()
    if image.mode in ("L", "RGB"):
        return image
    if image.mode.startswith("I"):  # 16 bits: 65535 becomes 255, and the precision stays
        return Image.fromarray(np.asarray(image).astype(np.float32) / 257)
    return image.convert("L" if image.mode in ("1", "LA") else "RGB")


def _described(members: dict[str, bytes], num_classes: int) -> tuple[int | list[int] | None, str]:
    described = json.loads(members["json"])
    label, group = described["label"], described["group"]
    if not all(type(number) is int and 0 <= number < num_classes for number in label_list(label)):
        raise ValueError(f"its label {label} is not among the manifest's {num_classes} classes")
    group_number(group)
    return label, group


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "its image is not a JPEG or PNG"
    if isinstance(error, KeyError):
        return f"it has no {error.args[0]}"
    return str(error).rstrip(".") or type(error).__name__
