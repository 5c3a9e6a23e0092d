"""Distributed tests as plain functions: ``run_ranks(function, world_size, *args)`` returns each rank's value.

Ranks are forked from a forkserver that has imported what they need once for the whole session (5 to 15 s) and runs
no tensor operation: a fork after one hangs. They meet in a file, so no port can be taken.
"""

import multiprocessing
import os
import pickle
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Mapping
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

PRELOAD = [
    "torch",
    "torch.distributed",
    "torchvision",
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # which every engine with ZeRO imports, and with it torch's compiler
    "wandb",
    "pytest",
    "tracekin.train.loop",
]


class RankFailedError(AssertionError):
    """A rank raised or died; the message holds its traceback."""


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 240) -> list[Any]:
    """Run ``function(rank, *args)`` on ``world_size`` gloo ranks, one thread each, with torchrun's rank variables set.

    Args:
        function: picklable, so at the top of its module.
        world_size: number of processes, 1 included.
        args: picklable; they and the results are copied, tensors included.
        timeout: seconds for all ranks together, after the forkserver has started.

    Returns:
        The ranks' return values, by rank.

    Raises:
        RankFailedError: with the traceback of the rank that failed first; the others are killed.
        TimeoutError: naming the ranks that had not returned; all are killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    job = pickle.dumps((function, args))
    with tempfile.TemporaryDirectory() as folder:
        _start_server(context)
        deadline = time.monotonic() + timeout
        readers, processes = [], []
        try:
            for rank in range(world_size):
                reader, writer = context.Pipe(duplex=False)
                process = context.Process(
                    target=_rank, args=(rank, world_size, folder, timeout, job, writer), daemon=True
                )
                process.start()
                writer.close()  # ours; the rank's copy remains, so that its death reads as the end of the file
                readers.append(reader)
                processes.append(process)
            return _collect(readers, deadline, timeout)
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()


class Ended(NamedTuple):
    """How a rank ended by itself."""

    code: int | None
    """Its exit code; None for one that was not waited for and had not ended."""
    said: str
    """What it wrote to stderr."""


def end_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 240, silent: Collection[int] = ()
) -> list[Ended]:
    """``run_ranks`` for ranks that end otherwise than by returning: each one's exit code and stderr, by rank.

    A rank may have child processes. Those in ``silent`` are not waited for; all that is left is killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        _start_server(context)
        job = pickle.dumps((_to_the_end, (folder, function, args)))
        processes = [
            context.Process(target=_rank, args=(rank, world_size, folder, timeout, job, None))
            for rank in range(world_size)
        ]
        deadline = time.monotonic() + timeout
        try:
            for process in processes:
                process.start()
            for rank, process in enumerate(processes):
                if rank not in silent:
                    process.join(max(0.0, deadline - time.monotonic()))
            codes = [process.exitcode for process in processes]
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()
        files = [Path(folder) / f"stderr-{rank}" for rank in range(world_size)]
        said = [file.read_text() if file.exists() else "" for file in files]  # a silent one may not have come so far
        return [Ended(*ended) for ended in zip(codes, said, strict=True)]


def run_command(
    *arguments: str, cwd: Path, environment: Mapping[str, str] = os.environ, timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    """The command ``tracekin`` with these arguments, which need not wait for the imports of torch and DeepSpeed.

    Args:
        arguments: as typed.
        cwd: folder in which it runs.
        environment: all its variables.
        timeout: seconds, after the forkserver has started.

    Raises:
        TimeoutError: it had not ended; it is killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        _start_server(context)
        files = [Path(folder) / name for name in ("stdout", "stderr")]
        process = context.Process(target=_command, args=(arguments, cwd, dict(environment), files))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise TimeoutError(f"tracekin {' '.join(arguments)} had not ended after {timeout} s")
        out, error = (file.read_text() for file in files)
    return subprocess.CompletedProcess(["tracekin", *arguments], process.exitcode, out, error)


def _command(arguments: tuple[str, ...], cwd: Path, environment: dict[str, str], files: list[Path]) -> None:
    multiprocessing.set_start_method("fork", force=True)  # a process of the forkserver has its way as the default
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ |= environment
    sys.argv = ["tracekin", *arguments]
    from tracekin.cli import main

    main()


def _to_the_end(rank: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.dup2(os.open(Path(folder) / f"stderr-{rank}", os.O_WRONLY | os.O_CREAT), 2)
    code = 0
    try:
        function(rank, *args)
    except BaseException:
        traceback.print_exc()
        code = 1
    os._exit(code)


def _collect(readers: list[Connection], deadline: float, timeout: float) -> list[Any]:
    """Every rank's value; stops at the first failure, so the ranks that wait for a dead one are not waited for."""
    results: dict[int, Any] = {}
    while len(results) < len(readers):
        pending = {reader: rank for rank, reader in enumerate(readers) if rank not in results}
        ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"ranks {sorted(pending.values())} of {len(readers)} had not returned after {timeout} s")
        failures = []
        for reader in ready:
            rank = pending[reader]  # type: ignore[index]
            moment, failure, value = _receive(reader)  # type: ignore[arg-type]
            if failure is None:
                results[rank] = value
            else:
                failures.append((moment, f"rank {rank} of {len(readers)} failed:\n{failure}"))
        if failures:
            raise RankFailedError(min(failures)[1])
    return [results[rank] for rank in range(len(readers))]


def _receive(reader: Connection) -> tuple[float, str | None, Any]:
    try:
        message: tuple[float, str | None, Any] = pickle.loads(reader.recv_bytes())
        return message
    except EOFError:
        return time.monotonic(), "it died without a word (killed, or a crash in native code)", None


def _rank(rank: int, world_size: int, folder: str, timeout: float, job: bytes, writer: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    try:
        store = dist.FileStore(str(Path(folder) / "store"), world_size)  # type: ignore[attr-defined]
        patience = timedelta(seconds=timeout)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=patience)
        function, args = pickle.loads(job)
        message = pickle.dumps((time.monotonic(), None, function(rank, *args)))
    except BaseException:
        message = pickle.dumps((time.monotonic(), traceback.format_exc(), None))
    writer.send_bytes(message)
    # No destroy_process_group: the parent ends every rank as soon as it has what it waits for.


def _start_server(context: Any) -> None:
    """Let the forkserver import what it preloads, which is no rank's time; at once if it has."""
    process = context.Process(target=_nothing)
    process.start()
    process.join()


def _nothing() -> None:
    pass
