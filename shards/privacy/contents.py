"""What the bytes of a packed set are, so that the privacy scan neither misses a text nor stumbles over a number.

Bytes are *proven* (headers and numbers that follow from the rest, words of the contract, declared names), *random*
(pseudonyms and sums: hexadecimal digits of a fixed width), *text*, or coded pixels.
"""

import io
import json
import mmap
import re
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import get_args

from shards.images import Reason
from shards.members import NAME, members
from shards.privacy.metadata import decode_text, segments
from shards.pseudonym import DIGITS
from shards.strip import JPEG_START, PNG_START, strip_jpeg, strip_png
from tracekin.data.manifest import SPLITS

CONTRACT = frozenset(
    [
        *SPLITS,
        *("manifest", "manifest.json", "report", "report.json", "contact_sheet", "contact_sheet.png"),
        *("jpg", "png", "json", "tar", "multiclass", "multilabel", "unlabelled"),
        *("format", "name", "recipe", "task", "classes", "mean", "std", "splits", "leaks", "groups", "images"),
        *("file", "bytes", "sha256", "samples", "label", "group", "fields"),
        *("without_label", "left_out", "duplicates", *get_args(Reason)),
        *(f"identical to an image of {split}" for split in SPLITS),
    ]
)
"""Words of the shard contract: they say nothing of a source."""
SHARD = re.compile(rf"(?:{'|'.join(SPLITS)})-\d{{6}}\.tar")
MEMBER = re.compile(rf"([0-9a-f]{{{DIGITS}}})\.(?:jpg|png|json)")
_RANDOM = re.compile(rf"[0-9a-f]{{16}}|[0-9a-f]{{{DIGITS}}}|[0-9a-f]{{64}}")
_COUNTED = ("manifest.json", "report.json")
"""Their numbers are places, sizes, checksums, statistics and counts, which ``shards.verify`` checks against the data. A
checksum of ten digits would match a number of six by chance."""
_TOKEN = re.compile(rb'("(?:[^"\\]|\\.)*")|(-?\d[-+.\deE]*)|[{}\[\],:]|\s+|[a-z]+')
_STEP = 1 << 20
_READABLE = re.compile(rb"[\x20-\x7e]{4,}")


@dataclass(frozen=True)
class Declared:
    """What may stand in a packed set by declaration."""

    words: frozenset[str]
    """The contract's, the set's name, the recipe's and the classes'."""
    kept: Mapping[str, frozenset[str]]
    """Values of the fields that ``--keep`` names; they may stand in that field of a sample only."""


@dataclass
class Contents:
    proven: list[tuple[int, int]] = field(default_factory=list)
    """[start, end) in the file, in order; likewise the next."""
    random: list[tuple[int, int, str]] = field(default_factory=list)
    """The third is the text."""
    texts: list[tuple[int, str]] = field(default_factory=list)
    """(where it begins, the text, decoded and decompressed)."""
    problems: list[str] = field(default_factory=list)
    """Why bytes cannot be told."""

    def prove(self, start: int, end: int) -> None:
        if self.proven and self.proven[-1][1] == start:
            start = self.proven.pop()[0]
        self.proven.append((start, end))


def read_contents(path: Path, declared: Declared) -> Contents:
    """Tell the bytes of a file: tar, JSON, image or text; whatever else it is becomes a problem."""
    contents = Contents()
    if path.suffix == ".tar" and path.stat().st_size:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            _tell_tar(mapped, declared, contents)
    else:
        _tell(path.name, path.read_bytes(), 0, declared, contents)
    return contents


def _tell_tar(mapped: mmap.mmap, declared: Declared, contents: Contents) -> None:
    end = 0
    try:
        for member in members(mapped):
            end = member.end
            if match := MEMBER.fullmatch(member.name):
                contents.random.append((member.header, member.header + NAME, match[1]))
            else:
                contents.texts.append((member.header, member.name))
            contents.prove(member.header + NAME, member.start)
            _tell(member.name, mapped[member.start : member.start + member.size], member.start, declared, contents)
    except ValueError as error:
        contents.problems.append(str(error))
        return
    if any(any(mapped[start : start + _STEP]) for start in range(end, len(mapped), _STEP)):
        contents.problems.append("it goes on behind its end")


def _tell(name: str, content: bytes, base: int, declared: Declared, contents: Contents) -> None:
    suffix = PurePosixPath(name).suffix.lower()
    if suffix in (".jpg", ".jpeg", ".png"):
        _tell_image(name, content, base, contents)
    elif suffix == ".json":
        _tell_json(name, content, base, declared, contents, counted=base == 0 and name in _COUNTED)
    else:
        _tell_text(name, content, base, contents)


def _tell_text(name: str, content: bytes, base: int, contents: Contents) -> None:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    contents.texts.append((base, decode_text(content)))
    if any(ord(sign) < 32 and sign not in "\t\r\n" for sign in text):
        contents.problems.append(f"{name} is neither tar, JSON, image nor text: what it may hide cannot be told")


def _tell_image(name: str, content: bytes, base: int, contents: Contents) -> None:
    if not content.startswith((JPEG_START, PNG_START)):
        _tell_text(name, content, base, contents)
        return
    try:
        parts = strip_png(content) if content[:8] == PNG_START else strip_jpeg(content)
        bare = b"".join(parts) == content
    except ValueError:
        bare = False
    if not bare:
        contents.problems.append(f"{name} holds more than pixels, or is no image as shards.pack writes it")
        for segment in segments(io.BytesIO(content)):
            whole = segment.kind in ("COM", "tEXt", "zTXt", "iTXt")
            found = [segment.content] if whole else _READABLE.findall(segment.content)
            contents.texts += [(base + segment.offset, decode_text(text)) for text in found]
    for start, end in _uncompressed_pixels(content):
        contents.prove(base + start, base + end)


def _uncompressed_pixels(content: bytes) -> list[tuple[int, int]]:
    """The data chunks of a PNG that stores its pixels as they are: a row of grey 48 to 57 reads as digits."""
    if content[:8] != PNG_START or len(content) < 33:
        return []
    width, height, depth, kind = struct.unpack_from(">IIBB", content, 16)
    size = width * height * depth * {2: 3, 4: 2, 6: 4}.get(kind, 1) // 8
    chunks, at = [], 8
    while at + 12 <= len(content):
        length, name = struct.unpack_from(">I4s", content, at)
        if name == b"IDAT":
            chunks.append((at + 8, min(at + 8 + length, len(content))))
        at += 12 + length
    if sum(end - start for start, end in chunks) <= size:
        return []
    stream = zlib.decompressobj()
    try:
        stream.decompress(b"".join(content[start:end] for start, end in chunks), 2 * size + height)
    except zlib.error:
        return []
    return chunks if stream.eof and not stream.unused_data else []


@dataclass
class _Frame:
    """An object or list around the current token."""

    is_object: bool
    owner: str
    """The key under which it stands."""
    key: str | None = None
    """Of an object: the current one; None where one is due."""


def _tell_json(name: str, content: bytes, base: int, declared: Declared, contents: Contents, counted: bool) -> None:
    try:
        json.loads(content.decode())  # of bytes it would take UTF-16, too
    except (ValueError, RecursionError):
        _tell_text(name, content, base, contents)
        return
    frames = [_Frame(False, "")]
    for match in _TOKEN.finditer(content):
        start, end, token = base + match.start(), base + match.end(), match[0]
        frame = frames[-1]
        key = (frame.key or "") if frame.is_object else frame.owner
        if match[1] is not None:
            text = str(json.loads(token))
            if _is_declared(text, frame, declared):
                contents.prove(start, end)
            elif _RANDOM.fullmatch(text):
                contents.random.append((start, end, text))
            else:
                contents.texts.append((start, text))
            if frame.is_object and frame.key is None:
                frame.key = text
        elif match[2] is not None:
            if counted or (key == "label" and frame.owner in ("", "label")):
                contents.prove(start, end)
            else:
                contents.texts.append((start, token.decode()))
        else:
            contents.prove(start, end)
            if token in (b"{", b"["):
                frames.append(_Frame(token == b"{", key))
            elif token in (b"}", b"]"):
                frames.pop()
            elif token == b",":
                frame.key = None


def _is_declared(text: str, frame: _Frame, declared: Declared) -> bool:
    if text in declared.words or SHARD.fullmatch(text):
        return True
    if frame.owner != "fields" or not frame.is_object:
        return False
    return text in declared.kept if frame.key is None else text in declared.kept.get(frame.key, ())
