"""Ranks of a run as processes of their own, which a test may signal, stop and kill.

They run the command itself, ``tracekin pretrain``, with a tiny encoder; forked, as those of tests/ranks.py, from a
server that has imported torch and DeepSpeed once, or started anew, by hand or by torchrun.
"""

import multiprocessing
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.faults.harm import around_steps
from tests.ranks import PRELOAD

ROOT = Path(__file__).parents[2]
SERVER = multiprocessing.get_context("forkserver")
PATIENCE = 120.0
"""Seconds after which a start that has not ended is a failure: nothing may hang."""


def start_server() -> None:
    """Let the server import what it preloads, unless it has: else the first ranks wait for it."""
    SERVER.set_forkserver_preload(PRELOAD)
    process = SERVER.Process(target=_nothing)
    process.start()
    process.join()


class Ranks:
    """One start of a run on several ranks."""

    def __init__(
        self,
        world_size: int,
        arguments: Sequence[str],
        folder: Path,
        *,
        harm: Callable[[int], None] | None = None,
        environment: dict[str, str] | None = None,
        command: bool = False,
    ) -> None:
        """Start the ranks.

        Args:
            world_size: how many.
            arguments: of the command, such as ["pretrain", CONFIG].
            folder: made if need be; to a file a rank what it says is appended.
            harm: called with the rank, in each of them, before the command; picklable.
            environment: further variables.
            command: start each rank anew, without the server, because ``environment`` is for the dynamic linker.
        """
        start_server()
        folder.mkdir(exist_ok=True)
        env = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), **(environment or {})}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        self.logs = [_Log(folder / f"rank-{rank}.txt") for rank in range(world_size)]
        self.processes: list[Any] = []
        for rank, log in enumerate(self.logs):
            own = env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            job = (rank, own, list(arguments), str(log.path), harm)
            process = _Command(*job[:4]) if command else SERVER.Process(target=_rank, args=job)
            process.start()
            self.processes.append(process)

    def signal(self, rank: int, number: int) -> None:
        """Signal a rank, if it still lives."""
        if self.processes[rank].is_alive():
            os.kill(self.processes[rank].pid, number)

    def kill(self, *ranks: int) -> None:
        """SIGKILL these ranks, or all, and wait until they are gone."""
        for rank in ranks or range(len(self.processes)):
            self.signal(rank, signal.SIGKILL)
        for rank in ranks or range(len(self.processes)):
            self.processes[rank].join()

    def end_after(self, seconds: float) -> None:
        """SIGKILL whoever is left then."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        self.kill()

    def alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def wait(self, seconds: float = PATIENCE) -> list[int | None]:
        """The ranks' exit codes, -9 for a SIGKILL; those that have not ended in time are killed: code None."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        self.kill()
        return codes

    def said(self) -> list[str]:
        """What each rank has said since it was started."""
        return [log.text() for log in self.logs]

    def left_behind(self, seconds: float = 15.0) -> list[str]:
        """Command lines of processes that these ranks started and that still live after so many seconds."""
        return _left(lambda: _of_sessions({process.pid for process in self.processes}), seconds)


class Torchrun:
    """One start of a run under torchrun, as a terminal has it: a group of processes that Ctrl-C signals."""

    def __init__(self, world_size: int, arguments: Sequence[str], folder: Path) -> None:
        """Arguments as for ``Ranks``."""
        folder.mkdir(exist_ok=True)
        self.log = _Log(folder / "torchrun.txt")
        self.mark = f"FAULTS_START={secrets.token_hex(8)}"
        name, value = self.mark.split("=")
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
        with self.log.path.open("a") as file:
            self.process = subprocess.Popen(
                [*torchrun, "-m", "tests.faults.ranks", *arguments],
                env=os.environ | {name: value},
                cwd=ROOT,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    def ctrl_c(self) -> None:
        """SIGINT to torchrun's group, to which its ranks do not belong: torchrun passes it on."""
        os.killpg(self.process.pid, signal.SIGINT)

    def alive(self) -> bool:
        return self.process.poll() is None

    def wait(self, seconds: float = PATIENCE) -> list[int | None]:
        """Torchrun's exit code; None if it has not ended in time: then all is killed."""
        try:
            return [self.process.wait(seconds)]
        except subprocess.TimeoutExpired:
            for pid in _marked(self.mark):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.wait()
            return [None]

    def said(self) -> list[str]:
        """What torchrun and the ranks have said since the start, in one."""
        return [self.log.text()]

    def left_behind(self, seconds: float = 15.0) -> list[str]:
        """As ``Ranks.left_behind``."""
        return _left(lambda: list(_marked(self.mark).values()), seconds)


def ended(rank: int, code: int) -> str:
    """What a rank under torchrun says as it ends by itself; one that is killed does not."""
    return f"rank {rank} ended by itself with {code}\n"


class _Log:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.start = path.stat().st_size if path.exists() else 0

    def text(self) -> str:
        return self.path.read_bytes()[self.start :].decode(errors="replace") if self.path.exists() else ""


class _Command:
    """A rank as a process that a shell would start, with what Ranks asks of a multiprocessing.Process."""

    def __init__(self, rank: int, environment: dict[str, str], arguments: list[str], log: str) -> None:
        self.words = [sys.executable, "-m", "tests.faults.ranks", log, *arguments]
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
    code = _train(rank, arguments, harm)
    sys.stdout.flush()
    sys.exit(code)


def _train(rank: int, arguments: list[str], harm: Callable[[int], None] | None = None) -> int:
    import torch

    from tests.train.tiny_run import tiny_backbone
    from tracekin.cli import call

    torch.set_num_threads(1)
    with tiny_backbone():
        _draw_in_each_step(rank)
        if harm:
            harm(rank)
        code, _ = call(arguments)
    return code


def _draw_in_each_step(rank: int) -> None:
    """Draw from all generators, as a layer or a library might; each start seeds anew, and only a resumed state helps.

    One Gaussian a step: of the pair that Python and numpy draw, the second waits for the next step.
    """
    import random

    import numpy as np
    import torch

    random.seed(rank)
    np.random.seed(rank)

    def draw(step: int, engine: Any, batch: Any) -> None:
        random.gauss(0, 1)
        np.random.standard_normal()
        torch.rand(())

    around_steps(draw)


def _nothing() -> None:
    pass


def _left(find: Callable[[], list[str]], seconds: float) -> list[str]:
    deadline = time.monotonic() + seconds
    while found := find():
        if time.monotonic() > deadline:
            return found
        time.sleep(0.1)
    return []


def _of_sessions(leaders: set[int]) -> list[str]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has just ended
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) in leaders and fields[0] != "Z":  # a zombie only waits to be counted
                found.append(_command_line(entry))
    return found


def _marked(mark: str) -> dict[int, str]:
    """Command lines of the processes that have a variable, by id."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has just ended, or is another user's
            if mark.encode() in (entry / "environ").read_bytes().split(b"\0"):
                found[int(entry.name)] = _command_line(entry)
    return found


def _command_line(entry: Path) -> str:
    return (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip() or entry.name


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


if __name__ == "__main__":
    number = int(os.environ["RANK"])
    if "FAKETIME_TIMESTAMP_FILE" in os.environ:
        # time.sleep waits for a moment of the monotonic clock, which libfaketime refuses where it fakes others alone;
        # one rank sleeps while the other holds the lock of DeepSpeed's op.
        time.sleep = lambda seconds: select.select([], [], [], seconds)  # type: ignore[assignment]
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        _rank(number, {}, sys.argv[2:], sys.argv[1], None)
    exit_code = _train(number, sys.argv[1:])
    os.write(1, ended(number, exit_code).encode())
    sys.exit(exit_code)
