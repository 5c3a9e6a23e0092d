"""Ranks of a run as processes of their own, which a test may signal, stop and kill.

They run the command itself, ``tracekin pretrain``, with a tiny encoder; forked, as those of tests/ranks.py, from a
server that has imported torch and DeepSpeed once.
"""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.ranks import PRELOAD

ROOT = Path(__file__).parents[2]
SERVER = multiprocessing.get_context("forkserver")
PATIENCE = 120.0
"""Seconds after which a start that has not ended is a failure: nothing may hang."""


class Ranks:
    """One start of a run on several ranks."""

    def __init__(
        self,
        world_size: int,
        arguments: Sequence[str],
        log: Path,
        *,
        harm: Callable[[int], None] | None = None,
        environment: dict[str, str] | None = None,
        command: bool = False,
    ) -> None:
        """Start the ranks.

        Args:
            world_size: how many.
            arguments: of the command, such as ["pretrain", CONFIG].
            log: file to which what the ranks say is appended.
            harm: called with the rank, in each of them, before the command; picklable.
            environment: further variables.
            command: start each rank anew, without the server, because ``environment`` is for the dynamic linker.
        """
        SERVER.set_forkserver_preload([*PRELOAD, "wandb"])
        env = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), **(environment or {})}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        self.processes: list[Any] = []
        for rank in range(world_size):
            own = env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            job = (rank, own, list(arguments), str(log), harm)
            process = _Command(*job[:4]) if command else SERVER.Process(target=_rank, args=job)
            process.start()
            self.processes.append(process)

    def signal(self, rank: int, number: int) -> None:
        """Signal a rank, if it still lives."""
        if self.processes[rank].is_alive():
            os.kill(self.processes[rank].pid, number)

    def kill(self, *ranks: int) -> None:
        """SIGKILL these ranks, or all."""
        for rank in ranks or range(len(self.processes)):
            self.signal(rank, signal.SIGKILL)

    def alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def wait(self, seconds: float = PATIENCE) -> list[int]:
        """The ranks' exit codes, -9 for a SIGKILL; those that have not ended in time are killed: code None."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        self.kill()
        for process in self.processes:
            process.join()
        return codes

    def left_behind(self, seconds: float = 15.0) -> list[str]:
        """Command lines of processes that these ranks started and that still live after so many seconds."""
        deadline = time.monotonic() + seconds
        while found := _of_sessions({process.pid for process in self.processes}):
            if time.monotonic() > deadline:
                return found
            time.sleep(0.1)
        return []


class _Command:
    """A rank as a process that a shell would start, with what Ranks asks of a multiprocessing.Process."""

    def __init__(self, rank: int, environment: dict[str, str], arguments: list[str], log: str) -> None:
        self.words = [sys.executable, "-m", "tests.faults.ranks", str(rank), log, *arguments]
        self.environment = os.environ | environment

    def start(self) -> None:
        self.process = subprocess.Popen(self.words, env=self.environment, cwd=ROOT)
        self.pid = self.process.pid

    def is_alive(self) -> bool:
        return self.process.poll() is None

    def join(self, timeout: float | None = None) -> None:
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout)

    @property
    def exitcode(self) -> int | None:
        return self.process.poll()


def _rank(
    rank: int, environment: dict[str, str], arguments: list[str], log: str, harm: Callable[[int], None] | None
) -> None:
    os.setsid()  # whatever it starts is known by its session
    multiprocessing.set_start_method("fork", force=True)  # for loaders, as in a process that a shell started
    os.environ |= environment
    said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    import torch

    from tests.train.tiny_run import tiny_backbone
    from tracekin.cli import call

    torch.set_num_threads(1)
    with tiny_backbone():
        if harm:
            harm(rank)
        code, _ = call(arguments)
    sys.stdout.flush()
    sys.exit(code)


def _of_sessions(leaders: set[int]) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) in leaders and fields[0] != "Z":  # a zombie only waits to be counted
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip() or entry.name)
        except OSError:  # it has just ended
            continue
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


if __name__ == "__main__":
    _rank(int(sys.argv[1]), {}, sys.argv[3:], sys.argv[2], None)
