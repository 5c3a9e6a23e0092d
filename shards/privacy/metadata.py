"""What an image file says beside its pixels. Format facts: JPEG ITU T.81 annex B, PNG W3C 3rd edition section 11."""

import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from PIL import Image

from shards.strip import JPEG_START, PNG_START

LEAST = 6
"""Characters; shorter strings in an image's metadata (units, flags) say nothing of anybody."""
_TEXT_LIMIT = 1 << 20  # bytes of a compressed text that are looked at: a small file must not fill the memory
_PIXEL_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_TABLES_AND_FRAMES = frozenset((*range(0xC0, 0xD0), 0xDB, 0xDD, 0xDE, 0xDF))
_WINDOWS_TAGS = range(0x9C9B, 0x9CA0)  # XPTitle to XPSubject, in UTF-16
_CAMERA, _PLACE = 0x8769, 0x8825  # directories inside EXIF


class Segment(NamedTuple):
    kind: str
    """A PNG chunk's name, APP0 to APP15, or COM."""
    offset: int
    """Of its content in the file."""
    content: bytes
    """Without its frame; a PNG's compressed text is decompressed."""


def segments(file: BinaryIO) -> Iterator[Segment]:
    """The parts of a JPEG or PNG that no pixel needs, in order, pixels skipped; stops where the structure does.

    JPEG is read up to its first scan: what follows is coded pixels.
    """
    start = file.read(len(PNG_START))
    if start == PNG_START:
        yield from _png(file)
    elif start[: len(JPEG_START)] == JPEG_START:
        file.seek(2)
        yield from _jpeg(file)


def texts(file: BinaryIO) -> Iterator[str]:
    """The lines of text of at least ``LEAST`` characters in an image's EXIF fields, JPEG comments and PNG texts.

    Damaged metadata is passed over.

    Raises:
        OSError: it is no image.
    """
    start = file.read(len(PNG_START))
    file.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of damaged EXIF
        if start == PNG_START or start[: len(JPEG_START)] == JPEG_START:
            found = [text for segment in segments(file) for text in _segment_texts(segment)]
        else:
            found = list(_exif_texts(Image.open(file).getexif()))
    for text in found:
        lines = (line.strip() for line in re.split(r"[\0\r\n]+", text))
        yield from (line for line in lines if len(line) >= LEAST and line.isprintable())


def decode_text(content: bytes) -> str:
    """UTF-8, or UTF-16 with its mark, or else Latin-1, which takes all bytes."""
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return content.decode("utf-16", "replace")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def _png(file: BinaryIO) -> Iterator[Segment]:
    while len(frame := file.read(8)) == 8:
        length, name = struct.unpack(">I4s", frame)
        offset = file.tell()
        if name not in _PIXEL_CHUNKS:
            kind, content = name.decode("latin-1"), file.read(min(length, _TEXT_LIMIT))
            yield Segment(kind, offset, _png_text(kind, content))
        file.seek(offset + length + 4)
        if name == b"IEND":
            return


def _png_text(kind: str, content: bytes) -> bytes:
    """Decompressed, keyword included."""
    keyword, _, rest = content.partition(b"\0")
    if kind == "zTXt":
        return keyword + b"\0" + _decompressed(rest[1:])
    if kind == "iTXt" and rest[:1] == b"\1":
        language, _, rest = rest[2:].partition(b"\0")
        translated, _, text = rest.partition(b"\0")
        return b"\0".join((keyword, language, translated, _decompressed(text)))
    return content


def _decompressed(content: bytes) -> bytes:
    try:
        return zlib.decompressobj().decompress(content, _TEXT_LIMIT)
    except zlib.error:
        return content


def _jpeg(file: BinaryIO) -> Iterator[Segment]:
    while len(frame := file.read(4)) == 4:
        lead, code, length = struct.unpack(">BBH", frame)
        offset = file.tell()
        if code == 0xFF:  # filling before the marker
            file.seek(offset - 3)
            continue
        if lead != 0xFF or length < 2:
            return
        if 0xE0 <= code <= 0xEF or code == 0xFE:
            yield Segment("COM" if code == 0xFE else f"APP{code - 0xE0}", offset, file.read(length - 2))
        elif code not in _TABLES_AND_FRAMES:
            return
        file.seek(offset + length - 2)


def _segment_texts(segment: Segment) -> list[str]:
    kind, content = segment.kind, segment.content
    if kind == "COM":
        return [decode_text(content)]
    if kind in ("tEXt", "zTXt", "iTXt"):
        parts = content.split(b"\0")[1:]  # the keyword is PNG's own
        return [decode_text(part) for part in parts]
    if kind == "eXIf" or (kind == "APP1" and content[:6] == b"Exif\0\0"):
        exif = Image.Exif()
        try:
            exif.load(content)
            return list(_exif_texts(exif))
        # Damaged EXIF fails in many ways.
        except Exception:
            return []
    return []


def _exif_texts(exif: Image.Exif) -> Iterator[str]:
    for fields in (exif, exif.get_ifd(_CAMERA), exif.get_ifd(_PLACE)):
        for tag, value in fields.items():
            if isinstance(value, str):
                yield value
            elif isinstance(value, bytes) and (tag in _WINDOWS_TAGS or value[:8] == b"UNICODE\0"):
                yield value.removeprefix(b"UNICODE\0").decode("utf-16-le", "replace")
            elif isinstance(value, bytes):
                yield value.removeprefix(b"ASCII\0\0\0").decode("latin-1")
