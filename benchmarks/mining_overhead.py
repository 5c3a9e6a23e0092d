"""Mining adds <= 3 % to the step of plain BYOL: ResNet-18, 64 px, global batch 256, 2 CPU ranks.

    python -m benchmarks.mining_overhead [key=value ...]

Two ranks of one thread each train through DeepSpeed in bf16, as the default configuration says, on a synthetic batch.
Steps without and with mining alternate on the same engine; `ratio` is the median of mined over plain in each pair, and
exit code 1 says that for one of the policies in `bounded` it exceeds the bound; of the costlier policies (several
layers, older checkpoints, two scores) the price is printed. `estimate` hardly sees the machine's noise: 1 + (median
seconds of the mining phase + those of the mined loss term) / median seconds of the plain step; the phase includes
waiting for the other rank, but not what the hidden activations cost while they travel beside the target network.
`monitoring` is the share of what the training loop computes for its log beside each mined step.
The machine should do nothing else: about nine minutes on 2 cores.
"""

import sys
from typing import Any, get_args

import torch

from benchmarks.harness import arguments, finish, seconds
from benchmarks.ranks import run_ranks
from benchmarks.steps import build_step, compare_with_plain, mined_term_seconds
from tracekin.config import Config, Policy, UserError, load
from tracekin.distributed import collectives
from tracekin.distributed.world import World
from tracekin.influence.diagnostics import hit_and_chance, in_degree, score_gap
from tracekin.monitor.metrics import Clock
from tracekin.train.record import chosen_ids

BOUND = 1.03
BOUNDED = ("tracin", "tracin_cosine", "feature", "random", "oracle")
RANKS = 2
POLICIES = tuple(policy for policy in get_args(Policy) if policy != "none")
CPU = torch.device("cpu")


def measure(rank: int, config: Config, budget: float, most_pairs: int, threads: int = 1) -> dict[str, Any]:
    """Every policy against plain BYOL on this rank; rank 0's clock is the one to read. A gloo group must exist."""
    torch.set_num_threads(threads)
    world = World(rank, collectives.world_size(), rank, collectives.world_size())
    step = build_step(config, CPU, world)
    found = compare_with_plain(step, POLICIES, CPU, budget=budget, most_pairs=most_pairs)
    losses = step("tracin", Clock(CPU))
    images = config.train.global_batch // world.size
    return {
        "policies": found,
        "mined_term_seconds": mined_term_seconds(images, config.train.global_batch, config.model.projection, CPU),
        "monitoring_seconds": seconds(lambda: _monitor(losses, config)),
    }


def _monitor(losses: Any, config: Config) -> None:
    """What the training loop computes beside a mined step."""
    found = losses.found
    hit_and_chance(found.mined, found.rows, found.columns, config.mining.exclude_group)
    in_degree(collectives.gather(chosen_ids(found)))
    score_gap(found.best.score)


def summarise(found: dict[str, Any]) -> dict[str, Any]:
    """The claim's figures from rank 0's measurements."""
    policies, term = found["policies"], found["mined_term_seconds"]
    plain = {policy: one["plain"]["median"] for policy, one in policies.items()}
    mining = {policy: one["mined_phases"]["mining"] for policy, one in policies.items()}
    ratio = {policy: one["ratio"] for policy, one in policies.items()}
    return {
        "plain_step_seconds": plain,
        "mining_seconds": mining,
        "mined_term_seconds": term,
        "pair_ratio": {policy: one["pair_ratio"] for policy, one in policies.items()},
        "monitoring": found["monitoring_seconds"] / plain["tracin"],
        "estimate": {policy: 1 + (mining[policy] + term) / plain[policy] for policy in policies},
        "price": {policy: value for policy, value in ratio.items() if policy not in BOUNDED},
        "bounded": [policy for policy in BOUNDED if policy in ratio],
        "bound": BOUND,
        "holds": all(value <= BOUND for policy, value in ratio.items() if policy in BOUNDED),
        "ratio": ratio,
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(threads=1)
    parser.add_argument("--pairs", type=int, default=25, help="most pairs of steps a policy (%(default)s)")
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
    result = {"ranks": RANKS, "overrides": options.overrides, **summarise(found)}
    finish("mining_overhead", result, save=options.save)
    sys.exit(0 if result["holds"] else 1)


if __name__ == "__main__":
    main()
