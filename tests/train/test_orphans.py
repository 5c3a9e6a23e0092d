"""However a run ends, no process and no shared memory of it is left."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.data.tiny import make_dataset
from tests.launch.wandb_server import WandbServer, environment_of, wandb_server
from tests.leftovers import Present, adopting, left_behind, present
from tests.ranks import PRELOAD, _start_server
from tests.train.tiny_run import tiny_backbone
from tracekin.config import UserError

COMMAND = [
    "pretrain",
    "empty.yaml",
    "name=run",
    "data.manifest=data/manifest.json",
    "data.image_size=24",
    "data.workers=2",
    "model.projector_hidden=32",
    "model.projection=16",
    "model.predictor_hidden=32",
    "train.global_batch=16",
    "train.precision=fp32",
    "train.threads=1",
    "train.log_every=1",
]


def run(folder: Path, environment: dict[str, str], overrides: list[str], error: Exception | None, stuck: bool) -> None:
    """The command ``tracekin pretrain`` in this process.

    Step 5 raises ``error``; ``stuck``, a loader comes to no end with the first image of the second epoch.
    """
    from tracekin import cli
    from tracekin.data import stream
    from tracekin.train import loop

    multiprocessing.set_start_method("fork", force=True)  # a process of the forkserver has its way as the default
    os.chdir(folder)
    os.environ |= environment
    sys.stdout = sys.stderr = (folder / "output").open("w")
    original = loop.train_step

    def stepping(*args: Any, **kwargs: Any) -> Any:
        if error and kwargs["step"] == 5:
            raise error
        return original(*args, **kwargs)

    loop.train_step = stepping
    draw = stream.draw
    stream.draw = lambda **place: time.sleep(1e6) if stuck and place["epoch"] else draw(**place)
    with tiny_backbone():
        code, _ = cli.call([*COMMAND, *overrides])
    sys.exit(code)


class Started:
    """A run that has logged some steps."""

    def __init__(
        self,
        folder: Path,
        *overrides: str,
        error: Exception | None = None,
        stuck: bool = False,
        **environment: str,
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        self.process = context.Process(target=run, args=(folder, environment, [*overrides], error, stuck))
        self.process.start()
        assert self.process.pid is not None
        self.pid = self.process.pid
        while not (folder / "runs" / "run" / "metrics.jsonl").exists() or self.lines(folder) < 3:
            assert self.process.is_alive(), (folder / "output").read_text()
            time.sleep(0.02)

    def lines(self, folder: Path) -> int:
        return (folder / "runs" / "run" / "metrics.jsonl").read_text().count("\n")

    def send(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):  # the first of two may have sufficed
            os.kill(self.pid, number)

    def code(self) -> int | None:
        self.process.join()
        return self.process.exitcode


@pytest.fixture
def before(tmp_path: Path) -> Iterator[Present]:
    make_dataset(tmp_path / "data", train=48, val=4, test=4)
    (tmp_path / "empty.yaml").write_text("{}\n")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    _start_server(context)
    with adopting() as before:
        yield before


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with wandb_server() as server:
        yield server


def test_a_killed_run_leaves_nothing(tmp_path: Path, before: Present, server: WandbServer) -> None:
    """Not its loaders, which hang, nor W&B's process, which has lines that the server does not take."""
    started = Started(tmp_path, "train.epochs=9", "monitor.wandb=online", stuck=True, **environment_of(server.url))
    server.answering.clear()
    running = [command for pid, command in present().processes.items() if pid not in before.processes]
    assert len([command for command in running if "wandb-core" in command]) == 1
    assert len(running) >= 4  # the rank and two loaders
    started.send(signal.SIGKILL)
    assert started.code() == -signal.SIGKILL
    assert left_behind(before) == []


def twice(number: signal.Signals) -> Callable[[Started], None]:
    def send(started: Started) -> None:
        started.send(number)
        time.sleep(0.1)
        started.send(number)

    return send


@pytest.mark.parametrize(
    ("end", "codes"),
    [
        (lambda started: started.send(signal.SIGTERM), {75}),
        (lambda started: started.send(signal.SIGINT), {130}),
        (twice(signal.SIGINT), {130, -signal.SIGINT}),
    ],
    ids=["TERM", "INT", "INT twice"],
)
def test_a_signalled_run_leaves_nothing(
    tmp_path: Path, before: Present, end: Callable[[Started], None], codes: set[int]
) -> None:
    started = Started(tmp_path, "train.epochs=1000", "monitor.wandb=offline")
    end(started)
    assert started.code() in codes, (tmp_path / "output").read_text()
    assert left_behind(before) == []


@pytest.mark.parametrize(
    ("error", "code"),
    [(None, 0), (RuntimeError("a bug"), 1), (UserError("a mistake"), 2)],
    ids=["finished", "error", "mistake"],
)
def test_a_run_that_ends_by_itself_leaves_nothing(
    tmp_path: Path, before: Present, error: Exception | None, code: int
) -> None:
    started = Started(tmp_path, "train.epochs=3", "monitor.wandb=offline", error=error)
    assert started.code() == code, (tmp_path / "output").read_text()
    assert left_behind(before) == []


def test_a_silent_server_costs_no_step(tmp_path: Path, before: Present, server: WandbServer) -> None:
    """Online, to the end of the run: code 0, all lines, and what was not sent waits for launch.sync."""
    online = ("monitor.wandb=online", "monitor.finish_seconds=1")
    started = Started(tmp_path, "train.epochs=20", *online, **environment_of(server.url))
    server.answering.clear()
    assert started.code() == 0, (tmp_path / "output").read_text()
    assert started.lines(tmp_path) == 60
    assert "next: tracekin evaluate" in (tmp_path / "output").read_text()
    assert len(list((tmp_path / "runs" / "run").glob("wandb/offline-run-*/*.wandb"))) == 1
    assert left_behind(before) == []
