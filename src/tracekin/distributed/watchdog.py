"""A thread that ends the run where a step stalls, and says which rank the others wait for, and in which collective.

The main thread beats. It may hang in a collective, a loader or a file, none of which can be interrupted: so all that
happens here happens in other threads, waits for nothing without a bound, and ends the process itself.

Time is counted in ticks, each of them slept through, and no clock is read: neither a clock that jumps nor a machine
that was suspended, nor a process that was stopped, makes a step look long.
"""

import faulthandler
import json
import multiprocessing
import os
import select
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from tracekin.distributed import collectives
from tracekin.distributed.stall import Word, place_of_main_thread, stall_line
from tracekin.distributed.world import World

TRY_AGAIN = 75
"""The exit code, as cli.py has it."""
FIRST_STEP_SECONDS = 600.0
"""What a start, and its first step, may take at least: they compile, and fetch the first shards."""
TICK_SECONDS = 5.0
"""The longest tick."""
TELLING_SECONDS = 5.0
"""How long a write to stderr or ``on_stall`` may take: either can hang for the reason for which the step did."""


class Watchdog:
    """``with Watchdog(...) as watchdog`` around a run whose main thread calls ``beat`` as it goes on.

    Without a beat for ``seconds`` every rank of the run ends with code 75, and its loader processes with it. Entering
    is collective.

    Args:
        world: this rank.
        seconds: longest time between two beats; 0 watches nothing. Above ``collectives.TIMEOUT`` the group's own error,
            which names nobody, comes first wherever a rank waits in a collective.
        on_stall: is given the line that names the culprit, on the one rank that says it, or on each that cannot ask
            the others. Runs in a thread, for TELLING_SECONDS at most; what it raises is dropped.
    """

    def __init__(self, world: World, seconds: float, on_stall: Callable[[str], object] | None = None) -> None:
        self.world, self.seconds, self.on_stall = world, seconds, on_stall
        self.step, self.phase, self.beats = 0, "start", 0
        self._first: int | None = None
        self._tick = min(TICK_SECONDS, seconds / 10)
        self._patience = 3 * self._tick + 3  # the others look every tick
        self._idle = 0.0
        self._called = self._over = self._ending = self._said = False
        self._store: Any = None
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Watchdog":
        if self.seconds > 0:
            if self.world.size > 1:
                self._store = collectives.open_store()
                threading.Thread(target=self._listen, daemon=True).start()
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over = True
        if self._ending:  # an error that came meanwhile, as another rank has left already, ends this one no otherwise
            self._thread.join()

    def beat(self, step: int, phase: str) -> None:
        """Say that the main thread begins something: ``start``, ``data``, ``step``, ``checkpoint`` or ``end``.

        In ``end`` the ranks go their own ways: one that stalls there speaks of itself alone.
        """
        if self._first is None and phase != "start":
            self._first = step
        self.step, self.phase = step, phase
        self.beats += 1

    def _watch(self) -> None:
        seen, ticks = self.beats, 0
        while not self._over:
            _sleep(self._tick)
            ticks = ticks + 1 if self.beats == seen else 0
            seen, self._idle = self.beats, ticks * self._tick
            first = self._first is None or self.step <= self._first
            limit = max(self.seconds, FIRST_STEP_SECONDS) if first else self.seconds
            if self._called or self._idle >= limit:
                self._ending = True
                if not self._over:
                    self._end()
                return

    def _listen(self) -> None:
        """Hear another rank's call. One whose beats come does not ask: there is no traffic while all is well."""
        with suppress(Exception):  # the store is gone, and with it whoever could call
            while not self._over and not self._called:
                _sleep(self._tick)
                if self._idle >= 2 * self._tick and self.phase != "end":
                    self._called = self._store.check(["called"])

    def _end(self) -> None:
        try:
            word = self._word()
            if not word.waits:  # of ranks that wait, and they may be a thousand, the stacks tell nothing
                _within(TELLING_SECONDS, self._show_stacks, word)
            if self._store and self.phase != "end":
                _within(self._patience + 4 * TELLING_SECONDS, self._confer, word)
            if not self._said:
                self._say(stall_line({self.world.rank: word}, self.world.size, asked=False))
        finally:
            leave(TRY_AGAIN)

    def _word(self) -> Word:
        calls, current = collectives.CALLS, collectives.CALLS.current
        waits = current.number if current else 0
        return Word(self.step, self.phase, self._idle, place_of_main_thread(), calls.started, list(calls.names), waits)

    def _confer(self, word: Word) -> None:
        """Give the others this rank's word; the first that comes calls them, hears them all and says the line."""
        store, ranks = self._store, [str(rank) for rank in range(self.world.size)]
        store.set(ranks[self.world.rank], json.dumps(word))
        if store.add("called", 1) == 1:
            _until(lambda: store.check(ranks), self._patience)
            words = {int(rank): Word(*json.loads(store.get(rank))) for rank in ranks if store.check([rank])}
            self._say(stall_line(words, self.world.size))
            store.set("said", str(len(words)))
        # A launcher may kill all ranks as soon as one ends: none does before the line is said.
        self._said = _until(lambda: store.check(["said"]), self._patience + 2 * TELLING_SECONDS)
        store.add("heard", 1)
        if self.world.is_main:  # the store may be in this process
            _until(lambda: store.add("heard", 0) >= int(store.get("said")), TELLING_SECONDS)

    def _say(self, line: str) -> None:
        self._said = True
        ending = f"Ending with {TRY_AGAIN}; the same command again goes on from the last checkpoint."
        # To the descriptor: the main thread may hold sys.stderr.
        _within(TELLING_SECONDS, os.write, 2, f"tracekin: {line} {ending}\n".encode())
        if self.on_stall:
            _within(TELLING_SECONDS, self.on_stall, line)

    def _show_stacks(self, word: Word) -> None:
        os.write(2, f"tracekin: rank {self.world.rank} is at {word.place} ({word.phase}); its threads:\n".encode())
        faulthandler.dump_traceback(2)


def leave(code: int) -> None:
    """End this process and its loader processes with this code, whatever its main thread is at."""
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)  # at once: torch's loader tells the main thread of children that were killed


def _sleep(seconds: float) -> None:
    """By select, which gives the kernel a duration: an Event and time.sleep give it a moment on some clock."""
    select.select([], [], [], seconds)


def _until(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait for a condition, that long at most; whether it came."""
    for _ in range(int(seconds / 0.05)):
        if condition():
            return True
        _sleep(0.05)
    return condition()


def _within(seconds: float, function: Callable[..., object], *arguments: Any) -> None:
    """Run what may hang, and wait for it that long at most; the process ends anyhow, so errors are dropped."""

    def run() -> None:
        with suppress(Exception):
            function(*arguments)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    _until(lambda: not thread.is_alive(), seconds)
