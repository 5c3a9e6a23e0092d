"""One start of a run: its lease on the run folder, and its lines in starts.jsonl.

After a lost node Slurm may start a run elsewhere while its old processes still compute. The newest start holds the
lease; whoever finds another's name in it writes nothing more.
"""

import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tracekin.config import UserError
from tracekin.distributed.collectives import lost_a_rank
from tracekin.distributed.world import World, this_start
from tracekin.files import append, patiently, surely, write_text
from tracekin.train.errors import DivergedError, DriftError, FencedError


class Start:
    """This process's part in one start of a run; rank 0 takes the lease and checks it before whatever it writes."""

    def __init__(self, folder: Path, world: World) -> None:
        self.folder, self.world = folder, world
        self.job, self.restart = this_start()
        self.token = secrets.token_hex(8)
        self.taken = False

    def take(self) -> None:
        """Make the folder, if need be, and take the lease from whoever held it. Rank 0 alone calls this.

        Raises:
            UserError: the folder cannot be written.
        """
        lease, path = {"job": self.job, "restart": self.restart, "token": self.token}, self.folder / "lease.json"

        def write() -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps(lease) + "\n")

        surely(path, write)
        self.taken = True

    def held(self) -> bool:
        """Whether the lease is still this start's; False too where the folder is gone.

        The other ranks do not know rank 0's token: they compare job and restart.

        Raises:
            OSError: the lease cannot be read, after some patience.
        """
        try:
            lease = json.loads(patiently(self._read_lease))
        except ValueError:
            return False
        if self.taken:
            return bool(lease["token"] == self.token)
        return (lease["job"], lease["restart"]) == (self.job, self.restart)

    def _read_lease(self) -> str:
        try:
            return (self.folder / "lease.json").read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            return ""

    def check(self) -> None:
        """Call before writing into the run folder.

        Raises:
            FencedError: the lease was taken by another start.
            UserError: the lease cannot be read.
        """
        try:
            held = self.held()
        except OSError as error:
            raise UserError(
                f"cannot read {self.folder / 'lease.json'}: {error.strerror or error}. Mend the folder; the same"
                " command again goes on from the last checkpoint."
            ) from None
        if not held:
            raise FencedError(
                f"{self.folder} was taken over by a newer start of this run (its lease.json says which);"
                " this one wrote nothing more and ends."
            )

    def begin(self, **facts: Any) -> None:
        """Log the start, and before it the end of one that could not do so itself.

        Raises:
            FencedError: as ``check``.
        """
        last = _last_line(self.folder / "starts.jsonl")
        if last.get("event") == "start":
            cause = "no word of its end: killed, out of memory, or its node was lost"
            self.log("end", job=last["job"], restart=last["restart"], outcome="killed", cause=cause)
        self.log("start", **facts)

    def log(self, event: str, **facts: Any) -> None:
        """Append a line to starts.jsonl.

        Raises:
            FencedError: as ``check``.
            UserError: it cannot be written.
        """
        self.check()
        now = datetime.now(UTC).isoformat(timespec="seconds")
        line = {"event": event, "job": self.job, "restart": self.restart, "time": now, **facts}
        path = self.folder / "starts.jsonl"
        surely(path, lambda: append(path, json.dumps(line)))

    def stalled(self, cause: str) -> None:
        """Log that the watchdog ends this start; once, where ranks that cannot ask each other all say so.

        Raises:
            FencedError: as ``check``.
        """
        last = _last_line(self.folder / "starts.jsonl")
        if (last.get("outcome"), last.get("job"), last.get("restart")) != ("stalled", self.job, self.restart):
            self.log("end", outcome="stalled", cause=cause, rank=self.world.rank)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Log how the block ends where it does not end well; a fenced start's errors are a FencedError.

        What all ranks find wrong alike, and that a rank was lost, rank 0 says; another error its own rank.
        """
        try:
            yield
        except BaseException as error:
            if isinstance(error, FencedError):
                raise
            try:
                held = self.held()
            except OSError:  # the folder is away, which may be the very reason for the end
                raise error from None
            if self.taken and not held:
                raise FencedError(f"{self.folder} was taken over by a newer start of this run.") from error
            lost = lost_a_rank(error)
            shared = lost or isinstance(error, UserError | DivergedError | DriftError)
            if held and (self.world.is_main or not shared):
                outcome = "interrupted" if isinstance(error, KeyboardInterrupt) else "lost" if lost else "failed"
                with suppress(UserError, FencedError):
                    self.log("end", outcome=outcome, cause=_in_one_line(error), rank=self.world.rank)
            raise


def _last_line(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8").splitlines()[-1])
    except (OSError, ValueError, IndexError):
        return {}
    return found


def _in_one_line(error: BaseException) -> str:
    said = " ".join(str(error).split())
    known = isinstance(error, UserError | DivergedError | DriftError)
    return (said if known else f"{type(error).__name__}: {said}")[:500]
