"""One image from source bytes to sample bytes: decoded once in full, stripped of metadata, pixels untouched.

Format facts: JPEG segments ITU T.81 annex B, PNG chunks W3C PNG 3rd edition section 11.
"""

import io
import re
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
PNG_KEPT = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")  # what Pillow decodes pixels from; text, time and EXIF go
GREY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B")
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # ends entropy-coded data; FF00 is a byte, FFD0-D7 are restarts
ADOBE, COMMENT, END, SCAN = 0xEE, 0xFE, 0xD9, 0xDA


@dataclass(frozen=True)
class Packed:
    """A sample's image and what it adds to the channel statistics."""

    content: bytes
    extension: str
    grey: bool
    pixels: int
    sums: tuple[int, ...]
    """Per channel: sum of the values in 1/65535; exact integers, so that their order cannot matter."""
    squares: tuple[int, ...]
    """Per channel: sum of the squared values, in 1/65535**2."""


def pack_image(content: bytes, size: int | None = None) -> Packed:
    """Decode, check, strip and, with ``size``, resize the shortest side to that many pixels (antialiased, re-encoded).

    JPEG and PNG keep their coded pixels; every other format becomes PNG.

    Raises:
        ValueError: it cannot be decoded in full; the message says why.
    """
    image, kind = _decode(content)
    content = _stripped(content, image, kind) if size is None else _resized(image, kind, size)
    if size is not None or kind == "other":
        image, _ = _decode(content)
    return _with_statistics(content, "jpg" if content[:2] == b"\xff\xd8" else "png", image)


def strip_jpeg(content: bytes, keep_adobe: bool = False) -> bytes:
    """Drop every APPn and COM segment and whatever follows the end of the image; no coded pixel is touched.

    Args:
        content: a JPEG file.
        keep_adobe: keep the colour transform of the Adobe segment, rewritten without its other fields.

    Raises:
        ValueError: if the segments do not parse.
    """
    out, at = [b"\xff\xd8"], 2
    while True:
        match = _MARKER.search(content, at)
        if match is None:
            return b"".join([*out, b"\xff\xd9"])  # decoders accept a missing end, so do we
        code, at = content[match.end() - 1], match.end()
        if code == END:
            return b"".join([*out, b"\xff\xd9"])
        if len(content) < at + 2:
            raise ValueError("a JPEG segment is cut short")
        end = at + int(struct.unpack_from(">H", content, at)[0])
        segment = content[at:end]
        if code == ADOBE and keep_adobe and segment[2:7] == b"Adobe":
            out.append(b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + segment[13:14])
        elif not (0xE0 <= code <= 0xEF or code == COMMENT):
            out.append(bytes([0xFF, code]) + segment)
        at = end
        if code == SCAN:
            following = _MARKER.search(content, at)
            at = following.start() if following else len(content)
            out.append(content[end:at])


def strip_png(content: bytes) -> bytes:
    """Drop every chunk that no pixel needs: text, time, EXIF, profiles, animation, and whatever follows the end.

    Raises:
        ValueError: if the chunks do not parse.
    """
    out, at = [PNG_MAGIC], len(PNG_MAGIC)
    while at + 12 <= len(content):
        length, name = struct.unpack_from(">I4s", content, at)
        if name in PNG_KEPT:
            out.append(content[at : at + 12 + length])
        at += 12 + length
        if name == b"IEND":
            return b"".join(out)
    raise ValueError("the PNG has no end")


def _decode(content: bytes) -> tuple[Image.Image, str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a damaged EXIF block is dropped anyway
            image: Image.Image = Image.open(io.BytesIO(content))
            image.load()
    # Pillow's decoders answer damaged bytes with many types of error; each means that the image is unreadable.
    except Exception as error:
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else str(error) or repr(error)
        raise ValueError(reason) from None
    return image, {b"\xff\xd8\xff": "JPEG", b"\x89PN": "PNG"}.get(content[:3], "other")


def _stripped(content: bytes, image: Image.Image, kind: str) -> bytes:
    """The file without metadata, proven to decode to the same pixels; as new PNG where that cannot be had."""
    jpeg: list[Callable[[bytes], bytes]] = [strip_jpeg, partial(strip_jpeg, keep_adobe=True)]
    for way in jpeg if kind == "JPEG" else [strip_png] if kind == "PNG" else []:
        try:
            stripped = way(content)
            again, _ = _decode(stripped)
        except ValueError:
            continue  # Pillow bears with more damage than the strippers do
        if (again.mode, again.tobytes()) == (image.mode, image.tobytes()):
            return stripped
    return strip_png(_as_png(image))


def _as_png(image: Image.Image) -> bytes:
    if image.mode == "F":
        raise ValueError("it has floating-point pixels; accepted are 8 and 16 bits a channel")
    if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16"):
        image = image.convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _resized(image: Image.Image, kind: str, size: int) -> bytes:
    scale = size / min(image.size)
    sides = (max(size, round(image.width * scale)), max(size, round(image.height * scale)))
    if image.mode.startswith("I"):  # Pillow resizes deep grey as floating point only
        deep = Image.fromarray(np.asarray(image).astype(np.float32)).resize(sides, Image.Resampling.BICUBIC)
        image = Image.fromarray(np.asarray(deep).round().clip(0, 65535).astype(np.uint16))
    else:
        image = image.convert("L" if image.mode in GREY_MODES else "RGB").resize(sides, Image.Resampling.BICUBIC)
    if kind != "JPEG":
        return strip_png(_as_png(image))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    return strip_jpeg(buffer.getvalue())


def _with_statistics(content: bytes, extension: str, image: Image.Image) -> Packed:
    grey, deep = image.mode in GREY_MODES, image.mode.startswith("I")
    if not deep and image.mode not in ("L", "RGB"):
        image = image.convert("L" if grey else "RGB")
    values: np.ndarray[Any, Any] = np.asarray(image).reshape(-1, 1 if grey else 3)
    top, unit = (65535, 1) if deep else (255, 257)  # 257 * 255 = 65535
    counts = [np.bincount(channel.astype(np.int64).clip(0, top), minlength=top + 1) for channel in values.T]
    scale = np.arange(top + 1, dtype=np.int64) * unit
    sums = tuple(int(count @ scale) for count in counts)
    squares = tuple(int(count @ scale**2) for count in counts)
    return Packed(content, extension, grey, len(values), sums, squares)
