"""Training steps on synthetic images, ready to be timed: the engine, target and step of a real run, and no loader."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from statistics import median
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.harness import compare, seconds
from tracekin.config import Config
from tracekin.data.stream import Batch
from tracekin.distributed import collectives
from tracekin.distributed.world import World
from tracekin.model.byol import Online, Target, byol_loss
from tracekin.monitor.metrics import Clock
from tracekin.train.engine import build_engine, preflight, set_lr
from tracekin.train.exchange import Exchange
from tracekin.train.miner import Miner
from tracekin.train.step import Losses, train_step

NUM_CLASSES = 5
LR = 0.01

Step = Callable[[str, Clock], Losses]
"""One optimiser step with the mining policy named; the clock times its phases."""


def build_step(
    config: Config, device: torch.device, world: World, exchange: Callable[[Miner], Exchange] | None = None
) -> Step:
    """The step of ``config`` on one synthetic batch, every policy on the same engine. A process group must exist.

    Args:
        config: of the run.
        device: where it runs.
        world: this process's place.
        exchange: replaces each miner's exchange, to simulate other ranks.
    """
    preflight(device)
    torch.manual_seed(config.seed)
    online = Online(config.model, config.data.channels, config.train.precision == "bf16").to(device)
    target = Target(online)
    engine = build_engine(online, config.optimiser, config.train, world)
    engine.train()
    set_lr(engine, LR)
    batch = synthetic_batch(config, world).to(device)

    @cache
    def miner(policy: str) -> Miner:
        found = Miner(replace(config.mining, policy=policy), online, config.seed, world.local_size)  # type: ignore[arg-type]
        if found.history:  # as after a few epochs
            for _ in range(config.mining.checkpoints):
                found.history.remember(online, target, LR)
        if exchange and found.policy:
            found.exchange = exchange(found)
        return found

    def step(policy: str, clock: Clock) -> Losses:
        return train_step(
            engine,
            target,
            batch,
            miner(policy),
            tau=config.objective.tau_base,
            weight=config.mining.weight,
            step=0,
            lr=LR,
            clock=clock,
        )

    return step


def synthetic_batch(config: Config, world: World) -> Batch:
    """This rank's share of a global batch of noise, on the CPU: two images a group, five classes."""
    images = config.train.global_batch // world.size
    generator = torch.Generator().manual_seed(world.rank)
    index = torch.arange(images) + world.rank * images
    side = config.data.image_size
    return Batch(
        views=torch.randn(2, images, config.data.channels, side, side, generator=generator),
        index=index,
        group=index // 2,
        label=F.one_hot(index // 2 % NUM_CLASSES, NUM_CLASSES).float(),
    )


def compare_with_plain(
    step: Step, policies: Sequence[str], device: torch.device, *, budget: float, most_pairs: int
) -> dict[str, dict[str, Any]]:
    """For each policy time plain BYOL and the policy's step in alternation, in this process and on this engine.

    Collective: every rank calls it, and all measure the same number of pairs.

    Args:
        step: from ``build_step``.
        policies: to compare with ``none``.
        device: where the step runs.
        budget: seconds for all pairs together, warm-up not included.
        most_pairs: pairs that are enough for a policy; 3 of these are measured whatever the budget.

    Returns:
        By policy: ``plain`` and ``mined``, the ``summary`` of the steps' seconds; ``pair_ratio``, the ``summary`` of
        mined over plain in each pair; ``ratio``, its median, because neighbours share the machine's mood;
        ``plain_phases`` and ``mined_phases``, median seconds by phase.
    """
    clock = Clock(device)
    for policy in ("none", *policies):
        step(policy, clock)
    each = seconds(lambda: step("none", clock))
    fitting = int(budget / (2 * len(policies) * each))
    pairs = collectives.broadcast_object(min(most_pairs, max(3, fitting)))
    clock.flush()
    results = {}
    for policy in policies:
        phases: dict[str, list[dict[str, float]]] = {"plain": [], "mined": []}

        def timed(side: str, policy: str, phases: dict[str, list[dict[str, float]]] = phases) -> Callable[[], None]:
            def call() -> None:
                step(policy, clock)
                phases[side].append(clock.flush())

            return call

        found = compare({"plain": timed("plain", "none"), "mined": timed("mined", policy)}, pairs=pairs, warmup=0)
        results[policy] = {
            **found,
            "ratio": found["pair_ratio"]["median"],
            **{f"{side}_phases": _medians(steps) for side, steps in phases.items()},
        }
    return results


def mined_term_seconds(images: int, pool: int, width: int, device: torch.device, repeats: int = 15) -> float:
    """Seconds of what mining adds outside its own phase: the loss towards the mined positives and its backward pass."""
    prediction_BVD = torch.randn(images, 2, width, device=device, requires_grad=True)
    target_PVD = torch.randn(pool, 2, width, device=device)
    mined_B = torch.randint(pool, (images,), device=device)

    def term() -> None:
        positive_BVD = target_PVD[mined_B.clamp(min=0)].flip(1)
        (byol_loss(prediction_BVD, positive_BVD) * (mined_B >= 0)).mean().backward()

    term()
    return median(seconds(term) for _ in range(repeats))


def _medians(steps: list[dict[str, float]]) -> dict[str, float]:
    return {phase: median(step[phase] for step in steps) for phase in steps[0]}
