"""Tar files of WebDataset samples, written and summed in one pass.

``tarfile`` takes 50 us a member, which is what a whole small image may take. Format: POSIX ustar, IEEE Std 1003.1, pax.
"""

import hashlib
import zlib
from collections.abc import Sequence
from functools import lru_cache
from typing import BinaryIO

from shards.strip import Parts

BLOCK, RECORD = 512, 10240
END = bytes(2 * BLOCK)
_OWNER = b"0000644\0" + 2 * b"0000000\0"  # mode, owner, group
_TIME = b"00000000000\0"
_REST = b"0" + bytes(100) + b"ustar\x0000" + bytes(247)  # a plain file; no link, no names of owners, no device
_SUM = sum(_OWNER + _TIME + _REST) + 8 * ord(" ")  # the checksum counts its own field as blanks


def header(name: bytes, size: int) -> bytes:
    """The header block of a plain file; every time and owner is zero.

    Args:
        name: at most 100 bytes.
        size: in bytes, below 8 GiB.
    """
    if len(name) > 100 or size >= 1 << 33:
        raise ValueError(f"no ustar member: {name!r} of {size} bytes")
    length, total = _length_field(size)
    return b"".join((name.ljust(100, b"\0"), _OWNER, length, _TIME, b"%06o\0 " % (total + sum(name)), _REST))


@lru_cache(maxsize=1 << 16)
def _length_field(size: int) -> tuple[bytes, int]:
    """The field, and the checksum of the header but for the name."""
    field = b"%011o\0" % size
    return field, _SUM + sum(field)


class ShardWriter:
    """Appends samples to a file that is open for writing."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._sha256 = file, hashlib.sha256()
        self.samples: list[list[int]] = []
        """[offset, length, CRC-32] of each sample."""
        self.bytes = 0

    def add(self, key: str, extension: str, image: Parts, described: bytes) -> None:
        """Append ``KEY.EXTENSION`` and ``KEY.json``."""
        size = sum(map(len, image))
        between = bytes(-size % BLOCK) + header(f"{key}.json".encode(), len(described)) + described
        parts = [header(f"{key}.{extension}".encode(), size), *image, between, bytes(-len(described) % BLOCK)]
        if size < 1 << 16:  # below this, calls cost more than copies
            parts = [b"".join(parts)]
        self.copy(parts)

    def copy(self, parts: Sequence[bytes | memoryview]) -> None:
        """Append a whole sample: its members with headers and padding, in pieces."""
        start, checksum = self.bytes, 0
        for part in parts:
            self._file.write(part)
            self._sha256.update(part)
            checksum = zlib.crc32(part, checksum)
            self.bytes += len(part)
        self.samples.append([start, self.bytes - start, checksum])

    def finish(self) -> str:
        """Write the end of the tar; returns the SHA-256 of the file, hexadecimal."""
        end = END + bytes(-(self.bytes + len(END)) % RECORD)
        self._file.write(end)
        self._sha256.update(end)
        self.bytes += len(end)
        return self._sha256.hexdigest()


def read_image(file: BinaryIO, offset: int) -> bytes:
    """The image of the sample at ``offset``: its first member's content."""
    file.seek(offset)
    block = file.read(BLOCK)
    return file.read(int(block[124:135], 8))
