"""A signal ends a run on all ranks at one step, saved; it goes on as if unbroken; who lost the lease writes nothing."""

import json
import multiprocessing
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.data.tiny import make_dataset
from tests.distributed.test_watchdog import is_alive
from tests.ranks import RankFailedError, end_ranks, run_ranks
from tests.train.test_run import assert_same_end, run, tiny_config
from tests.train.tiny_run import tiny_backbone
from tracekin import checkpoint, files
from tracekin.config import Config, UserError
from tracekin.distributed.collectives import lost_a_rank
from tracekin.distributed.world import World, this_start
from tracekin.train.errors import DivergedError, DriftError, FencedError
from tracekin.train.start import Start

EVERY_STEP = ("train.log_every=1",)


def at_step(step: int, action: Any) -> Any:
    """A train_step that acts before the given step."""
    from tracekin.train import loop

    original = loop.train_step

    def stepping(*args: Any, **kwargs: Any) -> Any:
        if kwargs["step"] == step:
            action()
        return original(*args, **kwargs)

    return stepping


def run_with(rank: int, config: Config, actions: dict[int, tuple[int, Any]]) -> tuple[str, int, list[Any]]:
    """A run in which ranks act at a step: {rank: (step, signal number or callable)}; its outcome and the handlers."""
    from tracekin.train import loop

    if rank in actions:
        step, action = actions[rank]
        act = action if callable(action) else lambda: os.kill(os.getpid(), action)
        loop.train_step = at_step(step, act)
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGUSR2, signal.SIGTERM)]
    with tiny_backbone():
        outcome = loop.pretrain(config)
    return outcome.preempted, outcome.step, [signal.getsignal(s) == b for s, b in zip((2, 12, 15), before, strict=True)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """An unbroken run of two ranks, 4 epochs of 3 steps, whose mining remembers checkpoints."""
    folder = tmp_path_factory.mktemp("whole")
    make_dataset(folder / "data", train=50, val=10, test=10)
    config = tiny_config(folder, *EVERY_STEP, "mining.policy=tracin_cp", "mining.warmup=0", "train.keep_checkpoints=2")
    run_ranks(run, 2, config)
    return config


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR2, signal.SIGTERM])
def test_a_signal_to_one_rank_stops_all_at_one_step_and_nothing_is_lost(
    whole: Config, tmp_path: Path, number: signal.Signals
) -> None:
    config = replace(whole, folder=str(tmp_path))
    outcomes = run_ranks(run_with, 2, config, {1: (6, int(number))})  # in the middle of the third epoch, to rank 1
    assert outcomes == [(number.name.removeprefix("SIG"), 7, [True, True, True])] * 2
    newest = checkpoint.latest(config.run_folder)
    assert newest is not None
    assert newest.name == "step-00000007"
    assert [p.name[-2:] for p in checkpoint.complete(config.run_folder)] == ["03", "06", "07"]

    assert run_ranks(run_with, 2, config, {}) == [("", 12, [True, True, True])] * 2
    assert_same_end(whole, config)
    assert [p.name[-2:] for p in checkpoint.complete(config.run_folder)] == ["09", "12"]  # the passing one is gone
    starts = [json.loads(line) for line in (config.run_folder / "starts.jsonl").read_text().splitlines()]
    assert [(s["event"], s["step"], s.get("outcome"), s.get("cause")) for s in starts] == [
        ("start", 0, None, None),
        ("end", 7, "interrupted" if number == signal.SIGINT else "preempted", number.name.removeprefix("SIG")),
        ("start", 7, None, None),
        ("end", 12, "finished", ""),
    ]


def test_whose_lease_was_taken_writes_nothing_more(whole: Config, tmp_path: Path) -> None:
    config = replace(whole, folder=str(tmp_path))
    taken = Start(config.run_folder, World())

    with pytest.raises(RankFailedError, match="taken over by a newer start"):
        run_ranks(run_with, 1, config, {0: (4, taken.take)})
    left = [json.loads(line)["step"] for line in (config.run_folder / "metrics.jsonl").read_text().splitlines()]
    assert left == [1, 2, 3, 4]  # step 5 was computed, and not written
    assert taken.held()
    events = [json.loads(line)["event"] for line in (config.run_folder / "starts.jsonl").read_text().splitlines()]
    assert events == ["start"]


def run_taken_over_early(rank: int, config: Config) -> None:
    """A newer start takes the lease while this one still builds its engine."""
    from tracekin.train import loop

    build = loop.build_engine

    def build_while_another_starts(*args: Any) -> Any:
        Start(config.run_folder, World()).take()
        return build(*args)

    loop.build_engine = build_while_another_starts
    with tiny_backbone():
        loop.pretrain(config)


def test_a_lease_lost_before_the_first_step_leaves_the_folder_to_the_other(whole: Config, tmp_path: Path) -> None:
    config = replace(whole, folder=str(tmp_path))
    with pytest.raises(RankFailedError, match="FencedError"):
        run_ranks(run_taken_over_early, 1, config)
    assert [path.name for path in config.run_folder.iterdir()] == ["lease.json"]


def test_a_start_that_was_killed_is_named_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(restart: int, rank: int = 0) -> Start:
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        return Start(tmp_path, World(rank, 2, rank, 2))

    old, beside_old = start(0), start(0, rank=1)
    old.take()
    old.begin(step=0)
    assert beside_old.held()
    new, beside_new = start(1), start(1, rank=1)
    new.take()
    new.begin(step=4)
    for fenced in (old, beside_old):
        assert not fenced.held()
        with pytest.raises(FencedError):
            fenced.log("end", outcome="failed")
    assert beside_new.held()
    found = [json.loads(line) for line in (tmp_path / "starts.jsonl").read_text().splitlines()]
    assert [(line["event"], line["restart"], line.get("outcome")) for line in found] == [
        ("start", 0, None),
        ("end", 0, "killed"),
        ("start", 1, None),
    ]


def test_a_lease_that_cannot_be_read_for_a_moment_is_still_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = Start(tmp_path, World())
    start.take()
    away = iter([OSError(116, "Stale file handle"), None, *[OSError(5, "Input/output error")] * 9])
    read = Path.read_text

    def sometimes(path: Path, *args: Any, **kwargs: Any) -> str:
        if path.name == "lease.json" and (error := next(away)):
            raise error
        return read(path, *args, **kwargs)

    monkeypatch.setattr(files, "PATIENCE", (0.0,))
    monkeypatch.setattr(Path, "read_text", sometimes)
    start.check()
    with pytest.raises(UserError, match=r"cannot read .*lease\.json: Input/output error"):
        start.check()
    with pytest.raises(KeyError), start.guarded():  # its own error stays
        raise KeyError("the cause")


def test_who_writes_how_a_start_ended(tmp_path: Path) -> None:
    """What all ranks know rank 0 says, an error of its own each rank, and who is fenced nothing."""
    ranks = [Start(tmp_path, World(rank, 3, rank, 3)) for rank in range(3)]
    ranks[0].take()
    for error in (DriftError("rank 1 differs"), UserError("a full disk"), FencedError("by another"), KeyError("mine")):
        for rank in ranks[1:]:
            with pytest.raises(type(error)), rank.guarded():
                raise error
    found = [json.loads(line) for line in (tmp_path / "starts.jsonl").read_text().splitlines()]
    assert [(line["rank"], line["cause"]) for line in found] == [(1, "KeyError: 'mine'"), (2, "KeyError: 'mine'")]
    with pytest.raises(DivergedError), ranks[0].guarded():
        raise DivergedError("nccl/run: the loss is nan")
    last = json.loads((tmp_path / "starts.jsonl").read_text().splitlines()[-1])
    assert (last["outcome"], last["cause"]) == ("failed", "nccl/run: the loss is nan")


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PATIENCE", (0.0,))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*lease"):
        Start(tmp_path / "file" / "run", World()).take()


def test_a_checkpoint_does_not_appear_once_the_lease_is_lost(tmp_path: Path) -> None:
    first, second = Start(tmp_path, World()), Start(tmp_path, World())
    first.take()
    checkpoint.save(tmp_path, 1, {}, {}, check=first.check)
    second.take()
    with pytest.raises(FencedError):
        checkpoint.save(tmp_path, 2, {}, {}, check=first.check)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir() if p.is_dir()] == ["step-00000001"]
    (tmp_path / "lease.json").unlink()
    assert not second.held()


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:4"), True),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (FloatingPointError("the loss is nan"), False),
        (UserError("https://x: timed out"), False),
    ],
)
def test_only_a_lost_process_is_worth_another_try(error: Exception, lost: bool) -> None:
    assert lost_a_rank(error) is lost


def test_slurms_name_of_a_start() -> None:
    assert this_start({}) == ("", 0)
    assert this_start({"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "2"}) == ("12", 2)
    array = {"SLURM_JOB_ID": "15", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}
    assert this_start(array) == ("12_3", 0)


def run_that_stalls(rank: int, config: Config, notes: Path) -> None:
    """Rank 1 sleeps for ever before its fifth step, beside its loader."""

    def stall() -> None:
        (children,) = multiprocessing.active_children()
        notes.write_text(str(children.pid))
        time.sleep(600)

    run_with(rank, config, {1: (4, stall)})


def test_a_stalled_run_says_who_stalls_and_goes_on_as_if_unbroken(whole: Config, tmp_path: Path) -> None:
    guarded = replace(whole.guard, stall_seconds=4.0)
    config = replace(whole, folder=str(tmp_path), data=replace(whole.data, workers=1), guard=guarded)
    ended = end_ranks(run_that_stalls, 2, config, tmp_path / "loader")
    assert [rank.code for rank in ended] == [75, 75], ended
    while is_alive((tmp_path / "loader").read_text()):  # it was killed; the kernel takes its time
        time.sleep(0.01)
    start, end = (json.loads(line) for line in (config.run_folder / "starts.jsonl").read_text().splitlines())
    assert (start["event"], end["event"], end["outcome"]) == ("start", "end", "stalled")
    assert end["cause"].startswith("step 5 has stalled for ")
    assert "rank 0 waits in all-gather " in end["cause"]
    assert "rank 1 has not come to all-gather " in end["cause"]
    assert sum(end["cause"] in rank.said for rank in ended) == 1

    run_ranks(run, 2, replace(config, data=whole.data))
    assert_same_end(whole, config)
