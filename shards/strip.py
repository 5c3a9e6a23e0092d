"""JPEG and PNG without metadata, and proof of their structure, without decoding.

Whoever calls these may trust three things of a result: it holds no metadata and nothing beyond the end of the image, a
decoder makes the same pixels of it as of the file, and the file is whole as far as its structure tells. A file that is
unusual in any way is refused (ValueError), not judged: decoding must tell.

Format facts: JPEG segments ITU T.81 annex B, JFIF and Adobe segments ITU T.871 and T.872, PNG chunks W3C PNG 3rd
edition sections 5 and 11.
"""

import re
import struct
import zlib
from typing import NamedTuple

import numpy as np

Parts = list[bytes | memoryview]
"""Bytes in pieces: joining megabytes costs more than writing them one after the other."""

MAX_PIXELS = 89_478_485  # from here on Pillow warns of decompression bombs
JPEG_START = b"\xff\xd8\xff"
PNG_START = b"\x89PNG\r\n\x1a\n"

_segment = struct.Struct(">BBH").unpack_from  # FF, the marker's code, the length that includes itself
_FRAME, _SCAN, _APP0, _APP14, _FILL = 0xC0, 0xDA, 0xE0, 0xEE, 0xFF
_FRAMES = frozenset((0xC0, 0xC1, 0xC2))  # baseline, extended, progressive; Huffman-coded
_TABLES = frozenset((0xC4, 0xDB, 0xDD))  # Huffman and quantisation tables, restart interval
_DROPPED = frozenset((*range(0xE0, 0xF0), 0xFE, _FILL))  # APPn, comment, filling before a marker
_NEEDED = frozenset((_FRAME, 0xDB))
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # ends entropy-coded data; FF00 is a byte, FFD0-D7 are restarts
_BLOCK = 1 << 18
_JFIF = b"\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00"
_ADOBE = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"

_PIXEL_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}  # by colour type


class _Head(NamedTuple):
    """A JPEG up to where its first entropy-coded data begin."""

    content: bytes
    opening: bytes
    """The start of the image and what decides colours, to be written instead of what is dropped."""
    kept: tuple[tuple[int, int], ...]
    """First and last byte + 1 of each run to be written."""
    run: int
    """Where the last run begins, which goes on behind the head."""


_last = _Head(b"none", b"", (), 0)  # most files of a set begin alike, since one program wrote their tables


def strip_jpeg(content: bytes) -> Parts:
    """Drop every comment and APPn segment and whatever follows the end of the image; coded pixels stay as they are.

    What decides colours stays: that there is a JFIF segment, and the transform byte of an Adobe segment. Their other
    fields become constants.

    Raises:
        ValueError: no plain JPEG of 8 bits with 1, 3 or 4 channels, or not whole.
    """
    global _last
    if not content.startswith(_last.content):
        _last = _read_head(content)
    view, run = memoryview(content), _last.run
    parts: Parts = [_last.opening, *(view[start:end] for start, end in _last.kept)]
    at = _scan_end(content, len(_last.content))
    while content[at : at + 2] != b"\xff\xd9":
        code, end = _next_segment(content, at)
        if code == _SCAN:
            end = _scan_end(content, end)
        elif code in _DROPPED:
            if run < at:
                parts.append(view[run:at])
            run = end
        elif code not in _TABLES:
            raise ValueError(f"an unusual segment ({code:X})")
        at = end
    return [*parts, view[run : at + 2]]


def _read_head(content: bytes) -> _Head:
    if content[:3] != JPEG_START:
        raise ValueError("no JPEG")
    at, run, code = 2, 2, 0
    kept: list[tuple[int, int]] = []
    colours = [b"", b""]
    seen: set[int] = set()
    while code != _SCAN:
        code, end = _next_segment(content, at)
        if code in _DROPPED:
            _note_colours(code, content[at + 4 : end], colours)
            if run < at:
                kept.append((run, at))
            run = end
        elif code in _FRAMES and _FRAME not in seen:
            _check_frame(content[at + 4 : end])
            code = _FRAME
        elif code not in _TABLES and code != _SCAN:
            raise ValueError(f"an unusual segment ({code:X})")
        seen.add(code)
        at = end
    if not seen >= _NEEDED:
        raise ValueError("no frame or no tables")
    return _Head(content[:at], b"\xff\xd8" + colours[0] + colours[1], tuple(kept), run)


def _next_segment(content: bytes, at: int) -> tuple[int, int]:
    """The code of the segment at ``at``, and where it ends; a byte of filling counts as one."""
    try:
        lead, code, length = _segment(content, at)
    except struct.error:
        raise ValueError("no end") from None
    end = at + 2 + length if code != _FILL else at + 1
    if lead != 0xFF or length < 2 or end > len(content):
        raise ValueError("a segment is cut short")
    return code, end


def strip_png(content: bytes) -> Parts:
    """Drop every chunk that no pixel needs (text, time, EXIF, profiles) and whatever follows the end.

    Raises:
        ValueError: no plain PNG, a chunk's checksum is wrong, or not whole.
    """
    if content[:8] != PNG_START:
        raise ValueError("no PNG")
    view, kept, at = memoryview(content), [(0, 8)], 8
    order: list[bytes] = []
    while not order or order[-1] != b"IEND":
        if len(content) < at + 12:
            raise ValueError("no end")
        length, name = struct.unpack_from(">I4s", content, at)
        end = at + 12 + length
        if len(content) < end:
            raise ValueError("a chunk is cut short")
        if zlib.crc32(view[at + 4 : end - 4]) != int.from_bytes(content[end - 4 : end], "big"):
            raise ValueError(f"the checksum of a chunk ({name!r}) is wrong")
        if name in _PIXEL_CHUNKS:
            if name == b"IHDR":
                _check_header(content[at + 8 : end - 4])
            if kept[-1][1] == at:
                kept[-1] = (kept[-1][0], end)
            else:
                kept.append((at, end))
        elif not name[0] & 0x20:
            raise ValueError(f"an unusual chunk ({name!r})")
        if not (name == b"IDAT" and order and order[-1] == b"IDAT"):
            order.append(name)
        at = end
    if order[0] != b"IHDR" or length or any(order.count(name) != 1 for name in (b"IHDR", b"IDAT")):
        raise ValueError("chunks out of order")
    return [view[start:end] for start, end in kept]


def _note_colours(code: int, data: bytes, colours: list[bytes]) -> None:
    """Keep what decoders take the colours from: is there JFIF, is there Adobe, its transform. Lengths as libjpeg's."""
    if code == _APP0 and data[:5] == b"JFIF\0" and len(data) >= 14:
        colours[0] = _JFIF
    elif code == _APP14 and data[:5] == b"Adobe" and len(data) >= 12:
        colours[1] = _ADOBE + data[11:12]


def _check_frame(data: bytes) -> None:
    depth, height, width, channels = struct.unpack_from(">BHHB", data) if len(data) >= 6 else (0, 0, 0, 0)
    if depth != 8 or channels not in (1, 3, 4) or len(data) != 6 + 3 * channels:
        raise ValueError("not 8 bits and 1, 3 or 4 channels")
    if not 0 < height * width <= MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels")


def _check_header(data: bytes) -> None:
    width, height, depth, kind, *ways = struct.unpack(">II5B", data) if len(data) == 13 else (0, 0, 0, 0)
    if depth not in _DEPTHS.get(kind, ()) or ways not in ([0, 0, 0], [0, 0, 1]):
        raise ValueError("an unusual header")
    if not 0 < height * width <= MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels")


def _scan_end(content: bytes, at: int) -> int:
    """Where entropy-coded data that begins at ``at`` ends: the next marker but restarts."""
    if len(content) - at > _BLOCK:  # a regular expression takes three times as long over megabytes
        values = np.frombuffer(content, np.uint8)
        while at + 1 < len(values):
            block = values[at : at + _BLOCK + 1]
            suspects = (block[:-1] == 0xFF) & (block[1:] != 0)
            if suspects.any() and (match := _MARKER.search(content, at + int(suspects.argmax()), at + len(block))):
                return match.start()
            at += _BLOCK
    elif match := _MARKER.search(content, at):
        return match.start()
    raise ValueError("no end")
