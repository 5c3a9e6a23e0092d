"""The wish that a run ends: a signal only sets a flag, the ranks agree on it, and the old handlers come back."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGUSR2, signal.SIGTERM)
"""INT is a user's Ctrl-C; USR2 comes ahead of a time limit or a preemption, TERM right before the kill. NCCL takes USR1
for itself."""
INSIST_SECONDS = 0.3
"""A second INT that comes sooner is the same wish: a launcher passes on what the terminal has sent already."""
END = b"\0"
"""No signal's number."""


class Flag:
    """Which signal came, if any; the later in SIGNALS counts more."""

    def __init__(self) -> None:
        self.raised = 0
        """The signal's place in SIGNALS, from 1; 0 for none."""

    def handle(self, number: int, frame: Any) -> None:
        self.raised = max(self.raised, SIGNALS.index(signal.Signals(number)) + 1)


def name_of(raised: int) -> str:
    """``INT``, ``USR2`` or ``TERM`` for a Flag's number; ``""`` for 0."""
    return SIGNALS[raised - 1].name.removeprefix("SIG") if raised else ""


@contextmanager
def signals_raise_a_flag(end_now: Callable[[], None]) -> Iterator[Flag]:
    """Within the block SIGNALS do nothing but raise the flag; outside the main thread none are caught.

    Args:
        end_now: called, in another thread, at a second INT: whoever insists is not kept waiting for the end of a step,
            nor by a collective that no signal wakes.
    """
    flag = Flag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    # What Python's own handler writes at once, whatever the main thread is at: handlers in Python wait for it.
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    listener = threading.Thread(target=_listen, args=(reader, end_now), daemon=True)
    listener.start()
    before = {number: signal.signal(number, flag.handle) for number in SIGNALS}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(wakeup)
        os.write(writer, END)  # not by closing it: loader processes, which are forks, hold it open
        listener.join()
        os.close(writer)
        os.close(reader)


def _listen(reader: int, end_now: Callable[[], None]) -> None:
    first = None
    while END not in (numbers := os.read(reader, 64)):
        if signal.SIGINT not in numbers:
            continue
        if first is None:
            first = time.monotonic()
        elif time.monotonic() - first > INSIST_SECONDS:
            end_now()
