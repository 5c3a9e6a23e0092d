"""W ranks = one process, for every objective: losses, gradients, positives, buffers and what is remembered.

Peers got this wrong in silence: lightly's all-reduces and gathers lost gradients, which came out 1/W (its issues 1920
and 1977). ``lost_wishes`` does the same here, and the test that uses it says which objectives it breaks. Tried as well:

- no gradient through an all-reduce: barlow_twins, vicreg; through a gather: simclr. The losses stay right;
- covariances about a rank's own mean: vicreg; its own images taken for the first rank's: simclr, wmse;
- a rank's own keys as the only negatives: moco_v3; as all that is remembered: moco;
- keys put back in another order than they were dealt, or groups within a rank's share: moco_shuffled, and where running
  statistics are one rank's, its buffers alone.

Shape suffixes: B images of a rank, N of all ranks or in a memory, V views, D projection width.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, get_args
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.ranks import run_ranks
from tests.train.tiny_run import BATCH, context, global_batch, miner, networks, rows_of, tiny_config
from tracekin.config import ModelConfig, ObjectiveName, OptimiserConfig, TrainConfig
from tracekin.data.batch import Batch
from tracekin.distributed import collectives
from tracekin.distributed.world import World
from tracekin.model.batch_norm import GroupBatchNorm
from tracekin.objective.objective import permutation
from tracekin.train.errors import DriftError
from tracekin.train.guard import Fingerprint
from tracekin.train.step import loss_with_mined_positives, train_step

GROUPS = 4
NARROW = ModelConfig(projector_hidden=24, projection=3)
"""Of W-MSE: the batch makes two sub-batches, which span ranks wherever there are several."""
OBJECTIVES: dict[str, dict[str, Any]] = {
    "byol": {"name": "byol"},
    "simsiam": {"name": "simsiam"},
    "simclr": {"name": "simclr"},
    "moco": {"name": "moco", "queue": 2 * BATCH},
    "moco_shuffled": {"name": "moco", "queue": 2 * BATCH, "norm": "shuffled", "norm_groups": GROUPS},
    "moco_v3": {"name": "moco", "version": 3},
    "barlow_twins": {"name": "barlow_twins"},
    "vicreg": {"name": "vicreg"},
    "wmse": {"name": "wmse", "model": NARROW, "sub_batch": 8},
}
REMEMBERING = ("moco", "moco_shuffled")
CONTRASTIVE = ("simclr", "moco", "moco_shuffled", "moco_v3")
COUPLED = ("simclr", "barlow_twins", "vicreg", "wmse")
"""Objectives in whose loss an image's gradient comes from other ranks' images too."""
MINING: dict[str, dict[str, Any]] = {
    "none": {"policy": "none"},
    "tracin_cosine": {"policy": "tracin_cosine"},
    "feature": {"policy": "feature", "k": 2},
    "ghost": {"policy": "ghost"},
    "tracin_cp": {"policy": "tracin_cp"},
    # MoCo's negatives lie in the past: for one of them to be mined the miner must remember it too.
    "eliminate": {"policy": "tracin_cosine", "mode": "eliminate", "queue": 2 * BATCH, "k": 3},
}
ALLOWED = {"tracin_cp": set(OBJECTIVES) - set(REMEMBERING), "eliminate": set(CONTRASTIVE)}
VARIANTS = [(name, how) for name in OBJECTIVES for how in MINING if name in ALLOWED.get(how, OBJECTIVES)]
WORLDS = (2, 4)
STAGES = (0, 1, 2)
BATCHES = (1, 2, 1)
"""Seeds of the batches of what remembers: the memory is full at the third step, and knows its images."""


def batches(name: str, how: str) -> tuple[int, ...]:
    return BATCHES if name in REMEMBERING or "queue" in MINING[how] else BATCHES[:1]


def steps(world: World, name: str, how: str) -> dict[str, Tensor]:
    """Steps in float64 without DeepSpeed: what they computed and what they left."""
    dtype, options = torch.float64, OBJECTIVES[name]
    online, objective = networks(dtype, **options)
    found = miner(objective, **MINING[how])
    if found.history:
        for seed in (7, 8):
            older, its = networks(dtype, seed, **options)
            found.history.remember(older, its.target, lr=0.1 * seed)
    losses, gradients, positives, keys = [], [], [], []
    for step, seed in enumerate(batches(name, how)):
        batch = rows_of(global_batch(dtype, seed), world)
        lost = loss_with_mined_positives(online, objective, batch, found, **context(step))
        own = torch.autograd.grad(lost.loss, [*online.parameters()], materialize_grads=True)
        gradients.append(collectives.total(torch.cat([part.flatten() for part in own])) / world.size)
        losses.append(collectives.total(torch.stack([lost.loss, *lost.parts.values()])) / world.size)
        positives.append(collectives.gather(lost.found.mined.index) if lost.found else torch.empty(0))
        keys.append(collectives.gather(lost.projection_BVD))
        moved = nn.utils.parameters_to_vector(online.parameters()) - 0.05 * gradients[-1]
        nn.utils.vector_to_parameters(moved, online.parameters())
        objective.follow(online, 0.9)
        objective.remember(lost.projection_BVD, batch.index)
    nets = {"online": online, **objective.kept}
    buffers = {f"{name}.{key}": buffer for name, net in nets.items() for key, buffer in net.named_buffers()}
    return {
        "losses": torch.stack(losses),
        "gradients": torch.stack(gradients),
        "positives": torch.stack(positives),
        "keys": torch.stack(keys),
        "buffers": torch.cat([buffer.double().flatten() for buffer in buffers.values()]),
        "memory": buffers.get("memory.keys_NVD", torch.empty(0)),
        "ids": buffers.get("memory.ids_N", torch.empty(0)),
    }


def through_deepspeed(world: World, name: str, stage: int) -> dict[str, Tensor]:
    """Gradient and positives of the last of the steps in fp32, with the first weights and the keys of those before."""
    from deepspeed.utils import safe_get_full_grad

    from tracekin.train.engine import build_engine

    online, objective = networks(torch.float32, **OBJECTIVES[name])
    train = TrainConfig(global_batch=BATCH, zero_stage=stage, precision="fp32")  # type: ignore[arg-type]
    engine = build_engine(online, OptimiserConfig(), train, world)
    found = miner(objective, "tracin_cosine")
    *earlier, last = enumerate(batches(name, "tracin_cosine"))
    for step, seed in earlier:
        batch = rows_of(global_batch(torch.float32, seed), world)
        objective.remember(objective.project(batch.views, engine(batch.views), step), batch.index)
    batch = rows_of(global_batch(torch.float32, last[1]), world)
    losses = loss_with_mined_positives(engine, objective, batch, found, **context(last[0]))
    engine.backward(losses.loss)
    assert losses.found is not None
    return {
        "gradient": torch.cat([safe_get_full_grad(p).flatten() for p in online.parameters()]),
        "positives": collectives.gather(losses.found.mined.index),
    }


HARMS: dict[str, Callable[[Any], Tensor]] = {
    "keys_NVD": lambda memory: memory.keys_NVD[3, 1].add_(1),
    "ids_N": lambda memory: memory.ids_N.copy_(memory.ids_N.roll(1)),  # the same images in another order
    "written": lambda memory: memory.written.add_(1),
}
"""By what the guard names."""


def drifted(world: World) -> list[str]:
    """What the guard says of ranks that remember the same, and once another rank's memory differs in HARMS."""
    online, objective = networks(torch.float32, **OBJECTIVES["moco"])
    batch = rows_of(global_batch(torch.float32), world)
    objective.remember(objective.project(batch.views, online(batch.views), 0), batch.index)
    manifest: Any = SimpleNamespace(
        fingerprint=lambda: "7f", shards=lambda split: [SimpleNamespace(samples=range(4 * BATCH))]
    )
    guard = Fingerprint(tiny_config("moco"), manifest, world, {"online": online, **objective.kept})
    planned = torch.from_numpy(next(guard.rows).numbers)
    memory, said = objective.kept["memory"], []
    sound = {name: tensor.clone() for name, tensor in memory.state_dict().items()}
    for harm in (None, *HARMS.values()):
        if harm is not None and world.rank == 2:
            harm(memory)
        try:
            guard.compare(0, Batch(batch.views, planned, batch.group, batch.label))
            said.append("")
        except DriftError as error:
            said.append(str(error))
        memory.load_state_dict(sound)
    return said


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


def one_rank(rank: int, world_size: int) -> dict[str, dict[str, Any]]:
    world = World(rank, world_size, rank, world_size)
    found: dict[str, dict[str, Any]] = {f"{name}/{how}": steps(world, name, how) for name, how in VARIANTS}
    for stage in {1: STAGES[:1], 2: STAGES}.get(world_size, ()):
        found |= {f"{name}/zero {stage}": through_deepspeed(world, name, stage) for name in OBJECTIVES}
    if world_size == WORLDS[1]:
        found["drifted"] = {"said": drifted(world)}
    if world_size == WORLDS[0]:
        with lost_wishes():
            found |= {f"{name}/lost": steps(world, name, "none") for name in OBJECTIVES}
    return found


@pytest.fixture(scope="module")
def worlds() -> dict[int, list[dict[str, Any]]]:
    """What each rank found, by size of the world."""
    return {size: run_ranks(one_rank, size, size) for size in (1, *WORLDS)}


@torch.no_grad()
def error_of(found: Tensor, truth: Tensor) -> float:
    """Relative to the length of the truth; both may be 0, as MoCo's gradient is while its memory is empty."""
    if not truth.any():
        return float(found.abs().max())
    return float(torch.linalg.vector_norm(found - truth) / torch.linalg.vector_norm(truth))


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_ranks_equal_one_process_in_float64(worlds: dict[int, Any], name: str, world_size: int) -> None:
    for how in (how for its, how in VARIANTS if its == name):
        one = worlds[1][0][f"{name}/{how}"]
        for found in (rank[f"{name}/{how}"] for rank in worlds[world_size]):
            assert torch.equal(found["positives"], one["positives"]), how
            assert torch.allclose(found["losses"], one["losses"], rtol=1e-10, atol=1e-12), how
            for ours, truth in zip(found["gradients"], one["gradients"], strict=True):
                assert error_of(ours, truth) <= 1e-10, how
            assert torch.allclose(found["buffers"], one["buffers"], rtol=1e-10, atol=1e-12), how


def test_the_comparison_is_not_blind(worlds: dict[int, Any]) -> None:
    """Every way of mining chooses something and moves every objective's gradient; so do the groups of batch norm."""
    one = worlds[1][0]
    assert {options["name"] for options in OBJECTIVES.values()} == set(get_args(ObjectiveName))
    for name, how in VARIANTS:
        found, without = one[f"{name}/{how}"], one[f"{name}/none"]
        assert torch.linalg.vector_norm(found["gradients"][-1]) > 1e-3, (name, how)
        if how != "none":
            last = len(without["gradients"]) - 1  # that both made
            assert error_of(found["gradients"][last], without["gradients"][last]) > 1e-3, (name, how)
            assert (found["positives"][last] >= 0).any(), (name, how)
    assert error_of(one["moco_shuffled/none"]["gradients"][-1], one["moco/none"]["gradients"][-1]) > 1e-3
    chosen = [tuple(one[f"{name}/tracin_cosine"]["positives"][-1].flatten().tolist()) for name in OBJECTIVES]
    assert len(set(chosen)) == len(OBJECTIVES)


def test_without_the_sum_in_the_backward_pass_ranks_are_wrong(worlds: dict[int, Any]) -> None:
    """The objectives whose loss couples images of several ranks, and no others, need the gradients that come home."""
    for name in OBJECTIVES:
        broken, truth = worlds[WORLDS[0]][0][f"{name}/lost"], worlds[1][0][f"{name}/none"]
        assert torch.allclose(broken["losses"][0], truth["losses"][0], rtol=1e-10)  # in silence
        error = error_of(broken["gradients"][-1], truth["gradients"][-1])
        assert error > 0.05 if name in COUPLED else error <= 1e-10, (name, error)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_ranks_equal_one_process_through_deepspeed(worlds: dict[int, Any], name: str) -> None:
    one = worlds[1][0][f"{name}/zero 0"]
    for stage in STAGES:
        many = worlds[2][0][f"{name}/zero {stage}"]
        assert torch.equal(many["positives"], one["positives"]), stage
        assert error_of(many["gradient"], one["gradient"]) <= 1e-4, stage
    if name not in REMEMBERING:  # in steps of others it would have moved
        truth = worlds[1][0][f"{name}/tracin_cosine"]["gradients"][0]
        assert error_of(one["gradient"], truth) <= 1e-3


@pytest.mark.parametrize("world_size", [1, *WORLDS])
@pytest.mark.parametrize("name", REMEMBERING)
def test_every_rank_remembers_the_keys_of_the_global_batches_in_their_order(
    worlds: dict[int, Any], name: str, world_size: int
) -> None:
    ids = torch.cat([global_batch(torch.float64, seed).index for seed in (BATCHES[2], BATCHES[1])])
    for rank in worlds[world_size]:
        found = rank[f"{name}/none"]
        third, second = found["keys"][2], found["keys"][1]  # the third batch stands where the first one was
        assert torch.equal(found["memory"], F.normalize(torch.cat((third, second)), dim=-1))
        assert torch.equal(found["ids"], ids)
        assert torch.equal(found["memory"], worlds[world_size][0][f"{name}/none"]["memory"])


def test_the_guard_names_the_rank_whose_memory_differs(worlds: dict[int, Any]) -> None:
    for rank in worlds[4]:
        same, *differing = rank["drifted"]["said"]
        assert same == ""
        for said, name in zip(differing, HARMS, strict=True):
            assert said == f"after step 1 rank 2 differs in memory.{name}; the last checkpoint is sound."


def test_own_older_keys_and_empty_places_are_no_negatives() -> None:
    """Whatever stands there, an image's loss and gradient are the same bits; in another image's place they are not."""
    online, objective = networks(torch.float64, name="moco", queue=3 * BATCH)
    batch = global_batch(torch.float64)
    outputs = online(batch.views)
    projection_BVD = objective.project(batch.views, outputs, 0)
    for seed in (1, 2):  # the images' own keys, then others'; the rest stays empty
        objective.remember(torch.randn_like(projection_BVD), global_batch(torch.float64, seed).index)
    memory = objective.kept["memory"]

    def first(place: int | None = None) -> Tensor:
        """Loss and gradient of the first image, with another key in a place."""
        before = memory.keys_NVD.clone()
        if place is not None:
            memory.keys_NVD[place] = 1 - memory.keys_NVD[place]
        compared = objective.compare(outputs.output[:1], projection_BVD[:1], batch.index[:1], 0)
        loss = compared.loss().loss
        gradient_BVD = torch.autograd.grad(loss, outputs.output, retain_graph=True)[0]
        found = torch.cat((loss[None], gradient_BVD[:1].flatten(), compared.delta().flatten()))
        memory.keys_NVD.copy_(before)
        return found

    assert first()[0] > 0
    assert torch.equal(memory.ids_N[2 * BATCH :], torch.full((BATCH,), -1))
    for place in (0, 2 * BATCH, 3 * BATCH - 1):
        assert torch.equal(first(place), first()), place
    for place in (1, BATCH, 2 * BATCH - 1):
        assert not torch.allclose(first(place), first()), place


class PlainEngine:
    """What ``train_step`` asks of DeepSpeed, without it."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.optimiser = torch.optim.SGD(module.parameters(), 0.1)

    def __call__(self, views: Tensor) -> Any:
        return self.module(views)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self.optimiser.step()


@pytest.mark.parametrize("accepted", [False, True])
def test_a_refused_step_writes_nothing(accepted: bool) -> None:
    online, objective = networks(torch.float64, **OBJECTIVES["moco"])
    batch = global_batch(torch.float64)
    objective.remember(torch.randn(BATCH, 2, 8).double(), global_batch(torch.float64, 2).index)
    kept = {"online": online, **objective.kept}
    names = {"online.projector.1.weight", "target.projector.1.weight", "memory.keys_NVD", "memory.ids_N"}

    def state() -> dict[str, Tensor]:
        whole = {
            f"{name}.{key}": value.clone() for name, net in kept.items() for key, value in net.state_dict().items()
        }
        return {key: whole[key] for key in (*names, "memory.written")}

    before = state()
    arguments = context() | {"tau": 0.9, "accept": lambda loss: accepted}
    train_step(PlainEngine(online), objective, batch, miner(objective, "tracin"), **arguments)  # type: ignore[arg-type]
    changed = {key for key, value in state().items() if not torch.equal(value, before[key])}
    assert changed == (before.keys() if accepted else set())


def in_plain_groups(backbone: nn.Module, images: Tensor) -> Tensor:
    """Features by torch's own batch norm, a forward pass a group of consecutive images."""

    def plain(module: nn.Module) -> nn.Module:
        for name, child in module.named_children():
            if isinstance(child, GroupBatchNorm):
                norm = nn.BatchNorm2d(child.num_features).to(child.weight)
                norm.load_state_dict(child.state_dict())
                setattr(module, name, norm)
        return module

    net = plain(copy.deepcopy(backbone))
    assert sum(type(child) is nn.BatchNorm2d for child in net) == 2
    return torch.cat([net(part) for part in images.split(BATCH // GROUPS)])


@pytest.mark.parametrize("world_size", [1, *WORLDS])
def test_shuffled_keys_are_those_of_groups_made_by_hand(worlds: dict[int, Any], world_size: int) -> None:
    online, objective = networks(torch.float64, **OBJECTIVES["moco_shuffled"])
    batch = global_batch(torch.float64, BATCHES[0])
    order = permutation(BATCH, 0, 0)  # of the first step
    target = objective.kept["target"]
    expected, unshuffled = torch.empty(BATCH, 2, 8).double(), torch.empty(BATCH, 2, 8).double()
    for u, view in enumerate(batch.views):
        expected[order, u] = target.projector(in_plain_groups(target.backbone, view[order]))
        unshuffled[:, u] = target.projector(in_plain_groups(target.backbone, view))
    found = worlds[world_size][0]["moco_shuffled/none"]["keys"][0]
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-12)
    assert error_of(unshuffled, expected) > 0.01
    features = torch.stack([in_plain_groups(online.backbone, view) for view in batch.views], 1)
    outputs = torch.stack([online.projector(features[:, u]) for u in range(2)], 1)
    assert torch.allclose(online(batch.views).output, outputs, rtol=1e-10, atol=1e-12)


def test_keys_are_normalised_among_others_than_their_queries() -> None:
    """Which images of the batch move when one image does: its group's, and keys and queries have other groups."""
    online, objective = networks(torch.float64, **OBJECTIVES["moco_shuffled"])
    batch = global_batch(torch.float64)

    def embedded(views: Tensor) -> tuple[Tensor, Tensor]:
        outputs = online(views)
        return outputs.output.detach(), objective.project(views, outputs, 0)

    before = embedded(batch.views)
    meetings = []
    for image in range(BATCH):
        views = batch.views.clone()
        views[:, image] += 1
        of_query, of_key = (
            set((now - was).abs().amax((1, 2)).nonzero().flatten().tolist())
            for now, was in zip(embedded(views), before, strict=True)
        )
        size = BATCH // GROUPS
        assert of_query == {*range(image // size * size, image // size * size + size)}
        assert len(of_key) == size
        meetings.append(len(of_query & of_key) - 1)
    # Of the 3 others of a query's group a fifth each would be the key's by chance.
    assert sum(meetings) / BATCH < 1
