"""Where each rank is when a step stalls, and the one line that is made of it: pure values."""

import sys
import threading
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

_PACKAGE = str(Path(__file__).parents[1]) + "/"
_HERE = str(Path(__file__).parent) + "/"
_WAITS, _CAME, _MISSED = range(3)


class Word(NamedTuple):
    """Where a rank is, in its own words."""

    step: int
    phase: str
    seconds: float
    """Since its last beat."""
    place: str
    """Line of ours that its main thread is in: ``train/loop.py:180``."""
    started: int
    """Number of the last collective that it started."""
    names: list[str]
    """Of the last collectives that it started."""
    waits: int
    """Number of the collective that its host waits in; 0 for none."""

    def call(self, number: int) -> str:
        """A collective that it started, by name and number: ``all-gather 412``."""
        back = self.started - number
        return f"{self.names[-1 - back] if back < len(self.names) else 'collective'} {number}"


def stall_line(words: Mapping[int, Word], num_ranks: int, asked: bool = True) -> str:
    """Who waits in which collective, who has not come to it, and who says nothing.

    All ranks start the same collectives in the same order, so numbers tell who is behind even where no host waits: for
    NCCL's it is the device that does, and DeepSpeed's own are not numbered.

    Args:
        words: of the ranks that said something, one at least, by rank.
        num_ranks: of the world.
        asked: whether the ranks that are not in ``words`` were asked.
    """
    latest = max(words.values(), key=lambda word: word.step)
    ahead = max(words.values(), key=lambda word: word.started)
    reached = min((word.waits for word in words.values() if word.waits), default=ahead.started)
    told: dict[tuple[int, int, str], list[int]] = defaultdict(list)
    for rank, word in sorted(words.items()):
        during = word.phase if word.step == latest.step else f"{word.phase} of step {word.step}"
        if word.waits:
            told[_WAITS, word.waits, word.place].append(rank)
        elif word.started >= reached:
            told[_CAME, 0, f"{word.place} ({during})"].append(rank)
        else:
            told[_MISSED, word.started + 1, f"{word.place} ({during})"].append(rank)
    parts = []
    for (kind, number, place), ranks in sorted(told.items()):
        one = len(ranks) == 1
        if kind == _WAITS:
            said = f"{'waits' if one else 'wait'} in {ahead.call(number)} ({place})"
        elif kind == _CAME:
            said = f"{'is' if one else 'are'} at {place}"
        else:
            missed = ahead.call(number)
            said = f"{'has' if one else 'have'} not come to {missed}: {'it is' if one else 'they are'} at {place}"
        parts.append(f"{names_of(ranks)} {said}")
    silent = [rank for rank in range(num_ranks) if rank not in words]
    if silent and asked:
        parts.append(f"{names_of(silent)} {'says' if len(silent) == 1 else 'say'} nothing: stopped, dead or cut off")
    elif silent and latest.phase != "end":
        parts.append("the other ranks were not asked")
    what = f"the {latest.phase}" if latest.phase in ("start", "end") else f"step {latest.step}"
    return f"{what} has stalled for {max(word.seconds for word in words.values()):.0f} s: {', '.join(parts)}."


def names_of(ranks: Iterable[int]) -> str:
    """``rank 1``, ``ranks 0, 2 to 5``: three in a row and more are drawn together. ``ranks`` ascend."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    words = [f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return f"rank{'' if len(runs) == len(runs[0]) == 1 else 's'} {', '.join(words)}"


def place_of_main_thread() -> str:
    """Its innermost line in tracekin, this folder aside; where it is in none of them, its innermost line."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    innermost = ""
    while frame:
        file = frame.f_code.co_filename
        if file.startswith(_PACKAGE) and not file.startswith(_HERE):
            return f"{file.removeprefix(_PACKAGE)}:{frame.f_lineno}"
        if not innermost and not file.startswith(_HERE):
            innermost = f"{'/'.join(Path(file).parts[-2:])}:{frame.f_lineno}"
        frame = frame.f_back
    return innermost or "an unknown line"
