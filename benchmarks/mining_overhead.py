"""Mining adds <= 3 % to the step of plain BYOL: ResNet-18, 64 px, global batch 256, 2 CPU ranks.

    python -m benchmarks.mining_overhead [key=value ...]

Two ranks of one thread each train through DeepSpeed in bf16, as the default configuration says, on a synthetic batch. A
step is what a run pays for: the optimiser step, and what the training loop computes beside it for its log. Steps
without and with mining alternate on the same engine, plain first and mined first by turns. `ratio` is the median of
mined over plain in each pair; exit code 1 says that it exceeds the bound for one of the policies in `bounded`. Of the
costlier policies (several layers, older checkpoints, two scores) the price is printed.

A machine's noise is of the bound's own size. So the median's standard error is printed (1.2533 IQR / 1.349 / sqrt n),
and `uncertain` names the bounded policies whose bound lies within two of it: there another run may decide otherwise.
`estimate` hardly sees the noise: 1 + (median seconds of the mining phase + of the mined loss term + of what the log
takes more) / median seconds of the plain step. Its phases include waiting for the other rank, but not what the hidden
activations cost while they travel beside the target network.
The machine should do nothing else: about ten minutes on 2 cores.
"""

import sys
from typing import Any, get_args

import torch

from benchmarks.harness import arguments, finish
from benchmarks.ranks import run_ranks
from benchmarks.steps import build_step, compare_with_plain, mined_term_seconds, summarise, table
from tracekin.config import Config, Policy, UserError, load
from tracekin.distributed import collectives
from tracekin.distributed.world import World

BOUND = 1.03
RANKS = 2
POLICIES = tuple(policy for policy in get_args(Policy) if policy != "none")
CPU = torch.device("cpu")
SHOWN = ("ranks", "overrides", "mined_term_seconds", "bound", "uncertain", "holds")


def measure(rank: int, config: Config, budget: float, most_pairs: int, threads: int = 1) -> dict[str, Any]:
    """Every policy against plain BYOL on this rank; rank 0's clock is the one to read. A gloo group must exist."""
    torch.set_num_threads(threads)
    world = World(rank, collectives.world_size(), rank, collectives.world_size())
    found = compare_with_plain(build_step(config, CPU, world), POLICIES, CPU, budget=budget, most_pairs=most_pairs)
    images = config.train.global_batch // world.size
    return summarise(found, mined_term_seconds(config, images, config.train.global_batch, CPU), BOUND)


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(threads=1)
    parser.add_argument("--pairs", type=int, default=80, help="most pairs of steps a policy (%(default)s)")
    parser.add_argument("--seconds", type=float, default=480, help="for all pairs together (%(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the default configuration")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    try:
        config = load(Config, None, options.overrides)
    except UserError as error:
        parser.error(str(error))
    jobs = (config, options.seconds, options.pairs, options.threads)
    found = run_ranks(measure, RANKS, *jobs, timeout=10 * options.seconds + 600)[0]
    result = {"ranks": RANKS, "overrides": options.overrides, **found}
    print(*table(result), "", sep="\n")
    finish("mining_overhead", result, save=options.save, shown=SHOWN)
    sys.exit(0 if result["holds"] else 1)


if __name__ == "__main__":
    main()
