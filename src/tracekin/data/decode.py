"""The bytes of one sample, as they lie in a shard, to its image, label and group.

Shards are data: nothing in them is unpickled, and nothing is extracted to a path that they name. A sample is a run of
plain USTAR members (POSIX 1003.1-1988, which every tar writes for short names); links, devices and extended headers are
refused.
"""

import io
import json
import math
import re
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from tracekin.data.faults import Fault

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png")
GROUP_DIGITS = 15
"""Leading hex digits of a group pseudonym that make its number: 60 bits, so that it fits an int64."""
HEXADECIMAL = re.compile("[0-9a-f]+")
MOST_PIXELS = 89_478_485
"""Of an image; shards.pack writes none with more, and Pillow would decode twice as many, 700 MB."""
BLOCK = 512
PLAIN_FILE = (b"0", b"\0")


class Sample(NamedTuple):
    key: str
    image: Image.Image
    """Mode L or RGB with 0..255 a channel, or F with 0..255 where the file has 16 bits; alpha is dropped."""
    label: int | list[int] | None
    group: str


def decode_sample(content: bytes, num_classes: int, least_side: int | None = None) -> Sample:
    """Parse and decode a sample's tar members.

    Args:
        content: the members with headers and padding.
        num_classes: labels must be below it.
        least_side: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size as long as its shortest side keeps this many
            pixels (the decoder then skips what is averaged away anyway); None decodes in full.

    Raises:
        Fault: malformed or undecodable.
    """
    key, members = parse_members(content)
    encoded = next((members[extension] for extension in IMAGE_EXTENSIONS if extension in members), None)
    if encoded is None:
        raise Fault("malformed", f"it has no member {', '.join(IMAGE_EXTENSIONS)}")
    label, group = _described(members, num_classes)
    return Sample(key, _decode(encoded, least_side), label, group)


def parse_members(content: bytes) -> tuple[str, dict[str, bytes]]:
    """The key, and the content of each member by its extension.

    Raises:
        Fault: malformed; names the member.
    """
    members: dict[str, bytes] = {}
    key, at = "", 0
    while at + BLOCK <= len(content) and content[at] != 0:
        name, size = _header(content[at : at + BLOCK])
        own, _, extension = name.partition(".")
        if members and own != key:
            raise Fault("malformed", f"members of two samples, {key} and {own}")
        key = own
        body = content[at + BLOCK : at + BLOCK + size]
        if len(body) < size:
            raise Fault("malformed", f"its member {name} is cut short")
        members[extension.lower()] = body
        at += BLOCK + -(-size // BLOCK) * BLOCK
    if not members:
        raise Fault("malformed", "it has no members")
    return key, members


def first_key(content: bytes) -> str:
    """The key that the first header states, "" where there is none; for messages about damaged samples."""
    try:
        return _header(content[:BLOCK])[0].partition(".")[0]
    except Fault:
        return ""


def group_number(group: str) -> int:
    """The int64 that stands for a group pseudonym (hexadecimal) on tensors."""
    return int(group[:GROUP_DIGITS], 16)


def label_list(label: int | list[int] | None) -> list[int]:
    return [] if label is None else label if isinstance(label, list) else [label]


def _header(block: bytes) -> tuple[str, int]:
    """Name and size of a tar member."""
    try:
        name = block[:100].partition(b"\0")[0].decode()
        size = int(block[124:136].strip(b"\0 "), 8)
    except ValueError:
        raise Fault("malformed", "its tar header is damaged") from None
    kind = block[156:157]
    if kind not in PLAIN_FILE or size < 0 or not name or not name.isprintable() or block[345:346] != b"\0":
        raise Fault("malformed", f"its member {name!r} (type {kind!r}) is no plain file with a short name")
    return name, size


def _decode(encoded: bytes, least_side: int | None) -> Image.Image:
    try:
        image: Image.Image = Image.open(io.BytesIO(encoded), formats=("JPEG", "PNG"))
        if image.width * image.height > MOST_PIXELS:
            raise Fault("undecodable", f"it has {image.width} x {image.height} pixels; accepted are {MOST_PIXELS}")
        if least_side is not None and image.format == "JPEG":
            scale = least_side / min(image.size)
            image.draft(None, (math.ceil(image.width * scale), math.ceil(image.height * scale)))
        image.load()
    except Fault:
        raise
    except UnidentifiedImageError:
        raise Fault("undecodable", "its image is not a JPEG or PNG") from None
    # Pillow's decoders answer damaged bytes with many types of error, decompression bombs with one of their own.
    except Exception as error:
        raise Fault("undecodable", str(error).rstrip(".") or repr(error)) from None
    if image.mode in ("L", "RGB"):
        return image
    if image.mode.startswith("I"):  # 16 bits: 65535 becomes 255, and the precision stays
        return Image.fromarray(np.asarray(image).astype(np.float32) / 257)
    return image.convert("L" if image.mode in ("1", "LA") else "RGB")


def _described(members: dict[str, bytes], num_classes: int) -> tuple[int | list[int] | None, str]:
    try:
        described = json.loads(members["json"])
        label, group = described["label"], described["group"]
        if not all(type(number) is int and 0 <= number < num_classes for number in label_list(label)):
            raise ValueError(f"its label {label!r:.80} is not among the manifest's {num_classes} classes")
        if not isinstance(group, str) or not HEXADECIMAL.fullmatch(group):
            raise ValueError(f"its group {group!r:.80} is no hexadecimal pseudonym")
    except KeyError as error:
        raise Fault("malformed", f"it has no {error.args[0]}") from None
    except TypeError:
        raise Fault("malformed", "its json is no object with label and group") from None
    except (ValueError, RecursionError) as error:
        raise Fault("malformed", str(error).rstrip(".")) from None
    return label, group
