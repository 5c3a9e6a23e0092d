"""Files that appear whole or not at all."""

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from tracekin.config.errors import UserError

T = TypeVar("T")
PATIENCE = (1.0, 2.0, 4.0, 8.0)
"""Seconds between the attempts to write: a store that is away for a moment costs nothing."""


def write_text(path: Path, text: str, *, durable: bool = False) -> None:
    """Write UTF-8 text as ``write_bytes`` does."""
    write_bytes(path, text.encode(), durable=durable)


def write_bytes(path: Path, content: bytes, *, durable: bool = False) -> None:
    """Write under a temporary name and rename it: a kill never leaves half a file, an error not even that name.

    Args:
        path: the file.
        content: its new content.
        durable: wait until the content is on disk, so that a power cut does not leave an empty file either.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        temporary.write_bytes(content)
        if durable:
            flush(temporary)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def patiently(action: Callable[[], T]) -> T:
    """Do what may fail for a moment, as a store that is away does: again after each wait of PATIENCE.

    Raises:
        OSError: of the last attempt.
    """
    for wait in PATIENCE:
        try:
            return action()
        except OSError:
            time.sleep(wait)
    return action()


def surely(path: Path, action: Callable[[], T]) -> T:
    """Do what writes a run's file, patiently.

    Raises:
        UserError: it cannot be written.
    """
    try:
        return patiently(action)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error} (tried {len(PATIENCE) + 1} times in {sum(PATIENCE):.0f}"
            " s). Make room or mend the folder; the same command again goes on from the last checkpoint."
        ) from None


def append(path: Path, line: str) -> None:
    """Add a line to a file, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    content = f"{line}\n".encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        end = os.fstat(descriptor).st_size
        if os.write(descriptor, content) < len(content):  # the disk is full
            os.ftruncate(descriptor, end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(descriptor)


def flush(path: Path) -> None:
    """Wait until what was written to a file, or into a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
