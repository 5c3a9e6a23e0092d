"""The faults: each is a function that makes one try in a ``Lab`` and returns what became of it."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

from tests.faults.ranks import Ranks
from tests.faults.trial import INTERVAL, Lab, Result, last_step
from tests.launch.wandb_server import environment_of, unreachable, wandb_server

TRY_AGAIN, INTERRUPTED = 75, 130
KILLED = -9
LOST = {KILLED, TRY_AGAIN}
FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)


class Fault(NamedTuple):
    name: str
    attempt: Callable[[Lab, random.Random], Result]
    tries: int
    """In make faults."""
    quick: int = 0
    """In make test."""
    most_lost: int = 2 * INTERVAL
    """Steps that it may cost: an interval, and the steps while a checkpoint was still being written."""


def kill_one_at_random(lab: Lab, chance: random.Random) -> Result:
    world = chance.choice((2, 3, 4))
    moment, victim = _moment(lab, world, chance), chance.randrange(world)

    def harm(ranks: Ranks, run: Path) -> None:
        _sleep_while_alive(ranks, moment)
        ranks.kill(victim)

    return lab.attempt(world, harm, codes=LOST | {0})  # 0: it had just finished


def kill_all_at_random(lab: Lab, chance: random.Random) -> Result:
    world = chance.choice((2, 3, 4))
    moment = _moment(lab, world, chance)

    def harm(ranks: Ranks, run: Path) -> None:
        _sleep_while_alive(ranks, moment)
        ranks.kill()

    return lab.attempt(world, harm, codes={KILLED, 0})


def kill_inside_a_save(lab: Lab, chance: random.Random, *, everyone: bool) -> Result:
    """Rank 0, which writes, or all."""
    after = chance.randrange(1, 30)

    def harm(ranks: Ranks, run: Path) -> None:
        _wait_until(ranks, lambda: last_step(run) >= after)
        _wait_until(ranks, lambda: any((run / "checkpoints").glob(".step-*.partial")), pause=0.0)
        ranks.kill(*(() if everyone else (0,)))

    return lab.attempt(2, harm, codes=LOST)


def skewed_signals(lab: Lab, chance: random.Random, *, number: int, code: int) -> Result:
    """Ranks hear of it one after another, up to half a second apart, the last one maybe never."""
    world, after = chance.choice((2, 4)), chance.randrange(1, 30)
    order = chance.sample(range(world), world)

    def harm(ranks: Ranks, run: Path) -> None:
        _wait_until(ranks, lambda: last_step(run) >= after)
        for rank in order:
            ranks.signal(rank, number)
            time.sleep(chance.random() / 2)

    return lab.attempt(world, harm, codes={code})


def ctrl_c_twice(lab: Lab, chance: random.Random) -> Result:
    """The second one ends a rank that waits for ever, as nothing else would before the watchdog."""

    def harm(ranks: Ranks, run: Path) -> None:
        _wait_until(ranks, lambda: last_step(run) >= 6)
        time.sleep(1)
        for _ in range(2):
            for rank in range(2):
                ranks.signal(rank, signal.SIGINT)
            time.sleep(1)

    return lab.attempt(2, harm, codes={INTERRUPTED}, harm=partial(_sleep_for_ever, step=7))


def full_disk(lab: Lab, chance: random.Random) -> Result:
    """A file system of 8 MB fills up while the run trains; there is room again before the second start."""
    disk = lab.folder / f"disk-{time.monotonic_ns()}"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], check=True)
    ballast = disk / "ballast"

    def fill(ranks: Ranks, run: Path) -> None:
        after = chance.randrange(5, 15)
        _wait_until(ranks, lambda: last_step(run) >= after)
        with suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 12))

    try:
        return lab.attempt(2, fill, codes={2, TRY_AGAIN}, run=disk / "run", between=lambda run: ballast.unlink())
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def read_only_disk(lab: Lab, chance: random.Random) -> Result:
    disk = lab.folder / f"disk-{time.monotonic_ns()}"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(disk)], check=True)

    def remount(how: str) -> None:
        subprocess.run(["mount", "-i", "-o", f"remount,{how}", str(disk)], check=True)

    def freeze(ranks: Ranks, run: Path) -> None:
        _wait_until(ranks, lambda: last_step(run) >= 5)
        for _ in range(200):  # refused while somebody has a file open for writing
            if not subprocess.run(["mount", "-i", "-o", "remount,ro", str(disk)], capture_output=True).returncode:
                return
            time.sleep(0.01)
        raise AssertionError("the file system could not be made read-only")

    try:
        return lab.attempt(2, freeze, codes={2, TRY_AGAIN}, run=disk / "run", between=lambda run: remount("rw"))
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def damaged_checkpoint(lab: Lab, chance: random.Random, *, damage: str) -> Result:
    """All ranks are killed, and the newest checkpoint is not what it was."""
    after = chance.randrange(10, 36)

    def harm(ranks: Ranks, run: Path) -> None:
        _wait_until(ranks, lambda: last_step(run) >= after)
        ranks.kill()

    def between(run: Path) -> None:
        newest = sorted((run / "checkpoints").glob("step-*"))[-1]
        if damage == "flipped byte":
            path = chance.choice(sorted(newest.iterdir()))
            content = bytearray(path.read_bytes())
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
            path.write_bytes(content)
        elif damage == "missing file":
            chance.choice(sorted(newest.iterdir())).unlink()
        else:
            (run / "checkpoints" / "latest").write_text("")

    return lab.attempt(2, harm, codes={KILLED}, between=between)


def asleep_for_ever(lab: Lab, chance: random.Random, *, stopped: bool) -> Result:
    """A rank that never comes to a collective: asleep in it, or stopped by the system. The watchdog ends all."""
    victim = chance.randrange(2)

    def harm(ranks: Ranks, run: Path) -> None:
        if not stopped:
            return
        _wait_until(ranks, lambda: last_step(run) >= 7)
        ranks.signal(victim, signal.SIGSTOP)
        for rank in {0, 1} - {victim}:
            ranks.processes[rank].join(60)
        ranks.kill(victim)

    start = {} if stopped else {"harm": partial(_sleep_for_ever, step=chance.randrange(3, 30), victim=victim)}
    codes = LOST if stopped else {TRY_AGAIN}
    return lab.attempt(2, harm, codes=codes, overrides=("guard.stall_seconds=4",), **start)


def not_a_number(lab: Lab, chance: random.Random) -> Result:
    """Three steps in a row whose loss is no number on one rank: the run ends and goes on from the last checkpoint."""
    step = chance.randrange(3, 30)
    harm = partial(_no_number, first=step, victim=chance.randrange(2))
    return lab.attempt(2, lambda ranks, run: None, codes={1}, harm=harm, between=_forget_refused)


def flipped_weight(lab: Lab, chance: random.Random) -> Result:
    """One bit of one weight of one rank."""
    harm = partial(_flip_weight, step=chance.randrange(3, 30), victim=chance.randrange(2))
    return lab.attempt(2, lambda ranks, run: None, codes={TRY_AGAIN}, harm=harm)


def jumping_clock(lab: Lab, chance: random.Random, *, killed: bool) -> Result:
    """The ranks' clocks jump by days, forwards and back, and nothing notices; ``killed``: but a SIGKILL of all."""
    stamp = lab.folder / "faketime"
    stamp.write_text("+0")

    def harm(ranks: Ranks, run: Path) -> None:
        _wait_until(ranks, lambda: last_step(run) >= 2)  # before it ninja compares the times of files
        for jump in cycle(("+3d", "-2d", "+0", "+400d")):
            temporary = stamp.with_suffix(".new")
            temporary.write_text(jump)
            temporary.replace(stamp)
            time.sleep(0.1)
            if killed and last_step(run) >= 9:
                ranks.kill()
            if not ranks.alive():
                return

    # No machine's monotonic clock jumps: gloo and the system count on it.
    environment = {"LD_PRELOAD": str(FAKETIME), "FAKETIME_TIMESTAMP_FILE": str(stamp), "FAKETIME_NO_CACHE": "1"}
    environment |= {"DONT_FAKE_MONOTONIC": "1", "NO_FAKE_STAT": "1"}
    return lab.attempt(2, harm, codes={KILLED} if killed else {0}, command=True, environment=environment)


def wandb_away(lab: Lab, chance: random.Random, *, how: str) -> Result:
    """An online run whose server refuses, takes connections and never answers, is slow, or goes away."""
    online = ("monitor.wandb=online", "monitor.init_seconds=3", "monitor.finish_seconds=2")
    with ExitStack() as stack:
        if how in ("refuses", "never answers"):
            url = stack.enter_context(unreachable(listening=how == "never answers"))
        else:
            server = stack.enter_context(wandb_server(delay=2.0 if how == "is slow" else 0.0))
            url = server.url

        def harm(ranks: Ranks, run: Path) -> None:
            if how == "goes away":
                _wait_until(ranks, lambda: last_step(run) >= 9)
                server.answering.clear()

        environment = environment_of(url)
        return lab.attempt(2, harm, codes={0}, overrides=online, environment=environment)


def _moment(lab: Lab, world: int, chance: random.Random) -> float:
    """Seconds into a start, its first imports and the first steps of all included."""
    lab.unbroken(world)
    return chance.uniform(0.05, 0.95) * lab.seconds[world]


def _sleep_while_alive(ranks: Ranks, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while ranks.alive() and time.monotonic() < deadline:
        time.sleep(0.005)


def _wait_until(ranks: Ranks, happened: Callable[[], bool], pause: float = 0.01, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        if not ranks.alive() or time.monotonic() > deadline:
            return  # the comparison finds out
        time.sleep(pause)


def _forget_refused(run: Path) -> None:
    assert len((run / "nonfinite.jsonl").read_text().splitlines()) == 6
    for line in (run / "nonfinite.jsonl").read_text().splitlines():
        assert json.loads(line)["images"]


def _around_steps(change: Callable[[int, Any, Any], None]) -> None:
    """Have ``change(step, engine, batch)`` called before each step."""
    from tracekin.train import loop

    original = loop.train_step

    def changed(engine: Any, target: Any, batch: Any, miner: Any, **context: Any) -> Any:
        change(context["step"], engine, batch)
        return original(engine, target, batch, miner, **context)

    loop.train_step = changed


def _sleep_for_ever(rank: int, step: int, victim: int = 0) -> None:
    """At a gather of the batch norm, in the middle of a step."""
    from tracekin.distributed import collectives

    reached = False
    gather = collectives.gather

    def asleep(*args: Any, **kwargs: Any) -> Any:
        if reached:
            time.sleep(10_000)
        return gather(*args, **kwargs)

    def note(now: int, engine: Any, batch: Any) -> None:
        nonlocal reached
        reached = rank == victim and now == step

    collectives.gather = asleep
    _around_steps(note)


def _no_number(rank: int, first: int, victim: int) -> None:
    def harm(step: int, engine: Any, batch: Any) -> None:
        if rank == victim and first <= step < first + 3:
            batch.views[0, 0, 0, 0, 0] = math.nan

    _around_steps(harm)


def _flip_weight(rank: int, step: int, victim: int) -> None:
    import torch

    def harm(now: int, engine: Any, batch: Any) -> None:
        if rank == victim and now == step:
            weight = engine.module.predictor_last.weight.detach().view(torch.int32)
            weight[0, 0] ^= 1 << 12

    _around_steps(harm)


FAULTS = [
    Fault("SIGKILL of one rank, at random", kill_one_at_random, 10, 1),
    Fault("SIGKILL of all ranks, at random", kill_all_at_random, 10),
    Fault("SIGKILL of rank 0 inside a save", partial(kill_inside_a_save, everyone=False), 4),
    Fault("SIGKILL of all ranks inside a save", partial(kill_inside_a_save, everyone=True), 4, 1),
    Fault("TERM, skewed between ranks", partial(skewed_signals, number=signal.SIGTERM, code=TRY_AGAIN), 4, 0, 0),
    Fault("USR2, skewed between ranks", partial(skewed_signals, number=signal.SIGUSR2, code=TRY_AGAIN), 4, 1, 0),
    Fault("Ctrl-C once", partial(skewed_signals, number=signal.SIGINT, code=INTERRUPTED), 2, 0, 0),
    Fault("Ctrl-C twice while a rank hangs", ctrl_c_twice, 2, 1),
    Fault("checkpoint with one flipped bit", partial(damaged_checkpoint, damage="flipped byte"), 4, 1, 3 * INTERVAL),
    Fault("checkpoint that lacks a file", partial(damaged_checkpoint, damage="missing file"), 3, 0, 3 * INTERVAL),
    Fault("empty latest", partial(damaged_checkpoint, damage="empty latest"), 1),
    Fault("full disk during a save", full_disk, 3),
    Fault("disk made read-only", read_only_disk, 2),
    Fault("rank asleep for ever in a collective", partial(asleep_for_ever, stopped=False), 3, 1),
    Fault("rank stopped (SIGSTOP)", partial(asleep_for_ever, stopped=True), 2),
    Fault("clock that jumps", partial(jumping_clock, killed=False), 1),
    Fault("SIGKILL of all ranks, clock jumps", partial(jumping_clock, killed=True), 1),
    Fault("W&B refuses", partial(wandb_away, how="refuses"), 1),
    Fault("W&B never answers", partial(wandb_away, how="never answers"), 1),
    Fault("W&B is slow", partial(wandb_away, how="is slow"), 1),
    Fault("W&B goes away", partial(wandb_away, how="goes away"), 1),
    Fault("loss that is no number, three steps", not_a_number, 3, 1),
    Fault("flipped bit in a rank's weight", flipped_weight, 3),
]


def lacking(fault: Fault) -> str:
    """What this machine lacks for a fault; empty for nothing."""
    if fault.attempt in (full_disk, read_only_disk) and (os.geteuid() or not shutil.which("mount")):
        return "root, to mount a small file system"
    if "clock" in fault.name and FAKETIME is None:
        return "libfaketime (Debian, Ubuntu: apt-get install faketime)"
    return ""
