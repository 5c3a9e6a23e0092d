"""The members of a packed tar, read strictly: a header holds a name and a size, and nothing else.

Nothing is ever extracted. Links, devices, paths and the headers by which other tars extend a member are refused.
Format: POSIX ustar and pax, IEEE Std 1003.1; GNU's manual of tar for its types of member.
"""

import mmap
from collections.abc import Iterator
from typing import NamedTuple

from shards.tar import BLOCK, header

NAME = 100
"""Bytes of a header's name; whatever follows in the header is proven to say no more than a size."""
_KINDS = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"5": "a folder",
    b"6": "a FIFO",
    b"g": "a PAX header",
    b"x": "a PAX header",
    b"K": "a GNU long link",
    b"L": "a GNU long name",
    b"S": "a sparse file",
}


class Member(NamedTuple):
    name: str
    header: int
    """Where its header begins."""
    start: int
    """Where its content begins."""
    size: int

    @property
    def end(self) -> int:
        """Where its padding ends."""
        return self.start + -(-self.size // BLOCK) * BLOCK


def members(content: bytes | mmap.mmap) -> Iterator[Member]:
    """The members up to the first block of zeros or the end.

    Raises:
        ValueError: one is no plain file as ``shards.pack`` writes it; names it and says what it is.
    """
    at = 0
    while at < len(content):
        block = content[at : at + BLOCK]
        if not any(block):
            return
        name, size = _read_header(block)
        member = Member(name, at, at + BLOCK, size)
        if member.end > len(content):
            raise ValueError(f"its member {name} is cut short")
        if any(content[member.start + size : member.end]):
            raise ValueError(f"its member {name} has bytes in its padding")
        yield member
        at = member.end


def _read_header(block: bytes) -> tuple[str, int]:
    """Name and size."""
    raw, kind = block[:NAME].rstrip(b"\0"), block[156:157]
    shown = raw.decode("utf-8", "backslashreplace")
    if kind in _KINDS:
        raise ValueError(f"its member {shown!r} is {_KINDS[kind]}; accepted are plain files")
    try:
        name, size = raw.decode("ascii"), int(block[124:136].strip(b"\0 "), 8)
        plain = header(raw, size) == block
    except ValueError:
        raise ValueError(f"the tar header of {shown!r} is damaged") from None
    if any(sign in name for sign in "/\\:") or name[:1] in ("", ".") or any(block[345:500]):
        raise ValueError(f"its member {shown!r} has a path; accepted are plain names")
    if not plain:
        raise ValueError(f"the tar header of {shown!r} holds more than a name and a size (a time, an owner, a mode)")
    return name, size
