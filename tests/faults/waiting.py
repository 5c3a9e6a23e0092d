"""Waiting for a run to come somewhere."""

import time
from collections.abc import Callable
from typing import Any


def wait_until(ranks: Any, happened: Callable[[], bool], *, seconds: float = 60) -> None:
    """Wait while all ranks live.

    Raises:
        AssertionError: one has ended, or it takes longer than ``seconds``: the fault could not be made.
    """
    deadline = time.monotonic() + seconds
    while not happened():
        assert ranks.alive() or happened(), f"a rank ended too early: {ranks.said()}"
        assert time.monotonic() < deadline, f"not after {seconds} s: {ranks.said()}"
        time.sleep(0.01)
