"""Training steps on synthetic images, ready to be timed: the engine, target and step of a real run, and no loader."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from statistics import median
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.harness import seconds, summary
from tracekin.config import Config
from tracekin.data.batch import Batch
from tracekin.distributed import collectives
from tracekin.distributed.world import World
from tracekin.monitor.metrics import Clock, Meter
from tracekin.objective import build_objective, build_online
from tracekin.objective.byol import byol_loss
from tracekin.train.engine import build_engine, preflight, set_lr
from tracekin.train.exchange import Exchange
from tracekin.train.miner import Miner
from tracekin.train.record import measure
from tracekin.train.step import Losses, train_step

NUM_CLASSES = 5
LR = 0.01
BOUNDED = ("tracin", "tracin_cosine", "feature", "random", "oracle")
"""Policies whose cost has a bound; of the others (several layers, older checkpoints, two scores) the price is told."""
BOUNDED_SHARE = 5 / 6
"""Of the time to measure in."""
LEAST_PAIRS = 3

Step = Callable[[str, Clock], Losses]
"""One step with the mining policy named, and what the training loop computes beside it for its log (phase
``measure``); the clock times its phases."""


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
    online = build_online(config).to(device)
    objective = build_objective(config, online)
    engine = build_engine(online, config.optimiser, config.train, world)
    engine.train()
    set_lr(engine, LR)
    batch, meter = synthetic_batch(config, world).to(device), Meter(device)

    @cache
    def miner(policy: str) -> Miner:
        found = Miner(replace(config.mining, policy=policy), objective, config.seed, world.local_size)  # type: ignore[arg-type]
        if found.history:  # as after a few epochs
            for _ in range(config.mining.checkpoints):
                found.history.remember(online, objective.target, LR)
        if exchange and found.policy:
            found.exchange = exchange(found)
        return found

    def step(policy: str, clock: Clock) -> Losses:
        losses = train_step(
            engine,
            objective,
            batch,
            miner(policy),
            tau=config.objective.tau_base,
            weight=config.mining.weight,
            step=0,
            lr=LR,
            clock=clock,
        )
        with clock.phase("measure"):
            measure(meter, losses, miner(policy), 0)
        return losses

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
    """For each policy time pairs of plain BYOL's step and the policy's, in this process and on this engine.

    Collective: every rank calls it, and all measure the same pairs.

    Args:
        step: from ``build_step``.
        policies: to compare with ``none``.
        device: where the step runs.
        budget: seconds for all pairs together, warm-up not included; most of it is the ``BOUNDED`` policies'.
        most_pairs: pairs that are enough for a policy; ``LEAST_PAIRS`` of these are measured whatever the budget.

    Returns:
        By policy: ``plain`` and ``mined``, the ``summary`` of the steps' seconds; ``pair_ratio``, the ``summary`` of
        mined over plain in each pair; ``ratio``, its median, because neighbours share the machine's mood;
        ``standard_error`` of that median; ``plain_phases`` and ``mined_phases``, median seconds by phase.
    """
    clock = Clock(device)
    for policy in ("none", *policies):
        step(policy, clock)
    clock.flush()
    bounded = [policy for policy in policies if policy in BOUNDED]
    dear = [policy for policy in policies if policy not in BOUNDED]
    share = BOUNDED_SHARE if bounded and dear else 1.0 if bounded else 0.0
    pairs = {
        **_measure_pairs(step, bounded, clock, share * budget, most_pairs),
        **_measure_pairs(step, dear, clock, (1 - share) * budget, most_pairs),
    }
    return {policy: _described(pairs[policy]) for policy in policies}


Phases = Mapping[str, float]
"""Seconds of one step by phase, and of all of it as ``step``."""


def _measure_pairs(
    step: Step, policies: Sequence[str], clock: Clock, budget: float, most_pairs: int
) -> dict[str, list[tuple[Phases, Phases]]]:
    """By policy the (plain, mined) steps of each pair, in rounds of one pair a policy until the budget is spent."""
    pairs: dict[str, list[tuple[Phases, Phases]]] = {policy: [] for policy in policies}
    began = time.perf_counter()
    for done in range(most_pairs if policies else 0):
        spent = time.perf_counter() - began
        over = done >= LEAST_PAIRS and spent * (done + 1) / done > budget
        if collectives.broadcast_object(over):
            break
        for policy in policies:
            # Plain first, then mined first: a drift of the machine cancels.
            order = ("none", policy) if done % 2 == 0 else (policy, "none")
            times = {name: _time_step(step, name, clock) for name in order}
            pairs[policy].append((times["none"], times[policy]))
    return pairs


def _time_step(step: Step, policy: str, clock: Clock) -> Phases:
    collectives.barrier()
    whole = seconds(lambda: step(policy, clock))
    return {"step": whole, **clock.flush()}


def _described(pairs: Sequence[tuple[Phases, Phases]]) -> dict[str, Any]:
    plain, mined = zip(*pairs, strict=True)
    ratio = summary([after["step"] / before["step"] for before, after in pairs])
    return {
        "plain": summary([one["step"] for one in plain]),
        "mined": summary([one["step"] for one in mined]),
        "pair_ratio": ratio,
        "ratio": ratio["median"],
        "standard_error": median_error(ratio),
        "plain_phases": _medians(plain),
        "mined_phases": _medians(mined),
    }


def median_error(values: Mapping[str, float]) -> float:
    """Standard error of the median of a ``summary``, by its quartiles: 1.2533 (IQR / 1.349) / sqrt(n) if normal."""
    deviation = (values["quartile_high"] - values["quartile_low"]) / 1.349
    return float(1.2533 * deviation / values["count"] ** 0.5)


def mined_term_seconds(config: Config, images: int, pool: int, device: torch.device, repeats: int = 15) -> float:
    """Seconds of what mining adds outside its own phase: the loss towards the mined positives and its backward pass."""
    width, k = config.model.projection, config.mining.k
    prediction_BVD = torch.randn(images, 2, width, device=device, requires_grad=True)
    target_PVD = torch.randn(pool, 2, width, device=device)
    mined_Bk = torch.randint(pool, (images, k), device=device)
    weight_Bk = torch.full((images, k), 1 / k, device=device)

    def term() -> None:
        positive_BkVD = target_PVD[mined_Bk.clamp(min=0)].flip(2)
        (weight_Bk * byol_loss(prediction_BVD[:, None], positive_BkVD)).sum(1).mean().backward()

    term()
    return median(seconds(term) for _ in range(repeats))


def summarise(found: Mapping[str, Mapping[str, Any]], term_seconds: float, bound: float) -> dict[str, Any]:
    """The claim's figures, by policy, and its verdict.

    Args:
        found: of ``compare_with_plain``.
        term_seconds: of ``mined_term_seconds``.
        bound: no ratio of a ``BOUNDED`` policy may exceed it.

    Returns:
        ``estimate``: 1 + seconds that mining adds by phase over those of the plain step; it hardly sees the machine's
        noise, nor what the activations cost while they travel beside the target network. ``holds``: every bounded
        policy's ratio is within the bound. ``uncertain``: bounded policies whose ratio is within two standard errors of
        the bound, for which another run may say otherwise. The other keys say what they are.
    """
    plain = {policy: one["plain"]["median"] for policy, one in found.items()}
    mining = {policy: one["mined_phases"]["mining"] for policy, one in found.items()}
    log = {policy: one["mined_phases"]["measure"] - one["plain_phases"]["measure"] for policy, one in found.items()}
    ratio = {policy: one["ratio"] for policy, one in found.items()}
    error = {policy: one["standard_error"] for policy, one in found.items()}
    bounded = [policy for policy in BOUNDED if policy in found]
    return {
        "plain_step_seconds": plain,
        "mining_seconds": mining,
        "measure_seconds": log,
        "mined_term_seconds": term_seconds,
        "pair_ratio": {policy: one["pair_ratio"] for policy, one in found.items()},
        "standard_error": error,
        "estimate": {policy: 1 + (mining[policy] + term_seconds + log[policy]) / plain[policy] for policy in found},
        "price": {policy: value for policy, value in ratio.items() if policy not in bounded},
        "bounded": bounded,
        "bound": bound,
        "uncertain": [policy for policy in bounded if abs(ratio[policy] - bound) <= 2 * error[policy]],
        "holds": all(ratio[policy] <= bound for policy in bounded),
        "ratio": ratio,
    }


def table(result: Mapping[str, Any]) -> list[str]:
    """Lines of ``summarise``'s figures: the ratio of pairs, twice its standard error, and the ratio by phases."""
    lines = [f"{'policy':<18}{'pairs':>6}{'ratio':>9}{'+-':>8}{'by phases':>11}{'mining s':>11}{'measure s':>11}"]
    for policy in sorted(result["ratio"], key=lambda policy: policy not in result["bounded"]):
        lines.append(
            f"{policy:<18}{result['pair_ratio'][policy]['count']:>6}{result['ratio'][policy]:>9.4f}"
            f"{2 * result['standard_error'][policy]:>8.4f}{result['estimate'][policy]:>11.4f}"
            f"{result['mining_seconds'][policy]:>11.5f}{result['measure_seconds'][policy]:>11.5f}"
        )
    near = f"; within two standard errors of it: {', '.join(result['uncertain'])}" if result["uncertain"] else ""
    return [*lines, f"bound {result['bound']} {'holds' if result['holds'] else 'is missed'}{near}"]


def _medians(steps: Sequence[Phases]) -> dict[str, float]:
    return {phase: median(step[phase] for step in steps) for phase in steps[0] if phase != "step"}
