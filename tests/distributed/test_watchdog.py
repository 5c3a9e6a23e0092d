"""Real ranks that stall: all of them end with 75, in time, and one of them says which rank it was and where.

Every function beats twice before it stalls, as the first step may take longer.
"""

import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import Ended, end_ranks, run_ranks
from tracekin.distributed import collectives, watchdog
from tracekin.distributed.watchdog import Watchdog
from tracekin.distributed.world import World

SECONDS = 2.0


def world_of(rank: int) -> World:
    size = collectives.world_size()
    return World(rank, size, rank, size)


def steps_until(rank: int, stalling: int, stall: Callable[[], object], folder: Path | None = None) -> None:
    """Steps of one gather each; before the third, the stalling rank does so."""

    def tell(line: str) -> None:
        if folder:
            (folder / f"told-{rank}").write_text(line)

    with Watchdog(world_of(rank), SECONDS, tell) as dog:
        for step in range(1, 100):
            dog.beat(step, "data")
            if rank == stalling and step == 3:
                stall()
            dog.beat(step, "step")
            collectives.gather(torch.ones(2))


def for_ever() -> None:
    time.sleep(600)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def one_sleeps(rank: int, stalling: int, folder: Path) -> None:
    steps_until(rank, stalling, for_ever, folder)


def one_is_stopped(rank: int, stalling: int, folder: Path) -> None:
    steps_until(rank, stalling, stop, folder)


def lines(ended: list[Ended]) -> list[str]:
    """What was said of the stall."""
    return [line for rank in ended for line in rank.said.splitlines() if "has stalled" in line]


def test_a_rank_that_sleeps_for_ever_is_named_with_the_collective(tmp_path: Path) -> None:
    ended = end_ranks(one_sleeps, 3, 1, tmp_path)
    assert [rank.code for rank in ended] == [75, 75, 75], ended
    (line,) = lines(ended)
    assert re.fullmatch(
        r"tracekin: step 3 has stalled for \d s: ranks 0, 2 wait in all-gather 4 \(distributed/test_watchdog.py:\d+\),"
        r" rank 1 has not come to all-gather 4: it is at distributed/test_watchdog.py:\d+ \(data\)\."
        r" Ending with 75; the same command again goes on from the last checkpoint\.",
        line,
    )
    (told,) = tmp_path.iterdir()  # one rank alone logs it
    assert told.read_text() in line
    # The stacks are those of the rank that matters, and before the line where it says that itself.
    assert [rank for rank, end in enumerate(ended) if "in for_ever" in end.said] == [1]
    assert all(end.said.splitlines()[-1] == line for end in ended if line in end.said)


def test_a_stopped_rank_is_named_as_silent(tmp_path: Path) -> None:
    ended = end_ranks(one_is_stopped, 3, 1, tmp_path, silent=[1])
    assert [rank.code for rank in ended] == [75, None, 75], ended
    (line,) = lines(ended)
    assert "ranks 0, 2 wait in all-gather 4 (" in line
    assert "), rank 1 says nothing: stopped, dead or cut off." in line


def one_is_stopped_that_holds_the_store(rank: int, folder: Path) -> None:
    """Ranks that meet as with srun: the store is a thread of rank 0."""
    import torch.distributed as dist

    dist.destroy_process_group()
    port = folder / "port"
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, 3, is_master=True, wait_for_workers=False)
        port.with_suffix(".part").write_text(str(store.port))
        port.with_suffix(".part").rename(port)
    else:
        while not port.exists():
            time.sleep(0.01)
        store = dist.TCPStore("127.0.0.1", int(port.read_text()), 3, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=3)
    watchdog.TELLING_SECONDS = 0.5
    steps_until(rank, 0, stop)


def test_without_the_store_each_rank_says_what_it_knows(tmp_path: Path) -> None:
    ended = end_ranks(one_is_stopped_that_holds_the_store, 3, tmp_path, silent=[0])
    assert [rank.code for rank in ended] == [None, 75, 75], ended
    for rank, line in zip((1, 2), lines(ended), strict=True):
        assert f"s: rank {rank} waits in all-gather 4 (" in line
        assert "), the other ranks were not asked. Ending with 75" in line


def hangs_with_children(rank: int, folder: Path) -> None:
    """Stuck in its data with two children that ignore what can be ignored, and a log that hangs too."""
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=ignores_everything) for _ in range(2)]
    for child in children:
        child.start()
    (folder / "children").write_text(" ".join(str(child.pid) for child in children))
    watchdog.TELLING_SECONDS = 0.5
    with Watchdog(World(), SECONDS, lambda line: for_ever()) as dog:
        dog.beat(1, "data")
        dog.beat(2, "data")
        for_ever()


def is_alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def ignores_everything() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    for_ever()


def test_alone_with_a_callback_that_hangs_and_children(tmp_path: Path) -> None:
    ((code, said),) = end_ranks(hangs_with_children, 1, tmp_path)
    assert code == 75, said
    assert re.search(r"step 2 has stalled for \d s: rank 0 is at distributed/test_watchdog.py:\d+ \(data\)\.", said)
    assert "in for_ever" in said
    children = (tmp_path / "children").read_text().split()
    while any(is_alive(pid) for pid in children):  # they were killed; the kernel takes its time
        time.sleep(0.01)


def short_steps(rank: int, seconds: float, pauses: list[float]) -> int:
    """Steps of the given lengths on rank 0, which the others wait for, while the clocks leap."""
    moments = iter(range(0, 10**9, 10**4))
    time.time = time.monotonic = lambda: float(next(moments))
    collectives.open_store().add("called", 1)  # as a start before, in the same store, was ended
    with Watchdog(world_of(rank), seconds) as dog:
        for step, pause in enumerate(pauses):
            dog.beat(step, "data")
            if rank == 0:
                time.sleep(pause)
            dog.beat(step, "step")
            collectives.gather(torch.ones(2))
    return len(pauses)


@pytest.mark.parametrize(
    ("seconds", "pauses"),
    [
        (2.0, [0.2] * 12),  # longer than the limit together
        (0.2, [1.5]),  # the first step has ten minutes
    ],
)
def test_no_false_alarm(seconds: float, pauses: list[float]) -> None:
    assert run_ranks(short_steps, 2, seconds, pauses) == [len(pauses)] * 2


def test_without_a_limit_nothing_is_watched() -> None:
    before = threading.active_count()
    with Watchdog(World(0, 2, 0, 2), 0.0) as dog:
        dog.beat(1, "data")
        assert threading.active_count() == before


def last_words(rank: int) -> None:
    """Rank 1 errs when rank 0 is ending already: it waits for the line, and ends as rank 0 does."""
    with Watchdog(world_of(rank), SECONDS) as dog:
        dog.beat(1, "data")
        dog.beat(2, "data")
        while not dog._ending:
            time.sleep(0.01)
        raise RuntimeError("connection closed by peer")


def test_an_error_while_the_ranks_end_changes_nothing() -> None:
    ended = end_ranks(last_words, 2)
    assert [rank.code for rank in ended] == [75, 75], ended
    assert len(lines(ended)) == 1


def closing(rank: int) -> Any:
    """Rank 0 closes its log for longer than the limit, alone."""
    with Watchdog(world_of(rank), SECONDS) as dog:
        dog.beat(1, "data")
        dog.beat(2, "step")
        collectives.barrier()
        dog.beat(2, "end")
        if rank == 0:
            for_ever()


def test_a_rank_that_hangs_at_the_end_speaks_of_itself() -> None:
    ended = end_ranks(closing, 2)
    assert [rank.code for rank in ended] == [75, 0], ended
    (line,) = lines(ended)
    assert re.search(r"the end has stalled for \d s: rank 0 is at distributed/test_watchdog.py:\d+ \(end\)\. End", line)
