"""W ranks = one process, for every objective: losses, gradients, positives, buffers and what is remembered.

Peers got this wrong in silence: lightly's gathers and all-reduces lost gradients, which came out 1/W (its issues 1920
and 1977). ``lost_wishes`` does the same here, and the test that uses it says which objectives it breaks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from tests.ranks import run_ranks
from tests.train.tiny_run import BATCH, context, global_batch, miner, networks, rows_of
from tracekin.config import ModelConfig, OptimiserConfig, TrainConfig
from tracekin.distributed import collectives
from tracekin.distributed.world import World
from tracekin.train.step import loss_with_mined_positives

NARROW = ModelConfig(projector_hidden=24, projection=3)
"""Of W-MSE: the batch makes two sub-batches, which span ranks wherever there are several."""
OBJECTIVES: dict[str, dict[str, Any]] = {
    "byol": {"name": "byol"},
    "simsiam": {"name": "simsiam"},
    "simclr": {"name": "simclr"},
    "moco": {"name": "moco", "queue": 2 * BATCH},
    "moco_shuffled": {"name": "moco", "queue": 2 * BATCH, "norm": "shuffled", "norm_groups": 4},
    "moco_v3": {"name": "moco", "version": 3},
    "barlow_twins": {"name": "barlow_twins"},
    "vicreg": {"name": "vicreg"},
    "wmse": {"name": "wmse", "model": NARROW, "sub_batch": 8},
}
REMEMBERING = ("moco", "moco_shuffled")
CONTRASTIVE = ("simclr", "moco", "moco_shuffled", "moco_v3")
MINING: dict[str, dict[str, Any]] = {
    "none": {"policy": "none"},
    "tracin_cosine": {"policy": "tracin_cosine"},
    "feature": {"policy": "feature", "k": 2},
    "ghost": {"policy": "ghost"},
    "tracin_cp": {"policy": "tracin_cp"},
    # What MoCo pushes away lies in the past: the miner must remember it too.
    "eliminate": {"policy": "tracin_cosine", "mode": "eliminate", "queue": 2 * BATCH, "k": 3},
}
ALLOWED = {"tracin_cp": set(OBJECTIVES) - set(REMEMBERING), "eliminate": set(CONTRASTIVE)}
VARIANTS = [(name, how) for name in OBJECTIVES for how in MINING if name in ALLOWED.get(how, OBJECTIVES)]
COUPLED = ("simclr", "barlow_twins", "vicreg", "wmse")
"""Objectives whose loss takes gradients from other ranks' images."""
WORLDS = (2, 4)
STAGES = (0, 1, 2)
BATCHES = (1, 2, 1)
"""Seeds of a run's batches: the memory is full at the third step, whose images it knows."""


def plain_run(world: World, name: str, how: str) -> dict[str, Tensor]:
    """Three steps in float64 without DeepSpeed: what they computed and what they left, the same on every rank."""
    dtype, options = torch.float64, OBJECTIVES[name]
    online, objective = networks(dtype, **options)
    found = miner(objective, **MINING[how])
    if found.history:
        for seed in (7, 8):
            older, its = networks(dtype, seed, **options)
            found.history.remember(older, its.target, lr=0.1 * seed)
    losses, gradients, positives = [], [], []
    for step, seed in enumerate(BATCHES):
        batch = rows_of(global_batch(dtype, seed), world)
        lost = loss_with_mined_positives(online, objective, batch, found, **context(step))
        online.zero_grad()
        lost.loss.backward()
        flat = torch.cat([parameter.grad.flatten() for parameter in online.parameters()])
        gradients.append(collectives.total(flat) / world.size)
        losses.append(collectives.total(torch.stack([lost.loss, *lost.parts.values()])) / world.size)
        positives.append(collectives.gather(lost.found.mined.index) if lost.found else torch.empty(0))
        torch.nn.utils.vector_to_parameters(
            torch.nn.utils.parameters_to_vector(online.parameters()) - 0.05 * gradients[-1], online.parameters()
        )
        objective.follow(online, 0.9)
        objective.remember(lost.projection_BVD, batch.index)
    nets = {"online": online, **objective.kept}
    buffers = {f"{name}.{key}": buffer for name, net in nets.items() for key, buffer in net.named_buffers()}
    return {
        "losses": torch.stack(losses),
        "gradients": torch.stack(gradients),
        "positives": torch.stack(positives),
        "buffers": torch.cat([buffer.double().flatten() for buffer in buffers.values()]),
        "memory": buffers.get("memory.keys_NVD", torch.empty(0)),
        "ids": buffers.get("memory.ids_N", torch.empty(0)),
    }


@contextmanager
def lost_wishes() -> Iterator[None]:
    """In the block, what a rank's loss wants of other ranks' images is lost on the way back, as it was with peers."""

    def own_rows(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.chunk(collectives.world_size())[collectives.rank()]

    def own_wish(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient

    with (
        mock.patch.object(collectives._Gather, "backward", staticmethod(own_rows)),
        mock.patch.object(collectives._Total, "backward", staticmethod(own_wish)),
    ):
        yield


def plain_runs(rank: int, world_size: int) -> dict[str, dict[str, Tensor]]:
    world = World(rank, world_size, rank, world_size)
    found = {f"{name}/{how}": plain_run(world, name, how) for name, how in VARIANTS}
    if world_size == 2:
        with lost_wishes():
            found |= {f"{name}/lost": plain_run(world, name, "none") for name in OBJECTIVES}
    return found


@pytest.fixture(scope="module")
def plain() -> dict[int, list[dict[str, Any]]]:
    """What each rank found, by size of the world."""
    return {size: run_ranks(plain_runs, size, size) for size in (1, *WORLDS)}


def error_of(found: Tensor, truth: Tensor) -> float:
    """Relative; of a truth of 0, such as MoCo's before it remembers anything, absolute."""
    return float(torch.linalg.vector_norm(found - truth) / (torch.linalg.vector_norm(truth) or 1))


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_ranks_equal_one_process_in_float64(plain: dict[int, Any], name: str, world_size: int) -> None:
    for how in (how for its, how in VARIANTS if its == name):
        one = plain[1][0][f"{name}/{how}"]
        for rank, found in enumerate(ranks[f"{name}/{how}"] for ranks in plain[world_size]):
            where = (how, rank)
            assert torch.equal(found["positives"], one["positives"]), where
            assert torch.allclose(found["losses"], one["losses"], rtol=1e-10, atol=1e-12), where
            for step in range(len(BATCHES)):
                assert error_of(found["gradients"][step], one["gradients"][step]) <= 1e-10, (*where, step)
            assert torch.allclose(found["buffers"], one["buffers"], rtol=1e-10, atol=1e-12), where


def test_the_comparison_is_not_blind(plain: dict[int, Any]) -> None:
    """Mining chooses, and changes the gradient, in every way and of every objective; a full memory is compared with."""
    one = plain[1][0]
    for name, how in VARIANTS:
        found, without = one[f"{name}/{how}"], one[f"{name}/none"]
        if how != "none":
            assert (found["positives"] >= 0).any(), (name, how)
            assert error_of(found["gradients"][2], without["gradients"][2]) > 1e-3, (name, how)
    for how in (how for its, how in VARIANTS if its == "moco"):
        assert error_of(one[f"moco_shuffled/{how}"]["gradients"][2], one[f"moco/{how}"]["gradients"][2]) > 1e-3, how
    chosen = [tuple(one[f"{name}/tracin_cosine"]["positives"].flatten().tolist()) for name in OBJECTIVES]
    assert len(set(chosen)) == len(OBJECTIVES)


def test_without_the_sum_in_the_backward_pass_ranks_are_wrong(plain: dict[int, Any]) -> None:
    """The objectives whose loss couples images of several ranks, and no others, need the gradients that come home."""
    for name in OBJECTIVES:
        broken, truth = plain[2][0][f"{name}/lost"], plain[1][0][f"{name}/none"]
        assert torch.allclose(broken["losses"][0], truth["losses"][0], rtol=1e-10)  # in silence
        error = error_of(broken["gradients"][0], truth["gradients"][0])
        assert error > 0.01 if name in COUPLED else error <= 1e-10, (name, error)


def engine_gradients(rank: int, world_size: int) -> dict[str, Tensor]:
    """Each objective's gradient of one mined step through DeepSpeed in fp32, by ZeRO stage."""
    from deepspeed.utils import safe_get_full_grad

    from tracekin.train.engine import build_engine

    world, found = World(rank, world_size, rank, world_size), {}
    for name, options in OBJECTIVES.items():
        for stage in STAGES if world_size > 1 else STAGES[:1]:
            online, objective = networks(torch.float32, **options)
            train = TrainConfig(global_batch=BATCH, zero_stage=stage, precision="fp32")  # type: ignore[arg-type]
            engine = build_engine(online, OptimiserConfig(), train, world)
            before, batch = (rows_of(global_batch(torch.float32, seed), world) for seed in (2, 1))
            objective.remember(objective.project(before.views, online(before.views), 0), before.index)
            losses = loss_with_mined_positives(engine, objective, batch, miner(objective, "feature"), **context())
            engine.backward(losses.loss)
            gradient = torch.cat([safe_get_full_grad(parameter).flatten() for parameter in online.parameters()])
            found[f"{name}/{stage}"] = gradient
    return found


def test_ranks_equal_one_process_through_deepspeed() -> None:
    one, two = (run_ranks(engine_gradients, size, size)[0] for size in (1, 2))
    for name in OBJECTIVES:
        assert torch.linalg.vector_norm(one[f"{name}/0"]) > 0, name
        for stage in STAGES:
            assert error_of(two[f"{name}/{stage}"], one[f"{name}/0"]) <= 1e-4, (name, stage)
