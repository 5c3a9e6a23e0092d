"""Files that appear whole or not at all."""

import os
from pathlib import Path


def write_text(path: Path, text: str, *, durable: bool = False) -> None:
    """Write UTF-8 text under a temporary name and rename it: a kill never leaves half a file.

    Args:
        path: the file.
        text: its new content.
        durable: wait until the content is on disk, so that a power cut does not leave an empty file either.
    """
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text, encoding="utf-8")
    if durable:
        flush(temporary)
    temporary.replace(path)


def flush(path: Path) -> None:
    """Wait until what was written to a file, or into a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
