"""One image from source bytes to sample bytes: checked, stripped of metadata, pixels untouched unless resized."""

import io
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from shards.strip import JPEG_START, PNG_START, Parts, strip_jpeg, strip_png

GREY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B")
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP")  # Pillow reads others too, some with the help of other programs
UNITS = 65535  # a channel's full scale, of 8-bit values too: 257 * 255 = 65535

Reason = Literal["unreadable file", "empty file", "not an image", "damaged image"]


class Rejected(ValueError):  # noqa: N818
    """An image that cannot be packed."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason


@dataclass(frozen=True)
class Channels:
    """Exact sums over the pixels of one image or many, in integers, so that their order cannot matter."""

    grey: bool
    pixels: int
    sums: tuple[int, ...]
    """Per channel: of the values in 1/65535."""
    squares: tuple[int, ...]
    """Per channel: of the squared values in 1/65535**2."""


def add_up(measured: Iterable[Channels]) -> list[Channels]:
    """At most two: the sums of all grey images, and of all others."""
    found: dict[bool, Channels] = {}
    for one in measured:
        if one.grey in found:
            other = found[one.grey]
            sums = tuple(a + b for a, b in zip(one.sums, other.sums, strict=True))
            squares = tuple(a + b for a, b in zip(one.squares, other.squares, strict=True))
            one = Channels(one.grey, one.pixels + other.pixels, sums, squares)
        found[one.grey] = one
    return [found[grey] for grey in sorted(found)]


class Packed(NamedTuple):
    parts: Parts
    """The image file, in pieces."""
    extension: str
    channels: Channels | None
    """Of the decoded image, where they were asked for."""

    @property
    def content(self) -> bytes:
        return b"".join(self.parts)


def pack_image(content: bytes, size: int | None = None, measure: bool = False) -> Packed:
    """Check and strip an image; with ``size``, resize the shortest side to that many pixels (antialiased, re-encoded).

    A JPEG or PNG of sound structure keeps its coded pixels and is not decoded; every other one is, in full, and becomes
    PNG.

    Args:
        content: an image file.
        size: pixels of the shortest side; None leaves the pixels untouched.
        measure: decode the result and sum up its channels.

    Raises:
        Rejected: it is no image or is damaged.
    """
    if not content:
        raise Rejected("empty file")
    try:
        packed = _strip(content) if size is None else None
    except ValueError:
        packed = None  # only decoding can tell now
    if packed is None:
        image = decode(content)
        changed = _encoded(image, "PNG") if size is None else _resized(image, content[:3] == JPEG_START, size)
        try:
            packed = _strip(changed)
        except ValueError as error:
            raise Rejected("damaged image", str(error)) from None  # too many pixels
    return Packed(*packed, _measured(decode(b"".join(packed[0]))) if measure else None)


def decode(content: bytes, at_least: tuple[int, int] | None = None) -> Image.Image:
    """The decoded image.

    Args:
        content: an image file.
        at_least: let a JPEG be decoded smaller, with no side below this; None decodes every pixel.

    Raises:
        Rejected: it cannot be decoded in full.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a damaged EXIF block is dropped anyway
            image: Image.Image = Image.open(io.BytesIO(content), formats=FORMATS)
            image.draft(None, at_least)
            image.load()
    except UnidentifiedImageError:
        raise Rejected("not an image", f"accepted are {', '.join(FORMATS)}") from None
    # Pillow's decoders answer damaged bytes with many types of error; each means that the image is unreadable.
    except Exception as error:
        raise Rejected("damaged image", " ".join(str(error).split()) or repr(error)) from None
    return image


def _strip(content: bytes) -> tuple[Parts, str]:
    if content[:8] == PNG_START:
        return strip_png(content), "png"
    return strip_jpeg(content), "jpg"


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    if image.mode == "F":
        raise Rejected("damaged image", "it has floating-point pixels; accepted are 8 and 16 bits a channel")
    if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16"):
        image = image.convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _resized(image: Image.Image, as_jpeg: bool, size: int) -> bytes:
    scale = size / min(image.size)
    sides = (max(size, round(image.width * scale)), max(size, round(image.height * scale)))
    if image.mode.startswith("I"):  # Pillow resizes deep grey as floating point only
        deep = Image.fromarray(np.asarray(image).astype(np.float32)).resize(sides, Image.Resampling.BICUBIC)
        image = Image.fromarray(np.asarray(deep).round().clip(0, 65535).astype(np.uint16))
    else:
        image = image.convert("L" if image.mode in GREY_MODES else "RGB").resize(sides, Image.Resampling.BICUBIC)
    return _encoded(image, "JPEG", quality=95) if as_jpeg else _encoded(image, "PNG")


def _measured(image: Image.Image) -> Channels:
    grey = image.mode in GREY_MODES
    if image.mode.startswith("I"):
        values = np.asarray(image).ravel().astype(np.int64).clip(0, UNITS)
        counts = np.bincount(values, minlength=UNITS + 1)[None]
    else:
        if image.mode not in ("L", "RGB"):
            image = image.convert("L" if grey else "RGB")
        counts = np.array(image.histogram(), np.int64).reshape(-1, 256)
    scale = np.arange(counts.shape[1], dtype=np.int64) * (UNITS // (counts.shape[1] - 1))
    sums, squares = counts @ scale, counts @ scale**2
    return Channels(grey, image.width * image.height, tuple(map(int, sums)), tuple(map(int, squares)))
