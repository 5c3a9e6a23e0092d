"""Work shared among processes: a map with results in order, and jobs that leave their results on disk."""

import gc
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from tracekin.config import UserError

A = TypeVar("A")
B = TypeVar("B")
Tick = Callable[[int], None]
Job = Callable[[int, Tick], None]
"""Does the job of this number, and says with each call of Tick how many more pieces of it are done."""

TICK = 0.2
"""Seconds between two looks at the progress."""


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
    context = multiprocessing.get_context("forkserver")  # a plain fork would copy the caller's threads
    chunks = (jobs[start : start + chunk] for start in range(0, len(jobs), chunk))
    with ProcessPoolExecutor(workers, context, _ignore_interrupt) as pool:
        try:
            waiting = [pool.submit(_map_chunk, function, part) for part in islice(chunks, 4 * workers)]
            while waiting:
                yield from waiting.pop(0).result()
                waiting += [pool.submit(_map_chunk, function, part) for part in islice(chunks, 1)]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def run_jobs(job: Job, number: int, workers: int, progress: Callable[[int], None]) -> None:
    """Do the jobs 0, 1, ... up to ``number``; whoever is free takes the next.

    Workers end by themselves when this process dies, by whatever cause. They are forked where that is usual (Linux):
    ready at once, however long the imports take. That is safe as long as nothing that a thread of the caller may have
    locked is used: jobs read, decode, hash and write, no torch, no BLAS.

    Args:
        job: picklable, where processes are not forked.
        number: of jobs.
        workers: processes; 1 works in this one.
        progress: called now and then with the number of pieces done.

    Raises:
        UserError: raised by a job, or a worker was killed.
        RuntimeError: another error of a job, with its traceback.
    """
    workers = min(workers, number)
    if workers <= 1:
        _run_here(job, number, progress)
        return
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    following, done = context.Value("l", 0), context.RawArray("q", workers)
    alive: dict[int, tuple[BaseProcess, Connection]] = {}
    gc.freeze()  # what this process holds stays: no collector need look through it, and so copy it in forked workers
    try:
        for index in range(workers):
            process, errors = _start(context, (job, number, following, done, index, os.getpid()))
            alive[process.sentinel] = process, errors
        while alive:
            for sentinel in wait(list(alive), TICK):
                process, errors = alive.pop(sentinel)  # type: ignore[arg-type]
                _check_end(process, errors)
            progress(sum(done))
    finally:
        for process, _ in alive.values():
            process.terminate()
        for process, _ in alive.values():
            process.join()
        gc.unfreeze()


def _run_here(job: Job, number: int, progress: Callable[[int], None]) -> None:
    done = 0

    def tick(pieces: int) -> None:
        nonlocal done
        done += pieces
        progress(done)

    for index in range(number):
        job(index, tick)


def _start(context: BaseContext, arguments: tuple[Any, ...]) -> tuple[BaseProcess, Connection]:
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(*arguments, sender), daemon=True)  # type: ignore[attr-defined]
    process.start()
    sender.close()
    return process, receiver


def _serve(job: Job, number: int, following: Any, done: Any, index: int, parent: int, errors: Connection) -> None:
    """A worker: takes one job after the other."""
    _ignore_interrupt()

    def tick(pieces: int) -> None:
        done[index] += pieces
        if os.getppid() != parent:  # nobody waits for this any more, and another packer may be at work
            os._exit(1)

    try:
        while True:
            with following.get_lock():
                taken = following.value
                following.value = taken + 1
            if taken >= number:
                return
            job(taken, tick)
    except UserError as error:
        errors.send((True, str(error)))
        sys.exit(1)
    except Exception:
        errors.send((False, traceback.format_exc()[-8000:]))  # a pipe takes so much at once
        sys.exit(1)


def _check_end(process: BaseProcess, errors: Connection) -> None:
    process.join()
    try:
        mistake, message = errors.recv()
    except EOFError:  # it had nothing to say
        pass
    else:
        raise UserError(message) if mistake else RuntimeError(message)
    if process.exitcode:
        raise UserError(
            f"a worker process ended early (exit status {process.exitcode}; -9 often means that memory ran out). "
            "Finished shards are kept: the same command goes on, with fewer --workers if need be."
        )


def _ignore_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle


def _map_chunk(function: Callable[[A], B], jobs: Sequence[A]) -> list[B]:
    return [function(job) for job in jobs]
