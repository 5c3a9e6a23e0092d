"""What is done to a run from within a rank: functions of the rank, called before the command; picklable."""

import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

SAVE_OPERATIONS = 11
"""Files that a checkpoint of this run writes, and waits for on the disk, before it appears: see ``hold_in_a_save``."""


class Gate(NamedTuple):
    """A place where a rank waits until a test lets it go on."""

    path: str
    """Beside the run's folder; nothing is there yet."""

    def hold(self) -> None:
        """In the rank."""
        Path(f"{self.path}.reached").touch()
        while not Path(self.path).exists():
            time.sleep(0.01)

    def reached(self) -> bool:
        return Path(f"{self.path}.reached").exists()

    def open(self) -> None:
        Path(self.path).touch()


def around_steps(before: Callable[[int, Any, Any], None], after: Callable[[int, Any, Any], None] | None = None) -> None:
    """Have ``before(step, engine, batch)`` called before each step, and ``after`` after it."""
    from tracekin.train import loop

    original = loop.train_step

    def changed(engine: Any, target: Any, batch: Any, miner: Any, **context: Any) -> Any:
        before(context["step"], engine, batch)
        losses = original(engine, target, batch, miner, **context)
        if after:
            after(context["step"], engine, batch)
        return losses

    loop.train_step = changed


def hold_before_step(rank: int, step: int, gate: Gate) -> None:
    """All ranks wait."""

    def hold(now: int, engine: Any, batch: Any) -> None:
        if now == step:
            gate.hold()

    around_steps(hold)


def hold_in_a_save(rank: int, step: int, operation: int, gate: Gate) -> None:
    """In the first save of ``step`` or a later one, at a file that it writes or waits for, by number from 0."""
    from tracekin import checkpoint

    done = 0

    def held(original: Callable[..., Any], *args: Any) -> Any:
        nonlocal done
        partial_folder = next((p for p in [args[-1], *args[-1].parents] if p.name.startswith(".step-")), None)
        if partial_folder and int(partial_folder.name.split(".")[1].removeprefix("step-")) >= step:
            if done == operation:
                gate.hold()
            done += 1
        return original(*args)

    for name in ("save_file", "flush"):
        setattr(checkpoint, name, partial(held, getattr(checkpoint, name)))


def sleep_for_ever(rank: int, step: int, victim: int = 0) -> None:
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
    around_steps(note)


def no_number(rank: int, first: int, victim: int) -> None:
    """One pixel, in three steps."""

    def harm(step: int, engine: Any, batch: Any) -> None:
        if rank == victim and first <= step < first + 3:
            batch.views[0, 0, 0, 0, 0] = math.nan

    around_steps(harm)


def flip_weight(rank: int, step: int, victim: int) -> None:
    """One bit of one weight, right after a step."""
    import torch

    def nothing(now: int, engine: Any, batch: Any) -> None:
        pass

    def harm(now: int, engine: Any, batch: Any) -> None:
        if rank == victim and now == step:
            weight = engine.module.predictor_last.weight.detach().view(torch.int32)
            weight[0, 0] ^= 1 << 12

    around_steps(nothing, harm)
