"""``OUT.packing`` beside ``OUT``: what is finished of a packing that is under way or was stopped.

    lock           held while somebody packs or joins
    plan.json      what is to be packed
    shards/        finished shards, each with its entry TAR.json; names that begin with a dot are under way
    final/         the set as it will appear, while it is put together
    replaced/      what OUT held before, while it is exchanged
    publishing     from the beginning of that exchange until nothing else is left

It is for the user's eyes alone (mode 700): entries hold the source's own names.
"""

import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from shards.plan import Plan
from tracekin.config import UserError

RESULTS = ("manifest.json", "report.json", "contact_sheet.png")
"""What a packed set holds beside its tars."""


class WorkFolder:
    def __init__(self, out: Path) -> None:
        self.out = out
        self.path = out.parent / f"{out.name}.packing"
        self.shards, self.final = self.path / "shards", self.path / "final"
        self.replaced, self.publishing = self.path / "replaced", self.path / "publishing"
        self.plan, self.lock = self.path / "plan.json", self.path / "lock"

    @contextmanager
    def locked(self, shared: bool) -> Iterator[None]:
        """Make the folder and hold its lock; what a kill left half-way is put back.

        Args:
            shared: let others hold it too, who share.

        Raises:
            UserError: somebody else holds it, or the folder cannot be written.
        """
        with self._lock_held(shared):
            self.shards.mkdir(exist_ok=True)
            self._put_back()
            yield

    @contextmanager
    def _lock_held(self, shared: bool) -> Iterator[None]:
        try:
            lock = self._lock(shared)
        except OSError as error:
            raise UserError(f"cannot write beside --out {self.out}: {error.strerror}.") from None
        try:
            yield
        finally:
            os.close(lock)

    def _lock(self, shared: bool) -> int:
        while True:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                lock = os.open(self.lock, os.O_RDWR | os.O_CREAT, 0o600)
            except FileNotFoundError:
                continue  # whoever finished has removed the folder this very moment
            try:
                # POSIX locks: they die with this process, which its forked workers would outlive with flock.
                fcntl.lockf(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError):
                os.close(lock)
                raise UserError(
                    f"{self.out} is being packed already ({self.path} is locked); wait for it or stop it."
                ) from None
            except OSError:
                return lock  # this file system has no locks
            try:
                if os.path.samestat(os.fstat(lock), os.stat(self.lock)):
                    return lock
            except FileNotFoundError:
                pass
            os.close(lock)  # whoever held it finished and removed the folder meanwhile

    def begin(self, plan: Plan, slices: int) -> None:
        """Note the plan; a packing that nobody shares also clears away what belongs to other plans.

        Raises:
            UserError: others pack slices of another plan here.
        """
        there = self.read_plan() if self.plan.exists() else {}
        if slices > 1 and there and there["fingerprint"] != plan.fingerprint:
            raise UserError(
                f"{self.path} holds slices of another packing: the source or the options were others. "
                "Give every slice the same command, or remove the folder to begin anew."
            )
        content = {
            "fingerprint": plan.fingerprint,
            "slices": slices,
            **{
                key: getattr(plan, key) for key in ("recipe", "name", "task", "classes", "given_splits", "max_rejected")
            },
            "shards": [[shard.file, shard.split, len(shard.items), shard.fingerprint] for shard in plan.shards],
        }
        if there != content:
            write_atomically(self.plan, json.dumps(content, indent=1) + "\n")
        if slices == 1:
            wanted = {shard.file for shard in plan.shards}
            for path in self.shards.iterdir():
                if path.name.removesuffix(".json") not in wanted:
                    path.unlink()

    def read_plan(self) -> dict[str, Any]:
        """What ``begin`` noted.

        Raises:
            UserError: it cannot be read.
        """
        try:
            found: dict[str, Any] = json.loads(self.plan.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {self.plan}: {error}; remove {self.path} to begin anew.") from None
        return found

    def publish(self, fingerprint: str) -> None:
        """Let ``final`` take the place of OUT, and vanish."""
        write_atomically(self.publishing, fingerprint)
        if self.out.exists():
            self.out.rename(self.replaced)
        self.final.rename(self.out)
        self._remove()

    def published(self) -> str:
        """The fingerprint of the plan whose set OUT is, where a kill left nothing to do but to tidy; else nothing."""
        if self.out.exists() and not self.final.exists() and self.publishing.exists():
            return self.publishing.read_text(encoding="utf-8")
        with suppress(OSError):
            self.path.rmdir()  # empty: the last that a kill can leave
        return ""

    def tidy(self) -> None:
        """Remove what is left of a packing that is published."""
        with self._lock_held(shared=False):
            self._remove()

    def _remove(self) -> None:
        for path in self.path.iterdir():  # what says that this is published goes last
            if path.is_dir():
                shutil.rmtree(path)
            elif path not in (self.lock, self.publishing):
                path.unlink()
        self.lock.unlink()
        self.publishing.unlink()
        self.path.rmdir()

    def _put_back(self) -> None:
        """Undo what a kill left of ``publish`` or of the work on ``final``. Others may do the same at once."""
        if self.replaced.exists() and not self.out.exists():
            with suppress(FileNotFoundError):
                self.replaced.rename(self.out)
        for tar in self.final.glob("*.tar"):
            if not (self.shards / tar.name).exists():  # else a copy without some samples
                with suppress(FileNotFoundError):
                    tar.rename(self.shards / tar.name)
        self.publishing.unlink(missing_ok=True)
        for folder in (self.replaced, self.final):
            shutil.rmtree(folder, ignore_errors=True)


def check_out(out: Path, force: bool) -> None:
    """Refuse an OUT that must not be replaced.

    Raises:
        UserError: a file, a packed set without ``force``, other files.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder to make.")
    inside = [path.name for path in out.iterdir()]
    if "manifest.json" in inside and not force:
        raise UserError(f"--out {out} holds a packed set already; name another folder, or replace it with --force.")
    foreign = [name for name in inside if name not in RESULTS and not name.endswith(".tar")]
    if foreign or (inside and "manifest.json" not in inside):
        raise UserError(f"--out {out} holds other files ({(foreign or inside)[0]}); name a new or empty folder.")


def unique(path: Path) -> Path:
    """A name for ``path`` while it is written: no other process, on whatever machine, takes the same."""
    return path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}")


def write_atomically(path: Path, text: str) -> None:
    temporary = unique(path)
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
