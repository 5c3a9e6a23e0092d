"""Faults of the disk: it fills up, or can no longer be written. Each mounts a small file system of its own."""

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from tests.faults.harm import Gate, hold_before_step
from tests.faults.trial import EPOCH, Chance, Lab, Result, last_step
from tests.faults.waiting import wait_until
from tracekin import checkpoint

TRY_AGAIN = 75
PAGE = 1 << 12
SLACK = 4 * PAGE
"""Room for the lines of several steps, and not for a checkpoint."""


@contextmanager
def _disk(lab: Lab, megabytes: int) -> Iterator[Path]:
    disk = lab.new("disk")
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(disk)], check=True)
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def _fill(disk: Path, slack: int) -> None:
    """Fill a file system, but for ``slack`` bytes."""
    with (disk / "ballast").open("ab", buffering=0) as file:
        with suppress(OSError):
            while True:
                file.write(bytes(PAGE))
        file.truncate(max(0, file.tell() - slack))


def full_for_a_checkpoint(lab: Lab, chance: Chance, *, again: bool = False) -> Result:
    """Room for lines, and for no checkpoint; ``again``: at the next start, which ends too, there is none at all."""
    form = chance.form(2)
    after = chance.randrange(5, 15)

    def fill(ranks: Any, run: Path) -> None:
        wait_until(ranks, lambda: last_step(run) >= after)
        _fill(run.parent, SLACK)

    second: list[tuple[list[int | None], list[str]]] = []

    def between(run: Path) -> None:
        if again:
            _fill(run.parent, 0)
            before = checkpoint.complete(run)
            ranks = lab.start(form, run)
            second.append((ranks.wait(), ranks.said()))
            assert checkpoint.complete(run) == before
            assert not any(map(checkpoint.damage_of, before))
        (run.parent / "ballast").unlink()

    with _disk(lab, 8) as disk:
        result = lab.attempt(form, fill, codes={2}, run=disk / "run", between=between)
    _must_end_in_a_line(result, result.said[0], "cannot write the checkpoint")
    result.must("Traceback" not in result.said[1], "rank 1 has a traceback")
    for codes, said in second:
        result.must(codes[0] == 2 and codes[1] in (2, TRY_AGAIN), f"on a full disk the next start ended with {codes}")
        _must_end_in_a_line(result, said[0], "cannot write")
    return result


def full_for_a_line(lab: Lab, chance: Chance) -> Result:
    """No room at all from one epoch's end on, so that a line of metrics fails before the next checkpoint could."""
    gate = Gate(str(lab.new("gate")))
    harm = partial(hold_before_step, step=EPOCH, gate=gate)

    def fill(ranks: Any, run: Path) -> None:
        whole = run / "checkpoints" / f"step-{EPOCH:08d}"
        wait_until(ranks, lambda: gate.reached() and whole.exists())
        time.sleep(0.1)  # it may still remove what is old
        _fill(run.parent, 0)
        gate.open()

    with _disk(lab, 8) as disk:
        result = lab.attempt(
            chance.form(2),
            fill,
            codes={2, TRY_AGAIN},
            run=disk / "run",
            overrides=("train.save_every=0",),
            between=lambda run: (disk / "ballast").unlink(),
            harm=harm,
        )
    result.must(result.codes[0] == 2, "rank 0 did not end with 2")
    _must_end_in_a_line(result, result.said[0], f"cannot write {disk / 'run' / 'metrics.jsonl'}")
    return result


def read_only(lab: Lab, chance: Chance) -> Result:
    def remount(disk: Path, how: str) -> bool:
        words = ["mount", "-i", "-o", f"remount,{how}", str(disk)]
        return subprocess.run(words, capture_output=True, check=False).returncode == 0

    def freeze(ranks: Any, run: Path) -> None:
        wait_until(ranks, lambda: last_step(run) >= 5)
        for _ in range(200):  # refused while somebody has a file open for writing
            if remount(run.parent, "ro"):
                return
            time.sleep(0.01)
        raise AssertionError("the file system could not be made read-only")

    def thaw(run: Path) -> None:
        assert remount(run.parent, "rw")

    with _disk(lab, 32) as disk:
        result = lab.attempt(chance.form(2), freeze, codes={2, TRY_AGAIN}, run=disk / "run", between=thaw)
    result.must(result.codes[0] == 2, "rank 0 did not end with 2")
    _must_end_in_a_line(result, result.said[0], "cannot write")
    return result


def _must_end_in_a_line(result: Result, said: str, begins: str) -> None:
    """A rank's last word is one line of the command's, and no traceback."""
    own = [line for line in said.splitlines() if line.startswith("tracekin: ")]
    result.must(len(own) == 1 and own[0].startswith(f"tracekin: {begins}"), f"not one line of {begins!r}: {own}")
    result.must("Traceback" not in said, "a traceback")
