"""Files that appear whole or not at all."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text under a temporary name and rename it: a kill never leaves half a file."""
    with appearing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path`` for the block to write to; renamed at its end, removed after an error."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
