"""Slurm's wish that a run ends: a signal only sets a flag, the ranks agree on it, and the old handlers come back."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tracekin.distributed import collectives

SIGNALS = (signal.SIGUSR2, signal.SIGTERM)
"""USR2 comes ahead of a time limit or a preemption, TERM right before the kill. NCCL takes USR1 for itself."""


class Flag:
    """Which signal came, if any; the later in SIGNALS counts more."""

    def __init__(self) -> None:
        self.raised = 0
        self._group: Any = None

    def handle(self, number: int, frame: Any) -> None:
        self.raised = max(self.raised, SIGNALS.index(signal.Signals(number)) + 1)

    def agreed(self) -> str:
        """``""``, ``"USR2"`` or ``"TERM"``: what the ranks saw, the same answer on all of them. Collective.

        Slurm signals ranks at slightly different moments; one that acted alone would leave the others waiting.
        """
        if self._group is None:
            self._group = collectives.open_host_group()
        highest = collectives.maximum(self.raised, self._group)
        return SIGNALS[highest - 1].name.removeprefix("SIG") if highest else ""


@contextmanager
def signals_raise_a_flag() -> Iterator[Flag]:
    """Within the block SIGNALS do nothing but raise the flag; outside the main thread none are caught."""
    flag = Flag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    before = {number: signal.signal(number, flag.handle) for number in SIGNALS}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
