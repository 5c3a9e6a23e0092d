"""W ranks = one process: the same loss, gradient, positives and update for any world size, policy and ZeRO stage."""

from typing import Any, get_args

import pytest
import torch

from tests.ranks import run_ranks
from tests.train.tiny_run import BATCH, context, global_batch, miner, networks, rows_of
from tracekin.config import OptimiserConfig, Policy, TrainConfig
from tracekin.distributed import collectives
from tracekin.distributed.world import World
from tracekin.train.miner import Miner
from tracekin.train.step import Losses, loss_with_mined_positives

POLICIES = get_args(Policy)
# Every policy at its defaults, and everything else that mining can be told, each once.
VARIANTS: dict[str, dict[str, Any]] = {
    **{policy: {"policy": policy} for policy in POLICIES},
    "k": {"policy": "tracin_cosine", "k": 3},
    "mutual": {"policy": "tracin_cosine", "keep": "mutual", "k": 2},
    "quantile": {"policy": "tracin", "keep": "quantile", "quantile": 0.6},
    "bf16": {"policy": "tracin_cosine", "transport": "bf16"},
    "sketch": {"policy": "tracin_cosine", "sketch_dim": 5},
    "ring": {"policy": "tracin", "ring_above": 0, "k": 2},
    "ring_ghost_sketch": {"policy": "ghost_cosine", "ring_above": 1, "sketch_dim": 5},
    "queue": {"policy": "tracin_cosine", "queue": 40, "queue_half_life": 3.0},
    "queue_ring_bf16": {"policy": "agreement", "queue": 25, "ring_above": 0, "transport": "bf16"},
    "queue_group": {"policy": "group", "queue": 32},
    "support": {"policy": "fnc", "support_views": 2},
}
WORLDS = (2, 4)
STAGES = (0, 1, 2)
STEP = 5


def mined_step(
    online: Any, objective: Any, world: World, variant: str, dtype: torch.dtype, engine: Any = None
) -> tuple[Losses, Miner]:
    """The step's losses after two steps that the queue, if any, remembers, and two checkpoints in the past."""
    mining = VARIANTS[variant]
    found = miner(objective, **mining)
    if found.history:
        for seed in (7, 8):
            older, its = networks(dtype, seed)
            found.history.remember(older, its.target, lr=0.1 * seed)
    views = 2 + mining.get("support_views", 0)
    for step in range(STEP - 2 if found.queue else STEP, STEP + 1):
        batch = rows_of(global_batch(dtype, seed=step, views=views), world)
        losses = loss_with_mined_positives(engine or online, objective, batch, found, **context(step))
    return losses, found


def plain_step(rank: int, world_size: int) -> dict[str, dict[str, torch.Tensor]]:
    """Loss, gradient and positives of the global batch in float64, without DeepSpeed."""
    world = World(rank, world_size, rank, world_size)
    results = {}
    for variant in VARIANTS:
        online, objective = networks(torch.float64)
        losses, found = mined_step(online, objective, world, variant, torch.float64)
        losses.loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in online.parameters()])
        queue = found.queue.state() if found.queue else {}
        results[variant] = {
            "loss": collectives.total(losses.loss) / world_size,
            "gradient": collectives.total(gradient) / world_size,
            "buffers": torch.cat([b.double().flatten() for net in (online, objective.target) for b in net.buffers()]),
            "index": collectives.gather(losses.found.mined.index) if losses.found else torch.empty(0),
            "queue": torch.cat([torch.empty(0), *(queue[name].double().flatten() for name in sorted(queue))]),
        }
    return results


@pytest.fixture(scope="module")
def plain() -> dict[int, Any]:
    return {size: run_ranks(plain_step, size, size)[0] for size in (1, *WORLDS)}


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_ranks_equal_one_process_in_float64(plain: dict[int, Any], variant: str, world_size: int) -> None:
    one, many = plain[1][variant], plain[world_size][variant]
    assert torch.equal(many["index"], one["index"])
    assert abs(many["loss"] - one["loss"]) <= 1e-10 * abs(one["loss"])
    assert torch.linalg.vector_norm(many["gradient"] - one["gradient"]) <= 1e-10 * torch.linalg.vector_norm(
        one["gradient"]
    )
    assert torch.allclose(many["buffers"], one["buffers"], rtol=1e-10, atol=1e-12)
    assert torch.allclose(many["queue"], one["queue"], rtol=1e-10, atol=1e-12)


def test_the_comparison_is_not_blind(plain: dict[int, Any]) -> None:
    """The variants differ in what they choose and in their gradients, and every one but none mines something."""
    chosen = {name: tuple(plain[1][name]["index"].flatten().tolist()) for name in VARIANTS if name != "none"}
    # A group's mates come one to an image here; the ring and bf16 exchange nothing but the same scores.
    assert len(set(chosen.values())) >= len(chosen) - 3
    assert {name for name in chosen if max(chosen[name]) < 0} == set()
    assert min(chosen["mutual"]) == min(chosen["quantile"]) == -1
    assert all(max(chosen[name]) >= BATCH for name in ("queue", "queue_ring_bf16", "queue_group"))
    assert not torch.allclose(plain[1]["none"]["gradient"], plain[1]["tracin"]["gradient"])


def engine_step(rank: int, world_size: int) -> dict[str, Any]:
    """Gradient, positives and scores of the global batch through DeepSpeed in fp32, for every policy and stage."""
    from deepspeed.utils import safe_get_full_grad

    from tracekin.train.engine import build_engine

    world = World(rank, world_size, rank, world_size)
    results: dict[str, Any] = {}
    for stage in STAGES:
        for policy in POLICIES:
            online, objective = networks(torch.float32)
            train = TrainConfig(global_batch=BATCH, zero_stage=stage, precision="fp32")  # type: ignore[arg-type]
            engine = build_engine(online, OptimiserConfig(), train, world)
            losses, _ = mined_step(online, objective, world, policy, torch.float32, engine)
            engine.backward(losses.loss)
            gradient = torch.cat([safe_get_full_grad(p).flatten() for p in online.parameters()])
            entry = {"gradient": gradient, "loss": collectives.total(losses.loss) / world_size}
            if losses.found:
                score = losses.found.best.score
                gap = (score[:, 0] - score[:, 1]) / score.abs().max()
                entry |= {"index": collectives.gather(losses.found.mined.index), "gap": collectives.gather(gap)}
            results[f"{policy}/{stage}"] = entry
    return results


@pytest.fixture(scope="module")
def engines() -> dict[int, Any]:
    return {size: run_ranks(engine_step, size, size)[0] for size in (1, *WORLDS)}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("world_size", [1, *WORLDS])
def test_ranks_equal_one_process_through_deepspeed(
    engines: dict[int, Any], plain: dict[int, Any], world_size: int, stage: int, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = undecided = 0
    for policy in POLICIES:
        one, many = engines[1][f"{policy}/0"], engines[world_size][f"{policy}/{stage}"]
        error = torch.linalg.vector_norm(many["gradient"] - one["gradient"]) / torch.linalg.vector_norm(one["gradient"])
        assert error <= 1e-4, (policy, float(error))
        truth = plain[1][policy]["gradient"]
        assert torch.linalg.vector_norm(many["gradient"] - truth) <= 1e-3 * torch.linalg.vector_norm(truth)
        if policy != "none":
            differs, close = (many["index"] != one["index"])[:, 0], one["gap"] < 1e-5
            assert not (differs & ~close).any(), policy
            moved, undecided = moved + int(differs.sum()), undecided + int(close.sum())
    with capsys.disabled():
        print(f" {moved} positives differ; {undecided} have two best scores within 1e-5 ", end="")


def updates(rank: int, world_size: int) -> dict[str, dict[str, torch.Tensor]]:
    """Weights after three full steps, and the optimiser's gathered state, for every optimiser and stage."""
    from tracekin.train.engine import build_engine, optimiser_tensors, set_lr
    from tracekin.train.step import train_step

    world = World(rank, world_size, rank, world_size)
    results = {}
    for name, lr in (("sgd", 0.05), ("adamw", 1e-3), ("lars", 0.5)):
        for stage in STAGES:
            online, objective = networks(torch.float32)
            train = TrainConfig(global_batch=BATCH, zero_stage=stage, precision="fp32")  # type: ignore[arg-type]
            engine = build_engine(online, OptimiserConfig(name=name, weight_decay=0.01), train, world)  # type: ignore[arg-type]
            for step in range(3):
                set_lr(engine, lr)
                batch = rows_of(global_batch(torch.float32, seed=step), world)
                train_step(engine, objective, batch, miner(objective, "tracin"), tau=0.9, **context(step))
            state = optimiser_tensors(engine)
            results[f"{name}/{stage}"] = {
                "weights": torch.cat([p.detach().flatten() for p in online.parameters()]),
                "target": torch.cat([p.flatten() for p in objective.target.parameters()]),
                "state": torch.cat([state[key].flatten().float() for key in sorted(state)]),
            }
    return results


@pytest.fixture(scope="module")
def updated() -> dict[int, Any]:
    return {size: run_ranks(updates, size, size)[0] for size in (1, 2)}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ["sgd", "lars", "adamw"])
def test_the_same_update_under_every_stage(updated: dict[int, Any], name: str, stage: int, world_size: int) -> None:
    one, many = updated[1][f"{name}/0"], updated[world_size][f"{name}/{stage}"]
    start = torch.cat([p.detach().flatten() for p in networks(torch.float32)[0].parameters()])
    moved = torch.linalg.vector_norm(one["weights"] - start)
    assert moved > 0.01
    # AdamW divides gradients that are truly 0 (biases before a batch norm) by themselves: its noise is larger.
    bound = 0.1 if name == "adamw" else 1e-3
    assert torch.linalg.vector_norm(many["weights"] - one["weights"]) <= bound * moved
    assert many["state"].shape == one["state"].shape
    if name != "adamw":
        assert torch.linalg.vector_norm(many["target"] - one["target"]) <= 1e-3 * moved
        assert torch.linalg.vector_norm(many["state"] - one["state"]) <= 1e-3 * torch.linalg.vector_norm(one["state"])
