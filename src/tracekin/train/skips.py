"""Images that could not be read: counted over all ranks, logged with their keys, and too many of them end the run."""

from collections import Counter
from pathlib import Path

from tracekin.config import UserError
from tracekin.data.reader import Skipped
from tracekin.distributed import collectives
from tracekin.monitor.sinks import JsonLines


class Skips:
    """What an epoch had to replace. Every rank counts its own; ``flush`` lets all of them know the sum."""

    def __init__(self, count: int, most: float) -> None:
        """``count`` images are in the train split; an epoch may replace ``count * most`` of them."""
        self.count, self.most = count, most
        self.fresh: list[Skipped] = []
        self.in_epoch: set[int] = set()

    def flush(self, step: int, folder: Path | None) -> None:
        """Log what is new since the last flush. Collective: call it where the sum over ranks is not 0.

        Args:
            step: steps done.
            folder: where rank 0 appends to ``skipped.jsonl``; None on the other ranks.

        Raises:
            UserError: on every rank alike, if the epoch has replaced more than it may.
        """
        fresh = [skipped for part in collectives.gather_objects(self.fresh) for skipped in part]
        self.fresh = []
        self.in_epoch.update(skipped.number for skipped in fresh)  # one that wraps comes twice
        if fresh and folder is not None:
            log = JsonLines(folder / "skipped.jsonl")
            for skipped in fresh:
                log.write({"step": step, **skipped._asdict()})
            reasons = ", ".join(f"{reason} {n}" for reason, n in Counter(s.reason for s in fresh).most_common())
            print(f"step {step}: {len(fresh)} unreadable images replaced ({reasons}); see {folder}/skipped.jsonl")
        if len(self.in_epoch) > self.most * self.count:
            collectives.barrier()  # a rank that ends has the others killed: the log is written first
            raise _too_many(fresh, len(self.in_epoch), self.count)

    def end_epoch(self) -> None:
        self.in_epoch.clear()


def _too_many(skipped: list[Skipped], bad: int, count: int) -> UserError:
    """The end of a run whose data is bad; ``skipped`` are some of the ``bad`` samples among ``count``."""
    reasons = ", ".join(f"{reason} {n}" for reason, n in Counter(s.reason for s in skipped).most_common())
    last = skipped[-1]
    return UserError(
        f"{bad} of {count} train images could not be read in one epoch, more than data.max_bad_fraction allows (the "
        f"last ones: {reasons}); for example {last.shard}, sample {last.key or '(no key)'} at byte {last.offset}: "
        f"{last.detail}. Check the set with python -m shards.verify, or raise data.max_bad_fraction."
    )
