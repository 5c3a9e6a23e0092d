"""A folder or a zip, read in place: nothing is ever extracted to a path that an archive names."""

import csv
import io
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path, PurePosixPath

from tracekin.config import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


class Source:
    """The files below a folder or inside a zip, by their relative names with forward slashes."""

    def __init__(self, path: Path) -> None:
        """List the files.

        Raises:
            UserError: no such path, neither folder nor zip, empty, truncated or damaged zip, no image inside.
        """
        self.path = path
        self.zipped = path.is_file()
        names = _zip_names(path) if self.zipped else _folder_names(path)
        hidden = ("__MACOSX", ".")
        self.names = sorted(n for n in names if not any(part.startswith(hidden) for part in PurePosixPath(n).parts))
        self.images = [n for n in self.names if PurePosixPath(n).suffix.lower() in EXTENSIONS]
        if not self.images:
            raise UserError(f"{path} holds no image; accepted are {', '.join(EXTENSIONS)} files.")
        self._by_key: dict[str, list[str]] = defaultdict(list)
        for name in self.images:
            file = PurePosixPath(name)
            for key in {name, file.name, file.stem}:
                self._by_key[key].append(name)

    def reader(self, name: str) -> Callable[[], bytes]:
        """A picklable function that reads one file."""
        return partial(_read_member, str(self.path), name) if self.zipped else (self.path / name).read_bytes

    def find_image(self, key: str, where: str) -> str:
        """The image named ``key``: its path, its file name, or its file name without extension.

        Raises:
            UserError: none or several; ``where`` says which row asks.
        """
        found = self._by_key.get(key, [])
        if len(found) != 1:
            several = (
                f"{len(found)} images are called so ({', '.join(found[:3])})" if found else "no such image is there"
            )
            raise UserError(
                f"{where} names the image {key!r}, but in {self.path} {several}. "
                "Accepted is a path inside it, a file name or a file name without extension; mend the row or the files."
            )
        return found[0]

    def table(self, name: str, columns: Sequence[str]) -> list[dict[str, str]]:
        """The rows of a CSV file, cells stripped of blanks; row 0 stands in line 2 of the file.

        Raises:
            UserError: not UTF-8, not a CSV, columns missing, a row of another width, no rows.
        """
        where = f"{self.path}: {name}"
        try:
            text = self.reader(name)().decode("utf-8-sig")
            lines = [line for line in csv.reader(io.StringIO(text, newline=""), strict=True) if line]
        except (OSError, ValueError, RuntimeError, EOFError, csv.Error, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{where} cannot be read as CSV in UTF-8: {error}.") from None
        header = [cell.strip() for cell in lines[0]] if lines else []
        missing = [column for column in columns if column not in header]
        if missing:
            raise UserError(f"{where} lacks the column {', '.join(missing)}; it has {', '.join(header) or 'none'}.")
        if len(lines) < 2:
            raise UserError(f"{where} has no rows below its header.")
        for number, line in enumerate(lines[1:], 2):
            if len(line) != len(header):
                raise UserError(f"{where} row {number} has {len(line)} cells; the header has {len(header)}.")
        return [dict(zip(header, map(str.strip, line), strict=True)) for line in lines[1:]]

    def refuse_images_without_row(self, used: set[str], table: str) -> None:
        """Raise UserError if an image is not in ``used``."""
        spare = [name for name in self.images if name not in used]
        if spare:
            raise UserError(
                f"{self.path}: the image {spare[0]} has no row in {table}"
                + (f" ({len(spare)} images have none)" if len(spare) > 1 else "")
                + "; add rows or remove the images."
            )


def _folder_names(path: Path) -> list[str]:
    if not path.is_dir():
        raise UserError(f"no such source: {path}; accepted is a folder or a zip file.")
    return [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()]


def _zip_names(path: Path) -> list[str]:
    if path.stat().st_size == 0:
        raise UserError(f"{path} is empty (0 bytes); copy or download it again.")
    try:
        with zipfile.ZipFile(path) as archive:
            names = [entry.filename for entry in archive.infolist() if not entry.is_dir()]
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise UserError(
            f"{path} is not a whole zip file ({error}): truncated or of another kind. "
            "Accepted is a folder or a zip file; copy or download it again."
        ) from None
    name, times = Counter(names).most_common(1)[0] if names else ("", 0)
    if times > 1:
        raise UserError(f"{path} holds {times} files called {name}; make the archive again.")
    return names


@lru_cache(maxsize=4)
def _open_zip(path: str) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)  # stays open: each worker process reads many members


def _read_member(path: str, name: str) -> bytes:
    return _open_zip(path).read(name)
