"""Whatever a source calls its images, patients and dates: names of files, cells of tables, values of DICOM headers."""

import csv
import io
import json
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from shards.privacy.metadata import decode_text, texts
from shards.source import EXTENSIONS, Source
from shards.workers import ordered_map
from tracekin.config import UserError

TABLES = (".csv", ".tsv", ".txt")
DICOM = (".dcm", ".dicom", ".ima")
LONGEST = 64
"""Characters; of a longer value only so many are looked for, so that a part of it is found, too."""
_TEXTUAL = frozenset(
    ("AE", "AS", "CS", "DA", "DS", "DT", "IS", "LO", "LT", "PN", "SH", "ST", "TM", "UC", "UI", "UN", "UR", "UT")
)  # value representations, PS3.5 section 6.2
_NUMERIC = frozenset(("FD", "FL", "SL", "SS", "SV", "UL", "US", "UV"))
_ISO_DATE = re.compile(r"(?<!\d)((?:19|20)\d\d)([-:/.]?)(\d\d)\2(\d\d)(?=\d{6}(?!\d)|(?!\d))")  # a time may follow
_LOCAL_DATE = re.compile(r"(?<!\d)(\d\d)([-/.])(\d\d)\2((?:19|20)\d\d)(?!\d)")
_SPELLINGS = ("%Y%m%d", "%Y-%m-%d", "%Y:%m:%d", "%Y/%m/%d", "%d.%m.%Y", "%d/%m/%Y", "%m/%d/%Y")


class Origin(NamedTuple):
    kind: str
    """names, table cells, DICOM values, image metadata, array values or dates."""
    detail: str
    """Where in the source it was found first."""


@dataclass
class Identifiers:
    origins: dict[str, Origin] = field(default_factory=dict)
    """Each identifier and where it comes from."""
    kept: dict[str, set[str]] = field(default_factory=dict)
    """The values of each field that ``--keep`` names."""
    unread: list[str] = field(default_factory=list)
    """Files of which only the names are known here."""


@dataclass
class _Inside:
    """What one file says; picklable."""

    texts: list[tuple[str, Origin]] = field(default_factory=list)
    fields: list[tuple[str, str]] = field(default_factory=list)
    unread: bool = False


def read_identifiers(path: Path, keep: tuple[str, ...] = (), workers: int = 1) -> Identifiers:
    """List the identifiers of a source, each once, with where it was found first.

    Of every file: its path, the name of each folder, its name with and without extension. Of tables (.csv, .tsv, .txt)
    and .json: every cell, or line; a table's first line is its header and no identifier, unless a cell of it is a
    number, a date or a file's name. Of DICOM: every textual value of the header, private ones and those of sequences
    included, and each component of a person's name. Of images: the texts in their metadata. Of .npz: the arrays' names
    and texts. Of all that: every date in its other usual spellings.

    Raises:
        UserError: what ``Source`` refuses, no file, DICOM files but no pydicom, a field of ``keep`` that no table or
            header has.
    """
    source = Source(path)
    if not source.names:
        raise UserError(f"{path} holds no file, so nothing can be searched for; name what the set was packed from.")
    found = Identifiers(kept={name: set() for name in keep})
    _add(found, str(path.resolve()), Origin("names", "the source's path"))
    _add(found, path.name, Origin("names", "the source's name"))
    names: set[str] = set()
    for name in source.names:
        file = PurePosixPath(name)
        for text in (name, file.name, file.stem):
            _add(found, text, Origin("names", f"of {name}"))
        if file.suffix.lower() not in (*TABLES, ".json"):
            names |= {name, file.name, file.stem}
        for part in file.parts[:-1]:
            _add(found, part, Origin("names", f"a folder of {name}"))
    for name, inside in _look_inside(source, names, keep, workers):
        for text, origin in inside.texts:
            _add(found, text, origin)
        for key, value in inside.fields:
            found.kept[key].add(value)
        if inside.unread:
            found.unread.append(name)
    absent = [name for name, values in found.kept.items() if not values]
    if absent:
        raise UserError(f"--keep {absent[0]}: no table of {path} has such a column and no DICOM header such a value.")
    return found


def spellings(text: str) -> set[str]:
    """The dates in a text, each as 20150131, 2015-01-31, 2015:01:31, 2015/01/31, 31.01.2015, 31/01/2015 and 01/31/2015.

    Of 01/02/2015 both readings count.
    """
    read = [(y, m, d) for y, _, m, d in _ISO_DATE.findall(text)]
    for first, _, second, year in _LOCAL_DATE.findall(text):
        read += [(year, second, first), (year, first, second)]
    found = set()
    for numbers in read:
        try:
            day = date(*map(int, numbers))
        except ValueError:
            continue
        found |= {day.strftime(spelling) for spelling in _SPELLINGS}
    return found


def _add(found: Identifiers, text: str, origin: Origin) -> None:
    text = unicodedata.normalize("NFC", text).strip(" \t\r\n\0")
    if text in found.origins or not any(map(str.isalnum, text)):
        return
    found.origins.setdefault(text[:LONGEST].strip(), origin)
    if any(sign.isdigit() for sign in text):
        for spelling in sorted(spellings(text)):
            found.origins.setdefault(spelling, Origin("dates", origin.detail))


def _look_inside(source: Source, names: set[str], keep: tuple[str, ...], workers: int) -> Iterator[tuple[str, _Inside]]:
    """Each file and what it says: the few tables and arrays here, images and headers in the workers."""
    many = []
    for name in source.names:
        suffix = PurePosixPath(name).suffix.lower()
        if suffix in TABLES:
            yield name, _tried(_read_table, source, name, names, keep)
        elif suffix == ".json":
            yield name, _tried(_read_json, source, name)
        elif suffix == ".npy" or (suffix == ".npz" and not source.zipped):
            yield name, _tried(_read_arrays, source, name)
        else:
            many.append((name, source.opener(name)))
    yield from zip(
        (name for name, _ in many), ordered_map(partial(_read_image, keep), many, workers, chunk=64), strict=True
    )


def _tried(read: Callable[..., None], *arguments: Any) -> _Inside:
    """What ``read`` finds; damaged files fail in many ways, and the summary says that only their names are known."""
    inside = _Inside()
    try:
        read(inside, *arguments)
    except UserError:
        raise
    except Exception:
        inside.unread = True
    return inside


def _read_image(keep: tuple[str, ...], file: tuple[str, Callable[[], BinaryIO]]) -> _Inside:
    name, opener = file
    suffix = PurePosixPath(name).suffix.lower()
    return _tried(_read_metadata if suffix in EXTENSIONS else _read_dicom, name, opener, keep)


def _read_metadata(inside: _Inside, name: str, opener: Callable[[], BinaryIO], keep: tuple[str, ...]) -> None:
    with opener() as file:
        inside.texts += [(text, Origin("image metadata", name)) for text in texts(file)]


def _read_json(inside: _Inside, source: Source, name: str) -> None:
    content = json.loads(decode_text(source.reader(name)()))
    inside.texts += [(text, Origin("table cells", name)) for text in _json_texts(content)]


def _read_arrays(inside: _Inside, source: Source, name: str) -> None:
    inside.texts += [(text, Origin("array values", name)) for text in _array_texts(source, name)]


def _read_table(inside: _Inside, source: Source, name: str, names: set[str], keep: tuple[str, ...]) -> None:
    text = decode_text(source.reader(name)())
    first = text.partition("\n")[0]
    delimiter = max(",;\t", key=first.count) if any(sign in first for sign in ",;\t") else "|"
    try:
        read = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))
    except csv.Error:
        read = [line.split(delimiter) for line in text.splitlines()]
    rows = [[cell.strip() for cell in row] for row in read]
    is_list = name.lower().endswith(".txt") and first.count(delimiter) == 0
    header = [] if is_list or not rows or any(map(partial(_is_value, names), rows[0])) else rows.pop(0)
    origins = [Origin("table cells", f"column {column!r} of {name}") for column in header]
    kept = [(index, column) for index, column in enumerate(header) if column in keep]
    other = Origin("table cells", name)
    seen: set[tuple[int, str]] = set()
    for row in rows:
        for index, cell in enumerate(row):
            if (index, cell) not in seen:
                seen.add((index, cell))
                origin = origins[index] if index < len(origins) else other
                inside.texts += [(part, origin) for part in {cell, *re.split(r"[|;]", cell)}]
        inside.fields += [(column, row[index]) for index, column in kept if index < len(row)]
    inside.fields = sorted(set(inside.fields))
    if name.lower().endswith(".txt"):
        inside.texts += [(line, Origin("table cells", f"a line of {name}")) for line in text.splitlines()]


def _is_value(names: set[str], cell: str) -> bool:
    return cell in names or bool(re.fullmatch(r"[\d.,:/ +-]*\d[\d.,:/ +-]*", cell))


def _json_texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _json_texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _json_texts(inner)
    elif value is not None and not isinstance(value, bool):
        yield str(value)


def _array_texts(source: Source, name: str) -> Iterator[str]:
    """The names of an archive's arrays and the values of arrays of text; others are not even decompressed."""
    if name.endswith(".npz"):
        archive = Source(source.path / name)
        for member in archive.names:
            yield PurePosixPath(member).stem
            yield from _array_texts(archive, member)
        return
    with source.opener(name)() as file:
        version = np.lib.format.read_magic(file)
        read: Any = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        if read(file)[2].kind not in "USO":
            return
    with source.opener(name)() as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
    for value in np.unique(array).tolist():
        yield value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _read_dicom(inside: _Inside, name: str, opener: Callable[[], BinaryIO], keep: tuple[str, ...]) -> None:
    with opener() as file:
        prefix = file.read(132)[128:] == b"DICM"
    if not prefix and PurePosixPath(name).suffix.lower() not in DICOM:
        inside.unread = True
        return
    try:
        from pydicom import dcmread
    except ImportError:
        raise UserError(
            f"the source holds DICOM files ({name}), whose headers need the package pydicom; "
            "install it, or tracekin with its extra dicom."
        ) from None
    from shards.recipes.dicom_pixels import quiet

    with quiet(), opener() as file:
        header = dcmread(file, stop_before_pixels=True, force=True)
        if not header:
            raise ValueError("no DICOM")
        for dataset in (header.file_meta, header):
            for keyword, said, textual in _dicom_values(dataset):
                if textual:
                    inside.texts += [(text, Origin("DICOM values", f"{keyword} of {name}")) for text in said]
                if keyword in keep:
                    inside.fields += [(keyword, text) for text in (*said, "\\".join(said))]


def _dicom_values(dataset: Any) -> Iterator[tuple[str, list[str], bool]]:
    """(keyword or tag, texts, textual by its type) of each element, those of sequences included; no bulk data."""
    for tag in list(dataset.keys()):
        try:
            element = dataset[tag]
        # A value that its type does not allow is text all the same.
        except Exception:
            yield str(tag), [dataset.get_item(tag).value.decode("latin-1")], True
            continue
        keyword = element.keyword or str(tag)
        if element.VR == "SQ":
            for item in element.value:
                yield from _dicom_values(item)
        elif element.VR in _TEXTUAL:
            yield keyword, _element_texts(element), True
        elif element.VR in _NUMERIC:
            values = element.value if element.VM > 1 else [element.value]
            yield keyword, [str(value) for value in values if value is not None], False


def _element_texts(element: Any) -> list[str]:
    value = element.value
    if isinstance(value, bytes):  # a private element of unknown type
        return [part for part in value.decode("latin-1").rstrip("\0").split("\\") if part.isprintable()]
    said = [str(one) for one in (value if element.VM > 1 else [value]) if one is not None]
    if element.VR == "PN":
        said += [part for text in said for part in re.split(r"[=^]", text)]
    elif element.VR in ("LT", "ST", "UT"):
        said += [line for text in said for line in text.splitlines()]
    return said
