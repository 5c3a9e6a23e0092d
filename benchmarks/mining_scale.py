"""Mining up to 65,536 columns: linear time, <= 512 MiB beyond the pool, bytes as a formula says; what they cost a step.

    python -m benchmarks.mining_scale

One rank's 256 rows choose by TracIn from a pool that exists: two views, activations of 4096, projections of 256, fp32.

- Time: the log-log slope of seconds over columns from 4096 columns up is within 0.1 of 1. Sizes and modes alternate.
- Memory: what one call adds to torch's CPU allocator at its peak stays <= 512 MiB, for a pool in fp32, for one in bf16
  (transport=bf16), and round a ring. A ring rank has no pool beforehand: all that it receives counts, the targets,
  deltas and ids of everybody and at most three blocks of activations beside its own.
- Bytes: what the real exchange counts, in simulated worlds of 8 to 1,024 ranks and on 2 real ones, is within 2 % of a
  formula written apart (benchmarks.mining_bytes). A gather counts its whole buffer, the rank's own share included; a
  ring the blocks that it receives, one fewer.
- The table: for each number of GPUs at 256 images each, megabytes a rank receives a step, their time at 25, 50 and 400
  GB/s, its share of a measured step (! above 1 %), and the shortest step in s for which it stays within 1 %. Nothing is
  taken off for what travels while something else is computed: activations during the target's forward pass, and a
  ring's next block while this one is scored. The measured step is a GPU's where benchmarks/results has one, else one on
  this machine's CPU, which says little of a GPU's share; the shortest step holds for any.

`ratio`: the slope, the largest peak over 512 MiB, and the worst of counted bytes over the formula. Exit code 1: one of
the bounds was missed. Sizes that do not fit in memory are left out. About 75 s on 2 cores that do nothing else.
"""

import json
import math
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import arguments, finish, peak_bytes, seconds, summary
from benchmarks.mining_bytes import (
    NEVER,
    SHARE,
    VIEWS,
    Shape,
    check_ranks,
    count_in_worlds,
    cpu_step_seconds,
    reach,
    receive_every,
    simulated_world,
    table,
    transfers,
)
from benchmarks.ranks import run_ranks
from tracekin.config import Config, MiningConfig, load
from tracekin.distributed.collectives import open_group
from tracekin.influence.candidates import Block, Candidates
from tracekin.influence.gradients import Factors
from tracekin.influence.policies import choose
from tracekin.train.exchange import Exchange

SIZES = (1024, 4096, 16384, 65536)
LINEAR_FROM = 4096
MIB = 1 << 20
BOUND = {"slope_off_1": 0.1, "peak_mib": 512, "ring_blocks": 3, "bytes_off": 0.02}
SHOWN = ("left_out", "ring_blocks", "step", "bound", "holds", "ratio")
SPARE = 1 << 30
"""Bytes left for the process itself and what the calls add."""


def draw_pool(columns: int, shape: Shape) -> Candidates:
    """Random columns, drawn once and repeated: equal scores take as long as different ones."""
    drawn = min(columns, 4096)
    generator = torch.Generator().manual_seed(0)

    def repeated(width: int) -> Tensor:
        few = torch.randn(drawn, VIEWS, width, generator=generator)
        whole = torch.empty(columns, VIEWS, width)
        for start in range(0, columns, drawn):
            part = whole[start : start + drawn]
            part.copy_(few[: len(part)])
        return whole

    ids = torch.arange(columns)
    factors = Factors(repeated(shape.hidden).relu_(), repeated(shape.projection))
    return Candidates((factors,), repeated(shape.projection), ids, ids // 2, torch.zeros(columns, shape.labels))


def narrowed(pool: Candidates) -> Candidates:
    """As transport=bf16 delivers it."""
    return pool._replace(factors=tuple(Factors(*(part.bfloat16() for part in layer)) for layer in pool.factors))


def pick(rows: Candidates, blocks: Any) -> Tensor:
    # Two columns a row, as a run takes them: the runner-up says how decided a choice is.
    return choose("tracin", rows, blocks, seed=0, step=0, exclude_group=True, k=2).index


def around_ring(rows: Candidates) -> Tensor:
    """A step's exchange and choice in the world that exists, where the rank before sends noise."""
    exchange = Exchange(MiningConfig(ring_above=0), open_group("global", 1))
    exchange.send(rows.factors[0].hidden)
    return pick(rows, exchange.blocks(exchange.gather(rows)))


Call = Callable[[Callable[[Callable[[], object]], float]], float]
"""Takes a meter (``seconds``, ``peak_bytes``) and applies it to one mining."""


def calls(pool: Candidates, sizes: Sequence[int], rows: Candidates) -> dict[tuple[int, str], Call]:
    """By size and mode, what is measured."""
    narrow = narrowed(pool)

    def held(columns: Candidates) -> Call:
        return lambda meter: meter(lambda: pick(rows, [Block(0, columns)]))

    def ring(ranks: int) -> Call:
        def call(meter: Callable[[Callable[[], object]], float]) -> float:
            with simulated_world(ranks):
                return meter(lambda: around_ring(rows))

        return call

    found: dict[tuple[int, str], Call] = {}
    for size in sizes:
        found[size, "fp32"] = held(pool.part(slice(0, size)))
        found[size, "bf16"] = held(narrow.part(slice(0, size)))
        if size > len(rows.ids):
            found[size, "ring"] = ring(size // len(rows.ids))
    return found


def measure(shape: Shape, sizes: Sequence[int], rounds: int) -> dict[str, dict[str, dict[str, Any]]]:
    """By mode and size: ``seconds`` (summary) and ``peak_bytes`` of one mining."""
    pool = draw_pool(max(sizes), shape)
    rows = pool.part(slice(0, shape.rows))
    of = calls(pool, sizes, rows)
    peaks = {key: call(peak_bytes) for key, call in of.items()}  # and a warm-up
    times: dict[tuple[int, str], list[float]] = {key: [] for key in of}
    order = random.Random(0)
    for _ in range(rounds):
        for key in order.sample(list(of), len(of)):
            times[key].append(of[key](seconds))
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for (size, mode), values in times.items():
        found.setdefault(mode, {})[str(size)] = {"seconds": summary(values), "peak_bytes": peaks[size, mode]}
    return found


def ring_blocks(shape: Shape) -> float:
    """Blocks of activations that a ring rank holds at once beside its own."""
    rows = draw_pool(shape.rows, shape)

    def read(ring_above: int) -> None:
        exchange = Exchange(MiningConfig(ring_above=ring_above), open_group("global", 1))
        exchange.send(rows.factors[0].hidden)
        for _ in exchange.blocks(exchange.gather(rows)):
            pass

    ranks = 8
    with simulated_world(ranks):  # a gather holds all of them and the same small tensors
        block = rows.factors[0].hidden.nbytes
        return ranks - (peak_bytes(lambda: read(NEVER)) - peak_bytes(lambda: read(0))) / block


def slope(found: dict[str, dict[str, Any]]) -> float:
    """Least-squares slope of log seconds over log columns, from LINEAR_FROM up; NaN from a single size."""
    points = [(math.log(int(size)), math.log(one["seconds"]["median"])) for size, one in found.items()]
    points = [point for point in points if point[0] >= math.log(LINEAR_FROM)]
    if len(points) < 2:
        return math.nan
    x, y = (torch.tensor(values, dtype=torch.float64) for values in zip(*points, strict=True))
    return float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())


def fitting(sizes: Sequence[int], shape: Shape, limit: float) -> list[int]:
    """The sizes whose pool, in fp32 and in bf16, fits in ``limit`` bytes and in what the machine has free."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        free = next(1024 * float(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        free = limit
    column = VIEWS * (6 * shape.hidden + 10 * shape.projection)
    return [size for size in sizes if size * column + SPARE <= min(limit, free)]


def read_step(shape: Shape, threads: int) -> dict[str, Any]:
    """The step that transfers are compared with: the fastest GPU's on record for as many images, else this CPU's."""
    steps = []
    for path in sorted(harness.RESULTS.glob("gpu-*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        figures = record.get("resnet50_224_bf16", {})
        if figures.get("rows") == shape.rows:
            plain = next(iter(figures["policies"].values()))["plain_step_seconds"]["median"]
            steps.append({"seconds": plain, "of": f"ResNet-50, 224 px, bf16 on one {record['device']['name']}"})
    if steps:
        return min(steps, key=lambda one: float(one["seconds"]))
    config = load(Config, None, [f"train.global_batch={shape.rows}"])
    found = run_ranks(cpu_step_seconds, 1, config, threads, timeout=600)[0]
    backbone, size = config.model.backbone, config.data.image_size
    return {"seconds": found, "of": f"{backbone}, {size} px, on this CPU, {threads} threads: NO GPU WAS MEASURED"}


def print_scale(found: dict[str, dict[str, dict[str, Any]]]) -> None:
    print("one rank's rows against a pool: seconds, microseconds a column, peak MiB added")
    print(f"{'columns':>7}" + "".join(f" |{mode:^22}" for mode in found))
    for size in found["fp32"]:
        line = f"{size:>7}"
        for mode in found:
            if one := found[mode].get(size):
                each = one["seconds"]["median"] / int(size)
                line += f" |{one['seconds']['median']:8.3f}{1e6 * each:7.1f}{one['peak_bytes'] / MIB:7.1f}"
        print(line)


def print_transfers(rows: list[dict[str, Any]], step: dict[str, Any], reached: dict[str, Any]) -> None:
    print(f"\na step's transfers; %: of a step of {step['seconds']:.3g} s\n({step['of']})")
    print(f"! above {SHARE:.0%}; s: the shortest step of which the transfer is {SHARE:.0%}")
    print(*table(rows), sep="\n")
    print(f"\nmost GPUs of this step's speed within {SHARE:.0%}, of those in the table")
    for mode, speeds in reached.items():
        cells = (f"{most or 'out of reach'} at {speed} GB/s" for speed, most in speeds.items())
        print(f"{mode:<11}" + ", ".join(cells))
    print()


def summarise(found: dict[str, Any]) -> dict[str, Any]:
    """What is claimed of the measurements; the ratios last."""
    peak = max(one["peak_bytes"] for mode in found["scale"].values() for one in mode.values())
    compared = [one for mode in found["worlds"].values() for one in mode.values()] + [*found["ranks"].values()]
    worst = max((one["ratio"] for one in compared), key=lambda ratio: abs(ratio - 1))
    rising = slope(found["scale"]["fp32"])
    holds = {
        "time": abs(rising - 1) <= BOUND["slope_off_1"],
        "memory": peak <= BOUND["peak_mib"] * MIB and found["ring_blocks"] <= BOUND["ring_blocks"],
        "bytes": abs(worst - 1) <= BOUND["bytes_off"] and all(one["complete"] for one in compared),
    }
    return {
        **found,
        "bound": BOUND,
        "holds": holds,
        "ratio": {
            "slope": rising if rising == rising else None,
            "peak": peak / (BOUND["peak_mib"] * MIB),
            "counted_bytes": worst,
        },
    }


def main() -> None:
    parser = arguments(__doc__)
    for name, default in Shape()._asdict().items():
        parser.add_argument(f"--{name}", type=int, default=default, help="of one rank (%(default)s)")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="columns, multiples of the rows")
    parser.add_argument("--rounds", type=int, default=3, help="timed calls of each size and mode (%(default)s)")
    parser.add_argument("--memory", type=float, default=6.0, help="GB that it may use (%(default)s)")
    parser.add_argument("--step", type=float, help="seconds of a step to compare with, instead of a measured one")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shape = Shape(*(getattr(options, name) for name in Shape._fields))
    sizes = fitting(sorted(options.sizes), shape, 1e9 * options.memory)
    if not sizes or any(size % shape.rows for size in sizes):
        parser.error(f"accepted are --sizes that are multiples of {shape.rows} rows and fit in memory.")
    left_out = sorted(set(options.sizes) - set(sizes))
    if left_out:
        print(f"Left out, for want of memory: {', '.join(map(str, left_out))} columns; nothing is claimed of them.")
    found = measure(shape, sizes, options.rounds)
    print_scale(found)
    few = shape._replace(rows=min(shape.rows, 32))
    ranks = check_ranks(run_ranks(receive_every, 2, few), few)
    step = {"seconds": options.step, "of": "given"} if options.step else read_step(shape, options.threads)
    rows = transfers(shape, step["seconds"])
    print_transfers(rows, step, reach(rows))
    result = summarise(
        {
            **shape._asdict(),
            "left_out": left_out,
            "scale": found,
            "ring_blocks": ring_blocks(shape),
            "worlds": count_in_worlds(shape),
            "ranks": ranks,
            "step": step,
            "transfers": rows,
            "reach": reach(rows),
        }
    )
    finish("mining_scale", result, save=options.save, shown=SHOWN)
    sys.exit(0 if all(result["holds"].values()) else 1)


if __name__ == "__main__":
    main()
