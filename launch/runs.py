"""What lies in run folders, read without torch: who was submitted for them, how often they started, how far they are.

``submissions.jsonl`` and ``starts.jsonl`` hold one JSON object a line; a line torn by a kill is left out.
"""

import datetime
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SUBMISSIONS = "submissions.jsonl"
STARTS = "starts.jsonl"
TAIL = 1 << 16
"""Bytes read from the end of a file of metrics: its last hundred lines or so."""


def submissions(folder: Path) -> list[dict[str, Any]]:
    """The jobs submitted for a run (or for a sweep, or a packing), oldest first."""
    return list(_lines(_read(folder / SUBMISSIONS)))


def record(folder: Path, **line: Any) -> None:
    """Append a line to a folder's submissions: ``stage``, ``job``, ``profile``, ``logs``, ...; the time if missing."""
    folder.mkdir(parents=True, exist_ok=True)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    with (folder / SUBMISSIONS).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"time": now, **line}) + "\n")  # one write: lines of two submitters do not mix


def starts(folder: Path) -> list[dict[str, Any]]:
    """The starts of a run and their ends, oldest first. A start that was killed has no end."""
    return list(_lines(_read(folder / STARTS)))


def metrics(folder: Path, most: int) -> list[dict[str, Any]]:
    """The newest lines of a run's metrics.jsonl, oldest first; at most ``most``, and what TAIL holds."""
    return list(_lines("\n".join(_read(folder / "metrics.jsonl", TAIL).splitlines()[-most:])))


def last_step(run_folder: Path) -> int:
    """The step that checkpoints/latest names; 0 if there is none."""
    name = _read(run_folder / "checkpoints" / "latest").strip()
    number = name.removeprefix("step-")
    return int(number) if number.isdecimal() else 0


def num_steps(run_folder: Path) -> int | None:
    """The run's last step as its newest submission or start knows it; None if neither does."""
    for line in [*reversed(submissions(run_folder)), *reversed(starts(run_folder))]:
        if line.get("steps"):
            return int(line["steps"])
    return None


def is_finished(run_folder: Path) -> bool:
    """Whether the newest checkpoint is that of the last step; who knows no last step takes the run's own word."""
    total = num_steps(run_folder)
    if total is not None:
        return last_step(run_folder) >= total
    return any(line.get("outcome") == "finished" for line in starts(run_folder)[-1:])


def find_runs(root: Path) -> list[Path]:
    """The folders below ``root``, and itself, that hold submissions; sorted."""
    found = []
    waiting = [root]
    while waiting:
        folder = waiting.pop()
        if (folder / SUBMISSIONS).is_file():
            found.append(folder)
        if (folder / "config.yaml").is_file() or (folder / "launch" / "config.yaml").is_file():
            continue  # a run: nothing below it is one
        waiting += _folders(folder)
    return sorted(found)


def _folders(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return [
                folder / entry.name
                for entry in entries
                if entry.is_dir(follow_symlinks=False) and entry.name != "launch" and not entry.name.startswith("code-")
            ]
    except OSError:
        return []


def _read(path: Path, tail: int = 0) -> str:
    """A file's text, or its whole lines in the last ``tail`` bytes; "" if there is no such file."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            skip = max(0, size - tail) if tail else 0
            file.seek(skip)
            data = file.read()
    except OSError:
        return ""
    return (data.partition(b"\n")[2] if skip else data).decode("utf-8", errors="replace")


def _lines(text: str) -> Iterator[dict[str, Any]]:
    for line in text.splitlines():
        try:
            content = json.loads(line)
        except ValueError:
            continue
        if isinstance(content, dict):
            yield content
