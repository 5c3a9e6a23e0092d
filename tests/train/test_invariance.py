"""W ranks = one process: the same loss, gradient, positives and update for any world size, policy and ZeRO stage."""

from typing import Any, get_args

import pytest
import torch

from tests.ranks import run_ranks
from tests.train.tiny_run import BATCH, context, global_batch, mining, networks, rows_of
from tracekin.config import OptimiserConfig, Policy, TrainConfig
from tracekin.distributed import collectives
from tracekin.distributed.world import World
from tracekin.influence.policies import choose
from tracekin.train.step import byol_with_mined_positives

POLICIES = get_args(Policy)
WORLDS = (2, 4)
STAGES = (0, 1, 2)


def plain_step(rank: int, world_size: int) -> dict[str, dict[str, torch.Tensor]]:
    """Loss, gradient and positives of the global batch in float64, without DeepSpeed."""
    world = World(rank, world_size, rank, world_size)
    results = {}
    for policy in POLICIES:
        online, target = networks(torch.float64)
        batch = rows_of(global_batch(torch.float64), world)
        losses = byol_with_mined_positives(online, target, batch, mining(policy), **context())
        losses.loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in online.parameters()])
        results[policy] = {
            "loss": collectives.total(losses.loss) / world_size,
            "gradient": collectives.total(gradient) / world_size,
            "buffers": torch.cat([b.double().flatten() for net in (online, target) for b in net.buffers()]),
            "index": collectives.gather(losses.mined.index[:, 0]) if losses.mined else torch.empty(0),
        }
    return results


@pytest.fixture(scope="module")
def plain() -> dict[int, Any]:
    return {size: run_ranks(plain_step, size, size)[0] for size in (1, *WORLDS)}


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("policy", POLICIES)
def test_ranks_equal_one_process_in_float64(plain: dict[int, Any], policy: str, world_size: int) -> None:
    one, many = plain[1][policy], plain[world_size][policy]
    assert torch.equal(many["index"], one["index"])
    assert abs(many["loss"] - one["loss"]) <= 1e-10 * abs(one["loss"])
    assert torch.linalg.vector_norm(many["gradient"] - one["gradient"]) <= 1e-10 * torch.linalg.vector_norm(
        one["gradient"]
    )
    assert torch.allclose(many["buffers"], one["buffers"], rtol=1e-10, atol=1e-12)


def test_the_comparison_is_not_blind(plain: dict[int, Any]) -> None:
    """The policies differ in what they choose and in their gradients, and every one but none mines something."""
    chosen = {policy: tuple(plain[1][policy]["index"].tolist()) for policy in POLICIES if policy != "none"}
    assert len(set(chosen.values())) >= 4
    assert all(max(index) >= 0 for index in chosen.values())
    assert not torch.allclose(plain[1]["none"]["gradient"], plain[1]["tracin"]["gradient"])


def engine_step(rank: int, world_size: int) -> dict[str, Any]:
    """Gradient, positives and scores of the global batch through DeepSpeed in fp32, for every policy and stage."""
    from deepspeed.utils import safe_get_full_grad

    from tracekin.train.engine import build_engine

    world = World(rank, world_size, rank, world_size)
    results: dict[str, Any] = {}
    for stage in STAGES:
        for policy in POLICIES:
            online, target = networks(torch.float32)
            train = TrainConfig(global_batch=BATCH, zero_stage=stage, precision="fp32")  # type: ignore[arg-type]
            engine = build_engine(online, OptimiserConfig(), train, world)
            losses = byol_with_mined_positives(
                engine, target, rows_of(global_batch(torch.float32), world), mining(policy), **context()
            )
            engine.backward(losses.loss)
            gradient = torch.cat([safe_get_full_grad(p).flatten() for p in online.parameters()])
            entry = {"gradient": gradient, "loss": collectives.total(losses.loss) / world_size}
            if losses.mined and losses.rows and losses.pool:
                entry |= {"index": collectives.gather(losses.mined.index[:, 0])}
                two = choose(policy, losses.rows, losses.pool, seed=0, step=5, exclude_group=True, k=2).score
                gap = (two[:, 0] - two[:, 1]) / two.abs().max()
                entry |= {"gap": collectives.gather(gap)}
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
            differs, close = many["index"] != one["index"], one["gap"] < 1e-5
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
            online, target = networks(torch.float32)
            train = TrainConfig(global_batch=BATCH, zero_stage=stage, precision="fp32")  # type: ignore[arg-type]
            engine = build_engine(online, OptimiserConfig(name=name, weight_decay=0.01), train, world)  # type: ignore[arg-type]
            for step in range(3):
                set_lr(engine, lr)
                batch = rows_of(global_batch(torch.float32, seed=step), world)
                train_step(engine, target, batch, mining("tracin"), tau=0.9, **context(step))
            state = optimiser_tensors(engine)
            results[f"{name}/{stage}"] = {
                "weights": torch.cat([p.detach().flatten() for p in online.parameters()]),
                "target": torch.cat([p.flatten() for p in target.parameters()]),
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
