"""Images a second of pretraining on one GPU, without and with mining against the pool of many more GPUs.

Not a command of its own: `benchmarks.gpu` runs it. The pool stands for other GPUs: their targets, ids, groups and
labels are drawn once, their factors when the first rows of a policy tell how many layers there are and how wide, and
each step puts its own rows among them. So the arithmetic of mining is all there; what travels over a network, in the
exchange and for the log, is not.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.steps import NUM_CLASSES, Step, build_step, compare_with_plain, mined_term_seconds, summarise
from tracekin.config import Config
from tracekin.distributed.world import World
from tracekin.influence.candidates import Block, Candidates
from tracekin.influence.gradients import Factors
from tracekin.monitor.metrics import Clock
from tracekin.train.exchange import Exchange
from tracekin.train.miner import Miner
from tracekin.train.record import PHASES

BOUND = 1.01


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
        policies: ``mining.policy``, the headline, is among them.
        pool_ranks: the pool holds this many times the rows.
        budget: seconds for all timed steps together.
        most_pairs: pairs of steps that are enough for a policy.

    Returns:
        ``benchmarks.steps.summarise``'s figures, and the headline's own.
    """
    device, headline = torch.device(device_name), config.mining.policy
    torch.backends.cudnn.benchmark = True  # as the training loop does
    rows = config.train.global_batch
    pool = SyntheticPool(config, pool_ranks, device)
    step = build_step(config, device, World(), lambda miner: AmongOthers(miner, pool))
    for policy in ("none", headline):
        step(policy, Clock(device))
    # Before any policy has asked for more layers than the headline.
    pool_bytes = pool.nbytes()
    memory = {policy: peak_bytes(step, policy, device) for policy in ("none", headline)}
    found = compare_with_plain(step, policies, device, budget=budget, most_pairs=most_pairs)
    term = mined_term_seconds(config, rows, pool_ranks * rows, device)
    one = found[headline]
    return {
        "rows": rows,
        "pool": pool_ranks * rows,
        "pool_bytes": pool_bytes,
        "step_seconds": {policy: each["mined"] for policy, each in found.items()},
        "share_of_step": {
            "none": _shares(one["plain_phases"], one["plain"]["median"]),
            headline: _shares(one["mined_phases"], one["mined"]["median"]),
        },
        "peak_bytes": memory,
        "images_per_second": {
            "none": rows / one["plain"]["median"],
            **{policy: rows / each["mined"]["median"] for policy, each in found.items()},
        },
        **summarise(found, term, BOUND),
    }


class SyntheticPool:
    """What a gather over ``pool_ranks`` ranks would hold: fp32 targets and factors, ids, groups and labels.

    Args:
        config: of the run.
        pool_ranks: the pool holds this many times the global batch.
        device: where it lies.
    """

    def __init__(self, config: Config, pool_ranks: int, device: torch.device) -> None:
        self.columns, self.device = pool_ranks * config.train.global_batch, device
        self.generator = torch.Generator(device).manual_seed(0)
        self.layers: dict[tuple[int, int, int], Factors] = {}
        ids = torch.arange(self.columns, device=device)
        label = F.one_hot(ids // 2 % NUM_CLASSES, NUM_CLASSES).float()
        self.known = Candidates((), self._normal(config.model.projection), ids, ids // 2, label)

    def factors(self, own: tuple[Factors, ...]) -> tuple[Factors, ...]:
        """The pool's factors for each layer (or checkpoint) of the rows' ``own``, of the same widths.

        Policies share them: the n-th layer of some widths is the same for all, so that the pool stays small.
        """
        seen: Counter[tuple[int, int]] = Counter()
        found = []
        for layer in own:
            widths = layer.hidden.shape[-1], layer.delta.shape[-1]
            key = (*widths, seen[widths])
            seen[widths] += 1
            if key not in self.layers:
                hidden, delta = (self._normal(width) for width in widths)
                self.layers[key] = Factors(hidden.relu_(), delta)
            found.append(self.layers[key])
        return tuple(found)

    def nbytes(self) -> int:
        """Of the targets and of all factors drawn so far."""
        return sum(
            tensor.nbytes for tensor in (self.known.target, *(t for layer in self.layers.values() for t in layer))
        )

    def _normal(self, width: int) -> torch.Tensor:
        return torch.randn(self.columns, 2, width, device=self.device, generator=self.generator)


class AmongOthers(Exchange):
    """An exchange whose pool is there already; my rows become its first columns, written in place."""

    def __init__(self, miner: Miner, pool: SyntheticPool) -> None:
        super().__init__(miner.mining, miner.exchange.group)
        self.pool = pool
        self.own: tuple[Factors, ...] = ()

    @torch.no_grad()
    def gather(self, rows: Candidates) -> Candidates:
        self.own = rows.factors
        self.pool.known.target[: len(rows.ids)] = rows.target
        return self.pool.known

    @torch.no_grad()
    def blocks(self, columns: Candidates) -> Iterator[Block]:
        self.hidden = []
        whole = self.pool.factors(self.own)
        for layer, own in zip(whole, self.own, strict=True):
            layer.hidden[: len(own.hidden)], layer.delta[: len(own.delta)] = own.hidden, own.delta
        yield Block(0, columns._replace(factors=whole))


def peak_bytes(step: Step, policy: str, device: torch.device) -> int | None:
    """Most bytes that tensors held on the GPU during a step, the resident pool included; None on CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step(policy, Clock(device))
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def _shares(phases: dict[str, float], step: float) -> dict[str, float]:
    """Each phase's share; ``other`` is what no phase times: both losses and the host's delays between phases."""
    shares = {phase: phases[phase] / step for phase in (*PHASES, "measure") if phase in phases}
    return {**shares, "other": 1 - sum(shares.values())}
