"""`python -m launch.sync` with the real W&B client, against a stand-in for the server on loopback."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest

from launch.sync import pending
from tests.launch.wandb_server import KEY, WandbServer, wandb_server
from tracekin.config import MonitorConfig
from tracekin.monitor.sinks import WeightsAndBiases, log_table

ROOT = Path(__file__).parents[2]
LOG = """
import sys
import time
from pathlib import Path
from tracekin.config import MonitorConfig
from tracekin.monitor.sinks import WeightsAndBiases

folder, start, first, last = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
sink = WeightsAndBiases(MonitorConfig(wandb="offline"), folder, folder.name, {})
for step in range(first, last + 1):
    sink.write({"step": step, "loss": 1 / step, "start": start, "filling": "x" * 1000})
for line in sys.stdin:  # a live run goes on as it is told
    file = max(folder.glob("wandb/offline-run-*/*.wandb"))
    enough = max((step + int(line)) * 700, file.stat().st_size + int(line) * 500)
    for _ in range(int(line)):
        step += 1
        sink.write({"step": step, "loss": 1 / step, "start": start, "filling": "x" * 1000})
    while sink.jobs.qsize() or file.stat().st_size < enough:  # the client writes behind
        time.sleep(0.05)
    print(step, flush=True)
sink.close()
"""


def environment(home: Path, server: WandbServer | None = None, key: str = KEY) -> dict[str, str]:
    """This process's, without its W&B settings and the user's login."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    kept |= {"HOME": str(home), "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}", "no_proxy": "127.0.0.1"}
    if server is not None:
        # As on many clusters, where the jobs must not try to reach the server.
        kept |= {"WANDB_BASE_URL": server.url, "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
        kept |= {"WANDB__GRAPHQL_RETRY_WAIT_MAX_SECONDS": "1"}  # how often it tries is launch.sync's
    return kept | ({"WANDB_API_KEY": key} if key else {})


def log(run: Path, start: str, first: int, last: int) -> None:
    """One start of a run, which logs the steps from ``first`` to ``last`` offline."""
    run.mkdir(parents=True, exist_ok=True)
    with patch.dict(os.environ, environment(run.parent), clear=True):
        sink = WeightsAndBiases(MonitorConfig(wandb="offline"), run, run.name, {})
        for step in range(first, last + 1):
            sink.write({"step": step, "loss": 1 / step, "start": start, "filling": "x" * 1000})
        sink.close()


def sync(server: WandbServer, folder: Path, *words: str, key: str = KEY) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "launch.sync", *words],
        cwd=folder,
        env=environment(folder, server, key),
        capture_output=True,
        text=True,
    )
    assert KEY not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


@contextmanager
def started(words: list[str], folder: Path, home: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A process that reads and writes lines; killed at the end if it still runs."""
    pipe = subprocess.PIPE
    with subprocess.Popen(
        words, cwd=folder, env=home, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with wandb_server() as server:
        yield server


@pytest.fixture(scope="session")
def five_lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that logged steps 1 to 5 and ended."""
    run = tmp_path_factory.mktemp("offline") / "byol"
    log(run, "first", 1, 5)
    return run


@pytest.fixture
def run(five_lines: Path, tmp_path: Path) -> Path:
    """Its copy, where one would look for it: in runs/."""
    return Path(shutil.copytree(five_lines, tmp_path / "runs" / "byol", symlinks=True))


def test_each_start_is_pushed_once(server: WandbServer, run: Path, tmp_path: Path) -> None:
    first = sync(server, tmp_path)
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("runs/byol: pushed 1 start, ")
    assert first.stdout.endswith("pushed 1 of 1 runs\n")
    (arrived,) = server.runs.values()
    assert (arrived.project, arrived.display_name, arrived.exit_codes) == ("tracekin", "byol", [0])
    assert arrived.shown("step") == [1, 2, 3, 4, 5]

    requests = len(server.operations)
    again = sync(server, tmp_path)
    assert (again.returncode, again.stdout) == (0, "nothing new in 1 runs\n")
    assert len(server.operations) == requests

    log(run, "second", 5, 7)  # requeued, rolled back by one step
    sync(server, tmp_path, "runs/byol")
    assert [row["step"] for row in arrived.arrived] == [1, 2, 3, 4, 5, 5, 6, 7]
    assert arrived.shown("start") == ["first"] * 5 + ["second"] * 3
    assert arrived.shown("step") == [1, 2, 3, 4, 5, 5, 6, 7]


def test_a_live_run_and_what_follows_its_death_arrive_once(server: WandbServer, run: Path, tmp_path: Path) -> None:
    """The file of a start that still logs, pushed as it grows, the torn one that SIGKILL leaves, and the next start."""
    arguments = [sys.executable, "-c", LOG, str(run), "second", "5", "100"]
    with started(arguments, tmp_path, environment(tmp_path)) as live:
        assert live.stdin is not None
        assert live.stdout is not None
        print(100, file=live.stdin, flush=True)
        assert live.stdout.readline() == "200\n"
        assert sync(server, tmp_path).returncode == 0
        (arrived,) = server.runs.values()
        before = arrived.shown("step")[-1]
        assert 100 < before <= 200

        print(200, file=live.stdin, flush=True)
        assert live.stdout.readline() == "400\n"
        assert sync(server, tmp_path).returncode == 0
        grown = arrived.shown("step")[-1]
        assert before < grown <= 400
        assert arrived.shown("step") == [*range(1, 6), *range(5, grown + 1)]

        print(200, file=live.stdin, flush=True)
        assert live.stdout.readline() == "600\n"
        live.kill()
    file = max(run.glob("wandb/offline-run-*/*.wandb"))
    torn = tmp_path / "torn"
    torn.write_bytes(file.read_bytes()[:-500])
    torn.replace(file)  # the client's own process may outlive the run's and write on

    log(run, "third", 120, 130)
    done = sync(server, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "pushed 2 starts" in done.stdout
    starts = arrived.shown("start")
    second = starts.count("second")
    assert starts == ["first"] * 5 + ["second"] * second + ["third"] * 11
    assert second > grown - 4
    assert arrived.shown("step") == [*range(1, 6), *range(5, second + 5), *range(120, 131)]
    assert arrived.exit_codes[-1] == 0
    assert sync(server, tmp_path).stdout == "nothing new in 1 runs\n"


def test_what_did_not_arrive_is_pushed_again(server: WandbServer, run: Path, tmp_path: Path) -> None:
    """The client itself marks a run as synced although the server took none of its lines."""
    server.refused = "/files/"
    failed = sync(server, tmp_path)
    assert failed.returncode == 2
    assert "1 of 1 runs could not be pushed whole to W&B, the first runs/byol: " in failed.stderr
    assert failed.stderr.count("\n") == 1
    assert list(run.glob("wandb/offline-run-*/*.synced"))

    server.refused = ""
    assert sync(server, tmp_path).returncode == 0
    assert next(iter(server.runs.values())).shown("step") == [1, 2, 3, 4, 5]


def test_server_away(run: Path, tmp_path: Path) -> None:
    with wandb_server() as gone:
        pass
    done = sync(gone, tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "the W&B server did not answer" in done.stderr
    assert "connection refused" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (run / "wandb" / "synced.json").exists()


def test_no_key(server: WandbServer, run: Path, tmp_path: Path) -> None:
    done = sync(server, tmp_path, key="")
    assert (done.returncode, done.stdout) == (2, "")
    assert "wandb login" in done.stderr
    assert done.stderr.count("\n") == 1
    assert server.operations == []


def test_every_goes_on_after_a_failure(server: WandbServer, run: Path, tmp_path: Path) -> None:
    server.refused = "/graphql"
    words = [sys.executable, "-u", "-m", "launch.sync", "--every", "1"]
    with started(words, tmp_path, environment(tmp_path, server)) as process:
        assert process.stdout is not None
        assert "Trying again in 1 s." in process.stdout.readline()
        server.refused = ""
        lines = iter(process.stdout.readline, "")
        assert any(line.startswith("runs/byol: pushed 1 start") for line in lines)
        assert any(line == "nothing new in 1 runs\n" for line in lines)
        process.send_signal(signal.SIGINT)
        assert process.wait() == 130


def test_a_damaged_file_holds_up_no_other(server: WandbServer, run: Path, tmp_path: Path) -> None:
    """A start that is no W&B file and one with a hole, before a good one of their run and beside another run."""
    other = tmp_path / "runs" / "sweeps" / "demo" / "other"
    shutil.copytree(run, other, symlinks=True)
    (good,) = run.glob("wandb/offline-run-*/*.wandb")
    content = bytearray(good.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 300] = bytes(300)
    for day, damaged in ((1, b"no W&B file" * 10), (2, content)):
        folder = run / "wandb" / f"offline-run-2026010{day}_000000-{good.parent.name.rpartition('-')[2]}"
        folder.mkdir()
        (folder / good.name).write_bytes(damaged)
    done = sync(server, tmp_path)
    assert done.returncode == 2
    assert "runs/byol: pushed 1 start, " in done.stdout
    assert "runs/sweeps/demo/other: pushed 1 start, " in done.stdout
    assert "1 of 2 runs could not be pushed whole to W&B, the first runs/byol: Failed to read" in done.stderr
    assert sync(server, tmp_path).stdout == "nothing new in 2 runs\n"


def test_what_is_pending(tmp_path: Path) -> None:
    files = []
    for day, size in ((1, 900), (2, 7), (3, 500), (4, 600)):
        files.append(tmp_path / "wandb" / f"offline-run-2026010{day}_000000-ab" / "run-ab.wandb")
        files[-1].parent.mkdir(parents=True)
        files[-1].write_bytes(bytes(size))
    assert pending(tmp_path) == [files[0], files[2], files[3]]  # the second holds nothing but the file's header
    pushed = {file.parent.name: 500 for file in (files[0], files[2])}
    (tmp_path / "wandb" / "synced.json").write_text(json.dumps(pushed))
    assert pending(tmp_path) == [files[3]]  # the first grew after the third had taken over
    files[2].write_bytes(bytes(501))
    assert pending(tmp_path) == [files[2], files[3]]


def test_what_is_pending_of_online_starts(tmp_path: Path) -> None:
    """The rest of an online start waits until another one went on at the server; what was never there always does."""

    def start(day: int, kind: str, begun: str) -> Path:
        file = tmp_path / "wandb" / f"{kind}-2026010{day}_000000-ab" / "run-ab.wandb"
        file.parent.mkdir(parents=True)
        file.write_bytes(bytes(900))
        if begun:
            file.with_name(f"{file.name}.syncstate").write_text(begun)
        return file

    rest = start(1, "offline-run", begun="{}")
    never = start(2, "offline-run", begun="")
    start(3, "run", begun="")  # no server: it went on as the next
    instead = start(4, "offline-run", begun="")
    assert pending(tmp_path) == [rest, never, instead]
    start(5, "run", begun="{}")
    late = start(6, "offline-run", begun="{}")
    assert pending(tmp_path) == [never, instead, late]


@pytest.mark.parametrize(("words", "message"), [((), "runs: no such folder"), ((".",), "no run here logged to W&B")])
def test_nothing_to_look_at(server: WandbServer, tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    done = sync(server, tmp_path, *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr


def test_a_table_arrives_and_tells_nothing_of_the_machine(server: WandbServer, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "sweeps" / "demo"
    folder.mkdir(parents=True)
    rows = [["byol", 0.5], ["influence", "failed"]]
    with patch.dict(os.environ, environment(tmp_path), clear=True):
        log_table(folder, MonitorConfig(wandb="disabled"), "sweeps/demo", ["run", "auc"], rows)
        assert not list(folder.iterdir())
        log_table(folder, MonitorConfig(wandb="offline"), "sweeps/demo", ["run", "auc"], rows)
    done = sync(server, tmp_path, "runs/sweeps/demo")
    assert done.returncode == 0, done.stderr
    (arrived,) = server.runs.values()
    assert arrived.display_name == "sweeps/demo"
    (shown,) = arrived.shown("table")
    assert json.loads(server.files[shown["path"]]) == {
        "columns": ["run", "auc"],
        "data": [["byol", 0.5], ["influence", "failed"]],
    }
    told = " ".join([*server.told, *map(str, server.files.values()), json.dumps(arrived.arrived)])
    assert "sweeps/demo" in told
    for secret in (socket.gethostname(), str(tmp_path), "launch.sync", "wandb.__main__"):
        assert secret not in told.split() if len(secret) < 4 else secret not in told
