"""The W&B sink with the real client, against stand-ins for the server on loopback: it never hurts a run."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from launch.sync import pending
from tests.launch.wandb_server import KEY, WandbServer, environment_of, unreachable, wandb_server
from tests.leftovers import children
from tracekin.config import MonitorConfig, UserError
from tracekin.monitor import sinks
from tracekin.monitor.sinks import WeightsAndBiases, check_login, open_sinks

ROOT = Path(__file__).parents[2]
SHORT = MonitorConfig(wandb="online", init_seconds=2, finish_seconds=2)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The user's login and settings stay out of it, and no process of the client's is left."""
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    yield
    assert services() == []
    for name in [name for name in os.environ if name.startswith("WANDB")]:  # set by the sink
        del os.environ[name]


def services() -> list[int]:
    return [pid for pid, command in children().items() if "wandb-core" in command]


@contextmanager
def going_to(url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        for name, value in environment_of(url).items():
            patch.setenv(name, value)
        yield


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    with wandb_server() as server, going_to(server.url, monkeypatch):
        yield server


def log(run: Path, middle: Callable[[Any], Any] = lambda sink: None, first: int = 1) -> None:
    """One start of a run, whose ten steps from ``first`` reach metrics.jsonl whatever ``middle`` does to W&B."""
    run.mkdir(exist_ok=True)
    opened = open_sinks(SHORT, run, run.name, {}, first - 1)
    for step in range(first, first + 10):
        if step == first + 5:
            middle(opened[1])
        for sink in opened:
            sink.write({"step": step, "loss": 1 / step})
    for sink in opened:
        sink.close()
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, first + 10))


def synced(run: Path, server: WandbServer) -> list[int]:
    """The steps that the server shows once launch.sync has pushed what lies in the folder."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    done = subprocess.run(
        [sys.executable, "-m", "launch.sync", str(run)],
        env=kept | environment_of(server.url) | {"PYTHONPATH": f"{ROOT}:{ROOT / 'src'}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (arrived,) = server.runs.values()
    return arrived.shown("step")


def test_online(server: WandbServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server.delay = 0.1
    log(tmp_path / "byol")
    (arrived,) = server.runs.values()
    assert arrived.shown("step") == list(range(1, 11))
    assert arrived.exit_codes == [0]
    assert capsys.readouterr().out == ""
    assert pending(tmp_path / "byol") == []


@pytest.mark.parametrize("listening", [False, True], ids=["refused", "black hole"])
def test_no_server_at_the_start(
    listening: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "byol"
    with unreachable(listening) as url, going_to(url, monkeypatch):
        log(run)
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert "goes on offline, and python -m launch.sync pushes it later" in said
    assert len(pending(run)) == 1
    if listening:
        with wandb_server() as server:
            assert synced(run, server) == list(range(1, 11))
            assert list(server.runs) == [(run / "wandb_id").read_text().strip()]


def test_a_slow_server(server: WandbServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each answer takes longer than the start or the end may: the start goes offline."""
    server.delay = 3
    log(tmp_path / "byol")
    assert capsys.readouterr().out.count("\n") == 1
    server.delay = 0
    assert synced(tmp_path / "byol", server) == list(range(1, 11))


def test_a_server_that_goes_away(server: WandbServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was not sent stays, and a start that follows online comes after it."""
    run = tmp_path / "byol"
    log(run, lambda sink: server.answering.clear())
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert f"the rest lies in {run}" in said
    server.answering.set()
    assert len(pending(run)) == 1
    assert synced(run, server) == list(range(1, 11))
    log(run, first=11)
    (arrived,) = server.runs.values()
    assert arrived.shown("step") == list(range(1, 21))
    assert pending(run) == []


def test_what_another_start_wrote_over_is_not_pushed(server: WandbServer, tmp_path: Path) -> None:
    run = tmp_path / "byol"
    log(run, lambda sink: server.answering.clear())
    server.answering.set()
    log(run, first=11)
    (arrived,) = server.runs.values()
    assert pending(run) == []
    assert arrived.shown("step")[-10:] == list(range(11, 21))


@pytest.mark.parametrize(("path", "status"), [("/graphql", 401), ("/files/", 404)], ids=["the key", "the lines"])
def test_a_server_that_refuses(
    path: str, status: int, server: WandbServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the start, and only the lines of metrics, which the client itself keeps to itself."""
    server.refused, server.status = path, status
    log(tmp_path / "byol")
    assert capsys.readouterr().out.count("\n") == 1
    assert len(pending(tmp_path / "byol")) == 1


def test_the_clients_process_is_killed(server: WandbServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What it had not yet written goes with it; what comes once that is noticed arrives."""

    def kill(sink: Any) -> None:
        (service,) = services()
        os.kill(service, signal.SIGKILL)
        while services() in ([], [service]):
            sink.write({"step": 5, "loss": 1 / 5})
            time.sleep(0.01)

    run = tmp_path / "byol"
    log(run, kill)
    assert capsys.readouterr().out.count("\n") == 1
    assert synced(run, server)[-5:] == list(range(6, 11))


def test_the_clients_process_hangs(
    server: WandbServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither lines nor the end wait for it."""
    monkeypatch.setattr(sinks, "MARGIN", 1.0)
    monkeypatch.setattr(sinks, "MOST_WAITING", 3)
    log(tmp_path / "byol", lambda sink: os.kill(services()[0], signal.SIGSTOP))
    assert "goes on offline" in capsys.readouterr().out


def test_lines_that_nobody_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting lines are bounded, and a client that raises each time is given up."""
    monkeypatch.setattr(sinks, "MOST_WAITING", 3)
    monkeypatch.setattr(sinks, "_open_run", lambda *a: time.sleep(0.5))
    sink = WeightsAndBiases(MonitorConfig(init_seconds=0.1), tmp_path, "byol", {})
    for step in range(9):
        sink.write({"step": step})
    assert sink.jobs.qsize() <= 3
    sink.close()
    assert not sink.thread.is_alive()


def test_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with unreachable(listening=True) as url, going_to(url, monkeypatch):
        monkeypatch.delenv("WANDB_API_KEY")
        with pytest.raises(UserError, match=r"none is set; .*wandb login.*WANDB_API_KEY.*offline"):
            check_login(SHORT)
        monkeypatch.setenv("WANDB_API_KEY", "short")
        with pytest.raises(UserError, match="WANDB_API_KEY invalid"):
            check_login(SHORT)
        monkeypatch.delenv("WANDB_API_KEY")
        check_login(MonitorConfig(wandb="offline"))
        (tmp_path / ".netrc").write_text(f"machine {url.removeprefix('http://')}\n  login user\n  password {KEY}\n")
        check_login(SHORT)
        assert services() == []  # whether the key is right only the server knows: it is not asked
