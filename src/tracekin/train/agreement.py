"""What the ranks agree on once a step, so that none acts alone and leaves the others waiting."""

from typing import NamedTuple

from tracekin.distributed import collectives
from tracekin.train.preemption import name_of


class Verdict(NamedTuple):
    """The same on every rank."""

    stop: str
    """The signal that asks the run to save and stop; empty for none."""
    finite: bool
    """Whether every rank's loss is a finite number."""
    save_failed: bool
    """Whether rank 0 could not write a checkpoint."""


class Agreement:
    """One small all-reduce a step, on the host: a signal must be seen while the device computes."""

    def __init__(self) -> None:
        """Collective."""
        self._group = collectives.open_host_group()

    def reach(self, *, signal: int, finite: bool, save_failed: bool) -> Verdict:
        """Slurm signals ranks at slightly different moments, and one rank's loss may be bad alone. Collective.

        Args:
            signal: Flag.raised of this rank.
            finite: whether this rank's loss is a finite number.
            save_failed: whether this rank could not write a checkpoint.
        """
        highest, infinite, failed = collectives.maxima([signal, not finite, save_failed], self._group)
        return Verdict(name_of(highest), not infinite, bool(failed))
