"""Freeze the code into the run folder: a job that waits, or is requeued, runs what was submitted.

The snapshot precedes the checkout and an installed package on PYTHONPATH (slurm and launch put it there).
"""

import hashlib
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tracekin.config import UserError

ROOT = Path(__file__).parent.parent
FOLDERS = ("src", "launch", "shards", "slurm")


def take(folder: Path) -> Path:
    """Copy the checkout's code to ``folder/code-HASH``; the same code again is the same folder, copied once.

    Beside the code lies REVISION: the commit, with ``-dirty`` where files differ from it.

    Raises:
        UserError: the folder cannot be written.
    """
    files = _files()
    final = place(folder, files)
    if final.is_dir():
        return final
    partial = final.with_name(f".{final.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        for file in files:
            target = partial / file.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, target)
        (partial / "REVISION").write_text(f"{_revision()}\n", encoding="ascii")
        partial.rename(final)
    except OSError as error:
        raise UserError(f"cannot freeze the code in {folder}: {error}.") from None
    return final


def place(folder: Path, files: Sequence[Path] | None = None) -> Path:
    """Where ``take`` puts the code as it is now."""
    digest = hashlib.sha256()
    for file in _files() if files is None else files:
        digest.update(f"{file.relative_to(ROOT)}\0".encode() + hashlib.sha256(file.read_bytes()).digest())
    return (folder / f"code-{digest.hexdigest()[:12]}").absolute()


def _files() -> list[Path]:
    """What git tracks or would track; without git every file that is no cache."""
    words = ["ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *FOLDERS]
    listed = _git(*words)
    if listed is not None:
        return sorted(ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file())
    every = (path for name in FOLDERS for path in (ROOT / name).rglob("*"))
    return sorted(p for p in every if p.is_file() and p.suffix != ".pyc" and "__pycache__" not in p.parts)


def _revision() -> str:
    return (_git("describe", "--always", "--abbrev=40", "--dirty") or "unknown").strip()


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None
