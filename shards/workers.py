"""A parallel map with bounded memory, results in order, whatever the number of workers."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ordered_map(function: Callable[[A], B], jobs: Sequence[A], workers: int, chunk: int = 16) -> Iterator[B]:
    """``function`` of each job, in order; at most a few chunks a worker are under way or waiting to be taken.

    Args:
        function: picklable.
        jobs: picklable.
        workers: processes; 1 works in this one.
        chunk: jobs that travel together.
    """
    if workers == 1 or len(jobs) <= chunk:
        yield from map(function, jobs)
        return
    context = multiprocessing.get_context("forkserver")  # a plain fork would copy the progress bar's thread
    chunks = (jobs[start : start + chunk] for start in range(0, len(jobs), chunk))
    with ProcessPoolExecutor(workers, context, _ignore_interrupt) as pool:
        try:
            waiting = [pool.submit(_map_chunk, function, part) for part in islice(chunks, 4 * workers)]
            while waiting:
                yield from waiting.pop(0).result()
                waiting += [pool.submit(_map_chunk, function, part) for part in islice(chunks, 1)]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _ignore_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle


def _map_chunk(function: Callable[[A], B], jobs: Sequence[A]) -> list[B]:
    return [function(job) for job in jobs]
