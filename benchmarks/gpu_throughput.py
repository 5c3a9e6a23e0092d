"""Images a second of pretraining on one GPU, without and with mining against the pool of many more GPUs.

Not a command of its own: `benchmarks.gpu` runs it. The pool stands for other GPUs: their factors, targets, ids, groups
and labels are drawn once, and each step puts its own rows among them. So the arithmetic of mining is all there; the
cost of gathering the pool over a network is not.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.steps import NUM_CLASSES, Step, build_step, compare_with_plain, mined_term_seconds
from tracekin.config import Config
from tracekin.distributed.world import World
from tracekin.influence.candidates import Block, Candidates
from tracekin.influence.gradients import Factors
from tracekin.monitor.metrics import Clock
from tracekin.train.exchange import Exchange
from tracekin.train.miner import Miner
from tracekin.train.record import PHASES


def throughput(
    rank: int,
    device_name: str,
    config: Config,
    policies: tuple[str, ...],
    pool_ranks: int,
    budget: float,
    most_pairs: int,
) -> dict[str, Any]:
    """Images a second, share of the step by phase and peak memory, for plain BYOL and each policy.

    Args:
        rank: 0; a process group of one rank must exist.
        device_name: "cuda" or "cpu".
        config: model, image size and batch; ``train.global_batch`` images are this rank's rows.
        policies: the first is the headline.
        pool_ranks: the pool holds this many times the rows.
        budget: seconds for all timed steps together.
        most_pairs: pairs of steps that are enough for a policy.
    """
    device = torch.device(device_name)
    torch.backends.cudnn.benchmark = True  # as the training loop does
    rows = config.train.global_batch
    pool = synthetic_pool(config, pool_ranks, device)
    step = build_step(config, device, World(), lambda miner: AmongOthers(miner, pool))
    found = compare_with_plain(step, policies, device, budget=budget, most_pairs=most_pairs)
    memory = {policy: peak_bytes(step, policy, device) for policy in ("none", policies[0])}
    headline = found[policies[0]]
    return {
        "rows": rows,
        "pool": pool_ranks * rows,
        "pool_bytes": sum(tensor.nbytes for tensor in [*pool.factors[0], pool.target]),
        "policies": {policy: _figures(one, rows) for policy, one in found.items()},
        "share_of_step": {
            "none": _shares(headline["plain_phases"], headline["plain"]["median"]),
            policies[0]: _shares(headline["mined_phases"], headline["mined"]["median"]),
        },
        "mined_term_seconds": mined_term_seconds(rows, pool_ranks * rows, config.model.projection, device),
        "peak_bytes": memory,
        "images_per_second": {
            "none": rows / headline["plain"]["median"],
            policies[0]: rows / headline["mined"]["median"],
        },
        "ratio": headline["ratio"],
    }


def synthetic_pool(config: Config, pool_ranks: int, device: torch.device) -> Candidates:
    """What a gather over ``pool_ranks`` ranks would hold: [pool, 2, width] fp32 factors and targets, ids and labels."""
    columns = pool_ranks * config.train.global_batch
    generator = torch.Generator(device).manual_seed(0)

    def normal(width: int) -> torch.Tensor:
        return torch.randn(columns, 2, width, device=device, generator=generator)

    ids = torch.arange(columns, device=device)
    return Candidates(
        (Factors(normal(config.model.predictor_hidden).relu_(), normal(config.model.projection)),),
        normal(config.model.projection),
        ids,
        ids // 2,
        F.one_hot(ids // 2 % NUM_CLASSES, NUM_CLASSES).float(),
    )


class AmongOthers(Exchange):
    """An exchange whose pool is there already; my rows become its first columns, written in place."""

    def __init__(self, miner: Miner, pool: Candidates) -> None:
        super().__init__(miner.mining, miner.exchange.group)
        self.pool = pool
        self.own: tuple[Factors, ...] = ()

    @torch.no_grad()
    def gather(self, rows: Candidates) -> Candidates:
        self.own, num_rows = rows.factors, len(rows.ids)
        self.pool.target[:num_rows] = rows.target
        return self.pool._replace(factors=())

    @torch.no_grad()
    def blocks(self, columns: Candidates) -> Iterator[Block]:
        self.hidden = []
        for pool, own in zip(self.pool.factors, self.own, strict=False):
            pool.hidden[: len(own.hidden)], pool.delta[: len(own.delta)] = own.hidden, own.delta
        yield Block(0, columns._replace(factors=self.pool.factors[: len(self.own)]))


def peak_bytes(step: Step, policy: str, device: torch.device) -> int | None:
    """Most bytes that tensors held on the GPU during a step, the resident pool included; None on CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step(policy, Clock(device))
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def _figures(one: dict[str, Any], rows: int) -> dict[str, Any]:
    return {
        "ratio": one["ratio"],
        "pair_ratio": one["pair_ratio"],
        "step_seconds": one["mined"],
        "plain_step_seconds": one["plain"],
        "mining_seconds": one["mined_phases"]["mining"],
        "images_per_second": rows / one["mined"]["median"],
    }


def _shares(phases: dict[str, float], step: float) -> dict[str, float]:
    """Each phase's share; ``other`` is what no phase times: both losses and the host's delays between phases."""
    shares = {phase: phases[phase] / step for phase in PHASES if phase in phases}
    return {**shares, "other": 1 - sum(shares.values())}
