"""What Python opens, makes, runs and unpickles meanwhile; and how much memory it takes."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

EVENTS = (
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.symlink",
    "os.link",
    "os.system",
    "subprocess.Popen",
    "pickle.find_class",
)
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_lists: list[list[tuple[str, str]]] = []
_hooked: list[bool] = []


@contextmanager
def watched() -> Iterator[list[tuple[str, str]]]:
    """Collects (what, on which path): "read" and "write" of files, and EVENTS. Python's own files are left out."""
    if not _hooked:  # a hook stays for ever
        _hooked.append(True)
        sys.addaudithook(_note)
    _lists.append([])
    try:
        yield _lists[-1]
    finally:
        _lists.pop()


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if not _lists or event not in ("open", *EVENTS):
        return
    path = os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes) else str(arguments[0])
    if event == "os.remove" and arguments[1] >= 0:  # relative to an open folder, as rmtree does
        path = os.path.join(os.readlink(f"/proc/self/fd/{arguments[1]}"), path)
    if event == "open":
        event = "write" if arguments[2] & WRITES else "read"
    own = path.startswith((sys.prefix, sys.base_prefix, "/proc/", "/sys/")) or path.isdecimal()
    if not (event == "read" and (own or path.endswith((".py", ".pyc")))):
        _lists[-1].append((event, path))


@contextmanager
def memory_bounded(mebibytes: int) -> Iterator[None]:
    """Fails where this process's peak rises by more meanwhile."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _resident("VmRSS")
    yield
    risen = (_resident("VmHWM") - before) / 1024
    assert risen <= mebibytes, f"{risen:.0f} MiB were taken"


def _resident(key: str) -> int:
    """KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])
