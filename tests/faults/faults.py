"""The faults: each is a function that makes one try in a ``Lab`` and returns what became of it."""

import os
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

from tests.faults.disks import full_for_a_checkpoint, full_for_a_line, read_only
from tests.faults.harm import SAVE_OPERATIONS, Gate, flip_weight, hold_in_a_save, no_number, sleep_for_ever
from tests.faults.ranks import Ranks, Torchrun, ended
from tests.faults.trial import INTERVAL, Chance, Form, Lab, Result, last_step, lines
from tests.faults.waiting import wait_until
from tests.launch.wandb_server import environment_of, unreachable, wandb_server
from tracekin import checkpoint

TRY_AGAIN, INTERRUPTED = 75, 130
KILLED = -9
LOST = {KILLED, TRY_AGAIN}
FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)


class Fault(NamedTuple):
    name: str
    attempt: Callable[[Lab, Chance], Result]
    tries: int
    """In make faults."""
    quick: int = 0
    """In make test."""
    most_lost: int = 2 * INTERVAL
    """Steps that it may cost: an interval, and the steps while a checkpoint was still being written."""


def kill_at_random(lab: Lab, chance: Chance, *, everyone: bool) -> Result:
    """At a moment of a start, its first imports and the first steps included; if the run was faster, at an earlier."""
    form = chance.form(2, 3, 4)
    lab.unbroken(form)
    moment, victim = chance.uniform(0.05, 0.95) * lab.seconds[form], chance.randrange(form.ranks)

    def harm(ranks: Ranks, run: Path) -> None:
        deadline = time.monotonic() + moment
        while ranks.alive() and time.monotonic() < deadline:
            time.sleep(0.005)
        ranks.kill(*(() if everyone else (victim,)))
        if not lines(run, "starts.jsonl"):  # they may not have met: a launcher ends those that still wait for it
            ranks.end_after(10)

    while True:
        result = lab.attempt(form, harm, codes={KILLED, 0} if everyone else LOST | {0})
        if KILLED in result.codes or not result.survived:
            return result
        moment /= 2


def kill_inside_a_save(lab: Lab, chance: Chance, *, everyone: bool) -> Result:
    """Rank 0, which writes, or all: while it writes one of the files, or waits for one on the disk."""
    gate = Gate(str(lab.new("gate")))
    held = partial(hold_in_a_save, step=chance.randrange(1, 30), operation=chance.randrange(SAVE_OPERATIONS), gate=gate)

    def harm(ranks: Ranks, run: Path) -> None:
        wait_until(ranks, gate.reached)
        time.sleep(chance.random() / 5)  # the steps go on meanwhile
        ranks.kill(*(() if everyone else (0,)))
        assert list((run / "checkpoints").glob(".step-*.partial")), "no save was under way"

    return lab.attempt(chance.form(2), harm, codes=LOST, harm=held)


def skewed_signals(lab: Lab, chance: Chance, *, number: int, code: int) -> Result:
    """Ranks hear of it one after another, up to half a second apart, the last one maybe never."""
    form, after = chance.form(2, 4), chance.randrange(1, 25)
    order = chance.sample(range(form.ranks), form.ranks)

    def harm(ranks: Ranks, run: Path) -> None:
        wait_until(ranks, lambda: last_step(run) >= after)
        for rank in order:
            ranks.signal(rank, number)
            time.sleep(chance.random() / 2)

    return lab.attempt(form, harm, codes={code})


def ctrl_c_twice(lab: Lab, chance: Chance) -> Result:
    """The second one ends a rank that waits for ever, as nothing else would before the watchdog."""

    def harm(ranks: Ranks, run: Path) -> None:
        wait_until(ranks, lambda: last_step(run) >= 6)
        time.sleep(1)
        for _ in range(2):
            for rank in range(2):
                ranks.signal(rank, signal.SIGINT)
            time.sleep(1)

    return lab.attempt(chance.form(2), harm, codes={INTERRUPTED}, harm=partial(sleep_for_ever, step=7))


def ctrl_c_through_torchrun(lab: Lab, chance: Chance) -> Result:
    """One Ctrl-C at a terminal: the ranks save and end by themselves, in the time that torchrun gives them."""
    run, after = lab.new("run"), chance.randrange(1, 25)
    stopped: list[list[str]] = []

    def ctrl_c(torchrun: Torchrun, run: Path) -> None:
        wait_until(torchrun, lambda: last_step(run) >= after, seconds=100)
        torchrun.ctrl_c()

    def between(run: Path) -> None:
        stopped.append([path.name for path in checkpoint.complete(run)])

    form = chance.form(2)
    result = lab.attempt(form, ctrl_c, codes={1}, run=run, between=between, launcher=Torchrun)
    for rank in range(form.ranks):
        result.must(ended(rank, INTERRUPTED) in result.said[0], f"rank {rank} did not end by itself with {INTERRUPTED}")
        result.must(ended(rank, 0) in result.said_again[0], f"rank {rank} did not go on to the end")
    result.must(stopped[0][-1] == f"step-{result.done:08d}", f"{result.done} steps were done, and saved {stopped[0]}")
    ends = [(line["outcome"], line["step"]) for line in lines(run, "starts.jsonl") if line["event"] == "end"]
    result.must(ends == [("interrupted", result.done), ("finished", 40)], f"starts.jsonl says {ends}")
    return result


def damaged_checkpoint(lab: Lab, chance: Chance, *, damage: str) -> Result:
    """All ranks are killed, and the newest checkpoint is not what it was."""
    after = chance.randrange(10, 30)

    def harm(ranks: Ranks, run: Path) -> None:
        wait_until(ranks, lambda: last_step(run) >= after)
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

    return lab.attempt(chance.form(2), harm, codes={KILLED}, between=between)


def asleep_for_ever(lab: Lab, chance: Chance) -> Result:
    """A rank that sleeps before a collective. The watchdog ends all."""
    asleep = partial(sleep_for_ever, step=chance.randrange(3, 30), victim=chance.randrange(2))
    impatient = ("guard.stall_seconds=4",)
    form = chance.form(2)
    return lab.attempt(form, lambda ranks, run: None, codes={TRY_AGAIN}, overrides=impatient, harm=asleep)


def stopped_for_ever(lab: Lab, chance: Chance) -> Result:
    """A rank that the system has stopped. The watchdog ends the others; it is killed, as a launcher does."""
    victim = chance.randrange(2)

    def harm(ranks: Ranks, run: Path) -> None:
        wait_until(ranks, lambda: last_step(run) >= 7)
        ranks.signal(victim, signal.SIGSTOP)
        ranks.processes[1 - victim].join(60)
        assert ranks.processes[1 - victim].exitcode == TRY_AGAIN, "the watchdog did not end the other rank"
        ranks.kill(victim)

    return lab.attempt(chance.form(2), harm, codes=LOST, overrides=("guard.stall_seconds=4",))


def not_a_number(lab: Lab, chance: Chance) -> Result:
    """Three steps in a row whose loss is no number on one rank: the run ends and goes on from the last checkpoint."""
    run, step = lab.new("run"), chance.randrange(3, 30)
    harm = partial(no_number, first=step, victim=chance.randrange(2))

    def refused_are_named(run: Path) -> None:
        named = [(line["step"], line["rank"], len(line["images"])) for line in lines(run, "nonfinite.jsonl")]
        assert named == [(s + 1, rank, 12) for s in range(step, step + 3) for rank in range(2)], named

    result = lab.attempt(
        chance.form(2), lambda ranks, run: None, codes={1}, run=run, harm=harm, between=refused_are_named
    )
    stay = [line["step"] for line in lines(run, "nonfinite.jsonl")]
    result.must(not stay, f"nonfinite.jsonl still names steps that were accepted after all: {stay}")
    return result


def flipped_weight(lab: Lab, chance: Chance, *, stage: int | None = None) -> Result:
    """One bit of one weight of one rank, after a step. At ZeRO 1 and 2 it lasts until the next step's end alone."""
    form, step = chance.form(2), chance.randrange(3, 30)
    if stage is None:  # right before a save, which compares
        step = step // INTERVAL * INTERVAL + INTERVAL - 1
    else:
        form = Form(form.ranks, stage)
    harm = partial(flip_weight, step=step, victim=chance.randrange(2))
    return lab.attempt(form, lambda ranks, run: None, codes={TRY_AGAIN}, harm=harm)


def jumping_clock(lab: Lab, chance: Chance, *, killed: bool) -> Result:
    """The ranks' clocks jump by days, forwards and back, and nothing notices; ``killed``: but a SIGKILL of all."""
    stamp = lab.folder / "faketime"
    stamp.write_text("+0")

    def harm(ranks: Ranks, run: Path) -> None:
        wait_until(ranks, lambda: last_step(run) >= 2)  # before it ninja compares the times of files
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
    codes = {KILLED} if killed else {0}
    return lab.attempt(chance.form(2), harm, codes=codes, command=True, environment=environment)


def wandb_away(lab: Lab, chance: Chance, *, how: str) -> Result:
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
                wait_until(ranks, lambda: last_step(run) >= 9)
                server.answering.clear()

        form, environment = chance.form(2), environment_of(url)
        return lab.attempt(form, harm, codes={0}, overrides=online, environment=environment)


FAULTS = [
    Fault("SIGKILL of one rank, at random", partial(kill_at_random, everyone=False), 8, 1),
    Fault("SIGKILL of all ranks, at random", partial(kill_at_random, everyone=True), 6),
    Fault("SIGKILL of rank 0 inside a save", partial(kill_inside_a_save, everyone=False), 4),
    Fault("SIGKILL of all inside a save", partial(kill_inside_a_save, everyone=True), 5, 1),
    Fault("TERM, skewed between ranks", partial(skewed_signals, number=signal.SIGTERM, code=TRY_AGAIN), 4, 0, 0),
    Fault("USR2, skewed between ranks", partial(skewed_signals, number=signal.SIGUSR2, code=TRY_AGAIN), 4, 1, 0),
    Fault("Ctrl-C once", partial(skewed_signals, number=signal.SIGINT, code=INTERRUPTED), 2, 0, 0),
    Fault("Ctrl-C through torchrun", ctrl_c_through_torchrun, 2, 0, 0),
    Fault("Ctrl-C twice while a rank hangs", ctrl_c_twice, 2),
    Fault("checkpoint with one flipped bit", partial(damaged_checkpoint, damage="flipped byte"), 4, 1, 3 * INTERVAL),
    Fault("checkpoint that lacks a file", partial(damaged_checkpoint, damage="missing file"), 3, 0, 3 * INTERVAL),
    Fault("empty latest", partial(damaged_checkpoint, damage="empty latest"), 1),
    Fault("no room for a checkpoint", full_for_a_checkpoint, 2),
    Fault("no room for a line of metrics", full_for_a_line, 1),
    Fault("no room at the next start either", partial(full_for_a_checkpoint, again=True), 1),
    Fault("disk made read-only", read_only, 2),
    Fault("rank asleep in a collective", asleep_for_ever, 3, 1),
    Fault("rank stopped (SIGSTOP)", stopped_for_ever, 2),
    Fault("clock that jumps", partial(jumping_clock, killed=False), 1),
    Fault("SIGKILL of all, clock jumps", partial(jumping_clock, killed=True), 1),
    Fault("W&B refuses", partial(wandb_away, how="refuses"), 1),
    Fault("W&B never answers", partial(wandb_away, how="never answers"), 1),
    Fault("W&B is slow", partial(wandb_away, how="is slow"), 1),
    Fault("W&B goes away", partial(wandb_away, how="goes away"), 1),
    Fault("loss that is no number, 3 steps", not_a_number, 3, 1),
    Fault("weight's bit flipped, ZeRO 0", partial(flipped_weight, stage=0), 2),
    Fault("weight's bit flipped at a save", flipped_weight, 3),
]


def lacking(fault: Fault) -> str:
    """What this machine lacks for a fault; empty for nothing."""
    if ("room" in fault.name or "disk" in fault.name) and (os.geteuid() or not shutil.which("mount")):
        return "root, to mount a small file system"
    if "clock" in fault.name and FAKETIME is None:
        return "libfaketime (Debian, Ubuntu: apt-get install faketime)"
    return ""
