"""Small image files that mean harm, and tars without the manners of ``tarfile``."""

import struct
import tarfile
import zlib
from functools import cache

START = b"\x89PNG\r\n\x1a\n"
UNPACKED = 256 << 20
"""Bytes that a bomb's chunk decompresses to."""


def png(width: int = 16, height: int = 16, *, more: bytes = b"", pixels: bytes | None = None) -> bytes:
    """A grey PNG, with further chunks, and coded pixels that need not fit its size."""
    pixels = zlib.compress(bytes((width + 1) * height)) if pixels is None else pixels
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return START + _chunk(b"IHDR", head) + more + _chunk(b"IDAT", pixels) + _chunk(b"IEND", b"")


@cache
def zeros() -> bytes:
    """Deflated zeros, a thousandth of their size."""
    deflate = zlib.compressobj(9)
    return b"".join(deflate.compress(bytes(1 << 20)) for _ in range(UNPACKED >> 20)) + deflate.flush()


def bombs() -> dict[str, bytes]:
    """By what is wrong with them."""
    return {
        "sides": png(60_000, 60_000, pixels=b"x"),
        "pixels": png(12_000, 12_000, pixels=zeros()),
        "text": png(more=_chunk(b"zTXt", b"k\0\0" + zeros())),
        "international text": png(more=_chunk(b"iTXt", b"k\0\1\0\0\0" + zeros())),
        "profile": png(more=_chunk(b"iCCP", b"k\0\0" + zeros())),
        "more pixels than it says": png(pixels=zeros()),
    }


def member(name: bytes, content: bytes, *, kind: bytes = b"0", size: int | None = None, link: bytes = b"") -> bytes:
    """A tar member with any name, type, link and stated size; its header's checksum is right."""
    head = bytearray(tarfile.TarInfo("x").tobuf(tarfile.USTAR_FORMAT))
    head[:100] = name.ljust(100, b"\0")[:100]
    head[124:136] = b"%011o\0" % (len(content) if size is None else size)
    head[156:157] = kind
    head[157:257] = link.ljust(100, b"\0")
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head) + content + bytes(-len(content) % 512)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
