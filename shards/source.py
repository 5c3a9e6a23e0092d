"""A folder or a zip, read in place: nothing is ever extracted to a path that an archive names."""

import csv
import io
import os
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import BinaryIO, cast

from tracekin.config import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
LARGEST = 1 << 30
"""Bytes of a file that is read at once; a zip of a megabyte may hold members of many gigabytes."""
_LITTLE = 4096
HIDDEN = ("/__MACOSX", "/.")  # how a part of a path starts that file managers leave behind


class Source:
    """The files below a folder or inside a zip, by their relative names with forward slashes."""

    def __init__(self, path: Path) -> None:
        """List the files.

        Raises:
            UserError: no such path, neither folder nor zip, a folder that cannot be listed, an empty, truncated or
                damaged zip, a name that is no UTF-8.
        """
        self.path = path
        self._prefix = f"{path}{os.sep}"  # joining texts, not paths: packing must not wait for lists of names
        self.zipped = path.is_file()
        self._members = _zip_members(path) if self.zipped else {}
        self.names = sorted(_visible(path, self._members if self.zipped else _folder_names(path)))
        self.images = [name for name in self.names if name.lower().endswith(EXTENSIONS)]
        self.tables = [name for name in self.names if name.lower().endswith(".csv")]

    def reader(self, name: str) -> Callable[[], bytes]:
        """A picklable function that reads one file."""
        return partial(_read_member, str(self.path), name) if self.zipped else partial(_read_file, self._prefix + name)

    def opener(self, name: str) -> Callable[[], BinaryIO]:
        """A picklable function that opens one file for reading and seeking."""
        return partial(_open_member, str(self.path), name) if self.zipped else partial(_open_file, self.path / name)

    def stamp(self, name: str) -> str:
        """What changes when the file does: size and time of change in ns; of a zip's member size and CRC-32.

        Raises:
            UserError: the file has gone or cannot be reached.
        """
        if self.zipped:
            return self._members[name]
        try:
            status = os.stat(self._prefix + name)
        except OSError as error:
            raise UserError(f"cannot read {self.path / name}: {error.strerror}.") from None
        return f"{status.st_size}-{status.st_mtime_ns}"

    def require_images(self) -> list[str]:
        """The images' names.

        Raises:
            UserError: there is none.
        """
        if not self.images:
            raise UserError(f"{self.path} holds no image; accepted are {', '.join(EXTENSIONS)} files.")
        return self.images

    def find_file(self, recipe: str, *names: str) -> str:
        """The only file called by one of these names, anywhere in the source.

        Raises:
            UserError: none or several.
        """
        found = [name for name in self.names if name.rpartition("/")[2] in names]
        if len(found) != 1:
            several = f" ({', '.join(found)})" if found else ""
            raise UserError(
                f"{self.path} holds {len(found)} files called {' or '.join(names)}{several}; "
                f"the recipe {recipe} needs exactly one."
            )
        return found[0]

    def text(self, name: str) -> str:
        """A text file.

        Raises:
            UserError: it cannot be read or is no UTF-8.
        """
        try:
            return self.reader(name)().decode("utf-8-sig")
        except (OSError, ValueError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{self.path}: {name} cannot be read as text in UTF-8: {error}.") from None

    def table(self, name: str, columns: Sequence[str]) -> list[dict[str, str]]:
        """The rows of a CSV file, cells stripped of blanks; row 0 stands in line 2 of the file.

        Columns without a name and commas at a line's end are overlooked.

        Raises:
            UserError: not UTF-8, not a CSV, columns missing or twice, a row of another width, no rows.
        """
        where = f"{self.path}: {name}"
        try:
            lines = [line for line in csv.reader(io.StringIO(self.text(name), newline=""), strict=True) if line]
        except csv.Error as error:
            raise UserError(f"{where} cannot be read as CSV: {error}.") from None
        header = [cell.strip() for cell in lines[0]] if lines else []
        while header and not header[-1]:
            header.pop()
        missing = [column for column in columns if column not in header]
        if missing:
            raise UserError(f"{where} lacks the column {', '.join(missing)}; it has {', '.join(header) or 'none'}.")
        column, times = Counter(filter(None, header)).most_common(1)[0]
        if times > 1:
            raise UserError(f"{where} has {times} columns called {column!r}; rename or remove the others.")
        if len(lines) < 2:
            raise UserError(f"{where} has no rows below its header.")
        for number, line in enumerate(lines[1:], 2):
            if len(line) < len(header) or any(cell.strip() for cell in line[len(header) :]):
                raise UserError(f"{where} row {number} has {len(line)} cells; the header has {len(header)}.")
        return [{c: cell.strip() for c, cell in zip(header, line, strict=False) if c} for line in lines[1:]]


class Index:
    """Images of a source by path, file name, file name without extension, and whatever else is added."""

    def __init__(self, source: Source, names: Iterable[str]) -> None:
        self.source, self.names = source, list(names)
        self._by_key: dict[str, list[str]] = defaultdict(list)
        for name in self.names:
            file = name.rpartition("/")[2]
            for key in {name, file, file.rpartition(".")[0] or file}:
                self.add(key, name)

    def add(self, key: str, name: str) -> None:
        """Let ``key`` find the image, too."""
        self._by_key[key].append(name)

    def __contains__(self, key: str) -> bool:
        return key in self._by_key

    def find(self, key: str, where: str) -> str:
        """The image that ``key`` names.

        Raises:
            UserError: none or several; ``where`` says which row asks.
        """
        found = self._by_key.get(key, [])
        if len(found) != 1:
            several = (
                f"{len(found)} images are called so ({', '.join(found[:3])})" if found else "no such image is there"
            )
            raise UserError(
                f"{where} names the image {key!r}, but in {self.source.path} {several}. "
                "Accepted is a path inside it, a file name or a file name without extension; mend the row or the files."
            )
        return found[0]


def join(
    index: Index, table: str, key: str, columns: Sequence[str], missing_ok: bool = False
) -> Iterator[tuple[str, str, dict[str, str]]]:
    """Each row of a table with its image: (where the row stands, the image's name, the row).

    Args:
        index: the images.
        table: the CSV's name in the source.
        key: the column that names the image.
        columns: what else the table must have.
        missing_ok: leave out rows without image instead of refusing them.

    Raises:
        UserError: what :meth:`Source.table` refuses, a row without image, two rows of one image, an image without row.
    """
    source, used = index.source, set()
    for number, row in enumerate(source.table(table, [key, *columns]), 2):
        where = f"{source.path}: {table} row {number}"
        if missing_ok and row[key] not in index:
            continue
        name = index.find(row[key], where)
        if name in used:
            raise UserError(f"{where} names the image {row[key]} a second time; remove one of the rows.")
        used.add(name)
        yield where, name, row
    spare = [name for name in index.names if name not in used]
    if spare:
        raise UserError(
            f"{source.path}: the image {spare[0]} has no row in {table}"
            + (f" ({len(spare)} images have none)" if len(spare) > 1 else "")
            + "; add rows or remove the images."
        )


def _visible(path: Path, names: Iterable[str]) -> Iterator[str]:
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise UserError(f"{path} holds the file {name!r}, whose name is no UTF-8; rename it.") from None
        if not any(start in f"/{name}" for start in HIDDEN):
            yield name


def _folder_names(path: Path) -> Iterator[str]:
    """Files below a folder, links followed unless they lead back to a folder above."""
    if not path.is_dir():
        raise UserError(f"no such source: {path}; accepted is a folder or a zip file.")
    waiting: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while waiting:
        prefix, above = waiting.pop()
        try:
            status = os.stat(path / prefix)
            here = (status.st_dev, status.st_ino)
            if here in above:
                continue
            with os.scandir(path / prefix) as entries:
                for entry in entries:
                    if entry.is_dir():
                        waiting.append((f"{prefix}{entry.name}/", above | {here}))
                    elif entry.is_file():
                        yield prefix + entry.name
        except OSError as error:
            raise UserError(f"cannot list {path / prefix}: {error.strerror}.") from None


def _zip_members(path: Path) -> dict[str, str]:
    """Each member's name and stamp."""
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty (0 bytes); copy or download it again.")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [entry for entry in archive.infolist() if not entry.is_dir()]
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise UserError(
            f"{path} is not a whole zip file ({error}): truncated or of another kind. "
            "Accepted is a folder or a zip file; copy or download it again."
        ) from None
    name, times = Counter(entry.filename for entry in entries).most_common(1)[0] if entries else ("", 0)
    if times > 1:
        raise UserError(f"{path} holds {times} files called {name}; make the archive again.")
    return {entry.filename: f"{entry.file_size}-{entry.CRC:08x}" for entry in entries}


@lru_cache(maxsize=4)
def _kept_open(path: str, changed: int, process: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)  # each worker process reads many members


def _open_zip(path: str) -> zipfile.ZipFile:
    # Opened anew when the file was made anew, and by a forked process, which would share its parent's position in it.
    return _kept_open(path, os.stat(path).st_mtime_ns, os.getpid())


def _read_member(path: str, name: str) -> bytes:
    archive = _open_zip(path)
    info = archive.getinfo(name)
    _check_size(info.file_size)
    if info.compress_type == zipfile.ZIP_BZIP2:  # a few hundred of its bytes may be gigabytes, and nothing stops it
        raise ValueError("it is compressed by bzip2; accepted are deflate and LZMA")
    with archive.open(info) as file:
        # Given a number, zipfile inflates no more, whatever the member holds; LZMA it can only give little at a time.
        if info.compress_type != zipfile.ZIP_LZMA:
            return file.read(info.file_size)
        return b"".join(iter(partial(file.read, _LITTLE), b""))


def _read_file(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)  # a file object takes twice as long over a small image
    try:
        size = os.fstat(descriptor).st_size
        _check_size(size)
        content = os.read(descriptor, size + 1)
        while len(content) != size and (more := os.read(descriptor, 1 << 20)):  # 2 GiB at most come at once
            content += more
        return content
    finally:
        os.close(descriptor)


def _check_size(size: int) -> None:
    if size > LARGEST:
        raise ValueError(f"it has {size} bytes; accepted are {LARGEST}")


def _open_member(path: str, name: str) -> BinaryIO:
    return cast(BinaryIO, _open_zip(path).open(name))


def _open_file(path: Path) -> BinaryIO:
    return path.open("rb")
