"""What mining sends between GPUs: a formula, what the code counts in worlds of 8 to 1,024 ranks, and a table.

Not a command of its own: `benchmarks.mining_scale` runs it. A world is a value: torch's fake process group has all its
ranks but one in name only, and the real exchange runs on that one; what it receives has the right size, not content.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

# Private, but torch's own tests of collectives stand on it, and nothing public simulates a world.
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.harness import seconds
from benchmarks.steps import build_step
from tracekin.config import Config, MiningConfig
from tracekin.distributed.collectives import open_group
from tracekin.distributed.world import World
from tracekin.influence.candidates import Candidates
from tracekin.influence.gradients import Factors
from tracekin.monitor.metrics import Clock
from tracekin.train.exchange import Exchange

NEVER = 1 << 40  # columns above which a ring is used
SKETCH = 512
NODE = 8
MODES: dict[str, dict[str, Any]] = {
    "exact": {"ring_above": NEVER},
    "bf16": {"ring_above": NEVER, "transport": "bf16"},
    f"sketch {SKETCH}": {"ring_above": NEVER, "sketch_dim": SKETCH},
    "node": {"ring_above": NEVER, "pool": "node"},
    "ring": {"ring_above": 0},
}
"""By name, the keys of ``mining`` that differ from the defaults."""
WORLDS = (8, 16, 64, 256, 1024)
SPEEDS = (25, 50, 400)
"""GB/s that reach a GPU: a 200 and a 400 Gbit/s network card each, NVLink."""
SHARE = 0.01
"""Of a step: what the transfer may cost."""
VIEWS = 2


class Shape(NamedTuple):
    """Of one rank's rows."""

    rows: int = 256
    hidden: int = 4096
    projection: int = 256
    labels: int = 5


def received_bytes(mode: str, gpus: int, shape: Shape) -> int:
    """What a rank receives in a step, by arithmetic that shares nothing with the code that counts.

    A gather's buffer counts whole, the rank's own share included; of a ring the blocks of the others.
    """
    images = shape.rows * (min(gpus, 8) if mode == "node" else gpus)
    width = min(512, shape.hidden) if mode.startswith("sketch") else shape.hidden
    number = 2 if mode == "bf16" else 4
    activations = (images - shape.rows if mode == "ring" else images) * 2 * width * number
    deltas = images * 2 * shape.projection * number
    targets = images * 2 * shape.projection * 4
    identity = images * (8 + 8 + 4 * shape.labels)  # image, group, labels
    return activations + deltas + targets + identity


def draw_rows(shape: Shape, rank: int) -> Candidates:
    """A rank's candidates in fp32; the activations of image n are all n, so that what arrives can be recognised."""
    ids = torch.arange(shape.rows) + rank * shape.rows
    hidden_BVH = ids[:, None, None].expand(-1, VIEWS, shape.hidden).float()
    target_BVD = torch.zeros(shape.rows, VIEWS, shape.projection)
    return Candidates(
        (Factors(hidden_BVH, target_BVD),), target_BVD, ids, ids // 2, torch.zeros(len(ids), shape.labels)
    )


class Received(NamedTuple):
    """Of one step on one rank."""

    bytes: int
    """As the exchange counts them."""
    columns: int
    """Different columns that its blocks held."""
    right: int
    """Of them, those whose activations are their image's (where these travel unsketched)."""


def receive(mode: str, shape: Shape, local_size: int) -> Received:
    """One step's exchange in the process group that exists. Collective."""
    mining = MiningConfig(**MODES[mode])
    exchange = Exchange(mining, open_group(mining.pool, local_size))
    rows = draw_rows(shape, dist.get_rank())
    exchange.send(rows.factors[0].hidden)
    columns = exchange.gather(rows)
    arrived: dict[int, bool] = {}
    for start, block in exchange.blocks(columns):
        right_C = block.factors[0].hidden[:, 0, 0] == block.ids
        arrived |= {start + place: right for place, right in enumerate(right_C.tolist())}
    return Received(exchange.traffic.bytes, len(arrived), sum(arrived.values()))


def receive_every(rank: int, shape: Shape) -> dict[str, Received]:
    """Every mode on this rank of a real process group whose ranks are one node."""
    return {mode: receive(mode, shape, dist.get_world_size()) for mode in MODES}


@contextmanager
def simulated_world(gpus: int) -> Iterator[None]:
    """This process is the last of ``gpus`` ranks; there are no others."""
    dist.init_process_group("fake", rank=gpus - 1, world_size=gpus, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def count_in_worlds(shape: Shape, worlds: tuple[int, ...] = WORLDS) -> dict[str, dict[str, dict[str, Any]]]:
    """By mode and number of GPUs: bytes by ``formula``, ``counted`` bytes, their ``ratio``, and whether all arrived.

    Ranks of large worlds have fewer rows, so that every pool has the columns of the smallest; what they count is scaled
    to ``shape.rows``.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {mode: {} for mode in MODES}
    held = worlds[0] * shape.rows
    for gpus in worlds:
        few = shape._replace(rows=max(1, held // gpus))
        pool = {mode: few.rows * (NODE if mode == "node" else gpus) for mode in MODES}
        with simulated_world(gpus):
            for mode in MODES:
                received = receive(mode, few, NODE)
                counted = received.bytes * shape.rows / few.rows
                formula = received_bytes(mode, gpus, shape)
                complete = received.columns == pool[mode]
                found[mode][str(gpus)] = _compared(formula, counted, complete)
    return found


def check_ranks(received: list[dict[str, Received]], shape: Shape) -> dict[str, dict[str, Any]]:
    """What real ranks received, by mode: the worst rank against the formula, and whether the right data arrived."""
    found = {}
    for mode in MODES:
        formula = received_bytes(mode, len(received), shape)
        of_mode = [one[mode] for one in received]
        counted = max((one.bytes for one in of_mode), key=lambda value: abs(value - formula))
        pool = len(received) * shape.rows
        sketched = MODES[mode].get("sketch_dim", 0)
        complete = all(one.columns == pool and (sketched or one.right == pool) for one in of_mode)
        found[mode] = _compared(formula, counted, complete)
    return found


def _compared(formula: int, counted: float, complete: bool) -> dict[str, Any]:
    return {"formula": formula, "counted": counted, "complete": complete, "ratio": counted / formula}


def cpu_step_seconds(rank: int, config: Config, threads: int, repeats: int = 3) -> float:
    """Median seconds of plain BYOL's step on one CPU process; a process group must exist."""
    torch.set_num_threads(threads)
    step, clock = build_step(config, torch.device("cpu"), World()), Clock(torch.device("cpu"))
    step("none", clock)
    return median(seconds(lambda: step("none", clock)) for _ in range(repeats))


def transfers(shape: Shape, step_seconds: float) -> list[dict[str, Any]]:
    """By number of GPUs, mode and speed: seconds of the transfer, its share of the step, the shortest step it suits."""
    rows = []
    for gpus in WORLDS:
        for mode in MODES:
            received = received_bytes(mode, gpus, shape)
            times = {speed: received / (speed * 1e9) for speed in SPEEDS}
            rows.append(
                {
                    "gpus": gpus,
                    "mode": mode,
                    "bytes": received,
                    "seconds": times,
                    "share": {speed: time / step_seconds for speed, time in times.items()},
                    "shortest_step_seconds": {speed: time / SHARE for speed, time in times.items()},
                }
            )
    return rows


def table(rows: list[dict[str, Any]]) -> list[str]:
    """80 columns."""
    lines = [
        f"{'':21}" + "".join(f" |{f'{speed} GB/s':^17}" for speed in SPEEDS),
        f"{'GPUs':>4} {'mode':<10} {'MB':>5}" + f" |{'ms':>5} {'%':>4}  {'s':>5}" * len(SPEEDS),
    ]
    for row in rows:
        cells = "".join(
            f" |{_three(1e3 * row['seconds'][speed]):>5} {_percent(row['share'][speed]):>5}"
            f" {_three(row['shortest_step_seconds'][speed]):>5}"
            for speed in SPEEDS
        )
        lines.append(f"{row['gpus']:>4} {row['mode']:<10} {_three(row['bytes'] / 1e6):>5}{cells}")
    return lines


def reach(rows: list[dict[str, Any]]) -> dict[str, dict[int, int]]:
    """By mode and speed, the most GPUs for which the transfer stays within the share; 0 where that is out of reach."""
    return {
        mode: {
            speed: max((r["gpus"] for r in rows if r["mode"] == mode and r["share"][speed] <= SHARE), default=0)
            for speed in SPEEDS
        }
        for mode in MODES
    }


def _three(value: float) -> str:
    """Three digits, at most five characters below 100,000."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def _percent(share: float) -> str:
    """``1.00!`` where it is above the bound."""
    text = _three(100 * share) if share < 9.995 else ">999"
    return text + ("!" if share > SHARE else " ")
