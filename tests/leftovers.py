"""What processes leave behind: descendants and shared memory."""

import ctypes
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

OURS = ("torch_", "deepspeed", "wandb", "sem.", "psm_", "pym-")
"""How names of shared memory of torch, DeepSpeed, the W&B client and multiprocessing begin."""
SUBREAPER = 36
"""PR_SET_CHILD_SUBREAPER of prctl(2)."""


class Present(NamedTuple):
    processes: dict[int, str]
    """Command lines, by process id."""
    memory: set[str]
    """Names in /dev/shm."""


@contextmanager
def adopting() -> Iterator[Present]:
    """Within the block orphans among this process's descendants become its children; yields what is there before.

    After it, those that are new are killed: a test that fails leaves nothing either.
    """
    prctl = ctypes.CDLL(None).prctl
    prctl(SUBREAPER, 1)
    before = present()
    try:
        yield before
    finally:
        for pid in children().keys() - before.processes.keys():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        prctl(SUBREAPER, 0)


def present() -> Present:
    """Living descendants of this process, and the shared memory of this machine that may be theirs."""
    return Present(children(), {name for name in os.listdir("/dev/shm") if name.startswith(OURS)})


def left_behind(before: Present, patience: float = 8.0) -> list[str]:
    """What is there beyond ``before`` and does not go within ``patience`` seconds; call it within ``adopting``."""
    deadline = time.monotonic() + patience
    while True:
        now = present()
        left = [f"{pid}: {command}" for pid, command in now.processes.items() if pid not in before.processes]
        memory = {f"/dev/shm/{name}" for name in now.memory - before.memory}
        left += sorted(memory - _mapped_by_others(now) if memory else memory)
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.05)


def children(of: int | None = None) -> dict[int, str]:
    """The descendants of a process, this one by default, that have not ended: command lines by id."""
    parents, commands = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state, parent = (folder / "stat").read_text(errors="replace").rpartition(") ")[2].split()[:2]
            if state != "Z":
                parents[int(folder.name)] = int(parent)
                commands[int(folder.name)] = (folder / "cmdline").read_text(errors="replace").replace("\0", " ")
    found = {of or os.getpid()}
    while new := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= new
    return {pid: commands[pid] for pid in sorted(found - {of or os.getpid()})}


def _mapped_by_others(now: Present) -> set[str]:
    """Shared memory that living processes hold which are no descendants: another user of this machine made it."""
    found = set[str]()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        if int(maps.parent.name) not in now.processes:
            with suppress(OSError):
                found |= {line.split()[-1] for line in maps.read_text().splitlines() if "/dev/shm/" in line}
    return found
