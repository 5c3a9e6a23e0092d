"""What the GPU tests run, with the device as a parameter so that it is tried on CPU too."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, get_args

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.train.tiny_run import BATCH, global_batch, miner, networks, rows_of
from tracekin.config import Config, ModelConfig, OptimiserConfig, Policy, TrainConfig
from tracekin.data.batch import Batch
from tracekin.distributed import collectives
from tracekin.distributed.world import World
from tracekin.model.networks import Online
from tracekin.monitor.metrics import Clock, Meter
from tracekin.objective import Objective, build_objective, build_online
from tracekin.train.optimiser import build_optimiser
from tracekin.train.record import measure
from tracekin.train.step import Losses, loss_with_mined_positives

POLICIES = get_args(Policy)
STAGES = (0, 1, 2)
MODEL = ModelConfig(projector_hidden=256, projection=64, predictor_hidden=256)
UNWAITING: dict[str, dict[str, Any]] = {
    **{policy: {"policy": policy} for policy in POLICIES},
    "queue, sketch, k, mutual": {
        "policy": "tracin",
        "queue": 2 * BATCH,
        "queue_half_life": 3.0,
        "sketch_dim": 8,
        "k": 2,
        "keep": "mutual",
    },
    "quantile, compare": {"policy": "tracin_cosine", "keep": "quantile", "compare": "feature"},
}
"""By name, keys of ``mining`` with which a step must not wait for the device."""
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "bincount")


@contextmanager
def ieee_convolutions_and_products() -> Iterator[None]:
    """No TF32 in the block: cuDNN's convolutions use it by default."""
    backends = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def losses_and_gradient(
    online: Online, objective: Objective, batch: Batch, policy: str, device: torch.device
) -> dict[str, Any]:
    """Loss, whole gradient and positives of one step on ``device``, brought to the CPU."""
    for net in (online, *objective.kept.values()):
        net.to(device)
    losses = loss_with_mined_positives(online, objective, batch.to(device), miner(objective, policy), **context(device))
    losses.loss.backward()
    return {**described(losses), "gradient": flat_gradient(online)}


def fp32_weights_step(net: str, device: torch.device, policy: str, *, bf16: bool) -> dict[str, Any]:
    """``losses_and_gradient`` of the tiny net, or of a ResNet-18 on 16 images of 48 px, without TF32."""
    batch = global_batch(torch.float32)
    if net == "tiny":
        online, objective = networks(torch.float32)
        online.autocast = objective.kept["target"].autocast = bf16
    else:
        torch.manual_seed(0)
        config = Config(model=MODEL, train=TrainConfig(precision="bf16" if bf16 else "fp32"))
        online = build_online(config)
        objective = build_objective(config, online)
        views = torch.randn(2, BATCH, 3, 48, 48, generator=torch.Generator().manual_seed(1))
        batch = replace(batch, views=views)
    with ieee_convolutions_and_products():
        return losses_and_gradient(online, objective, batch, policy, device)


def rank_steps(rank: int, device_name: str) -> dict[str, dict[str, Any]]:
    """The global batch's loss, gradient and positives for every policy: without DeepSpeed in float64, with it in fp32.

    Keys are POLICY for the first and POLICY/STAGE for the second. Several ranks may share one GPU, over gloo.
    """
    torch.set_num_threads(1)
    device = torch.device(device_name)
    world = World(rank, collectives.world_size())  # the first of its node for all it knows, so all take GPU 0
    results = {}
    with ieee_convolutions_and_products():
        for policy in POLICIES:
            batch = rows_of(global_batch(torch.float64), world)
            one = losses_and_gradient(*networks(torch.float64), batch, policy, device)
            mean = {key: collectives.total(one[key]) / world.size for key in ("loss", "gradient")}
            results[policy] = {**one, **mean}
            for stage in STAGES:
                results[f"{policy}/{stage}"] = engine_step(world, device, policy, stage)
    return results


def engine_step(world: World, device: torch.device, policy: str, stage: int) -> dict[str, Any]:
    """One step through DeepSpeed in fp32, its gradient read before the update."""
    from deepspeed.utils import safe_get_full_grad

    from tracekin.train.engine import build_engine

    online, objective = networks(torch.float32)
    for net in (online, *objective.kept.values()):
        net.to(device)
    train = TrainConfig(global_batch=BATCH, zero_stage=stage, precision="fp32")  # type: ignore[arg-type]
    engine = build_engine(online, OptimiserConfig(), train, world)
    batch = rows_of(global_batch(torch.float32), world).to(device)
    losses = loss_with_mined_positives(engine, objective, batch, miner(objective, policy), **context(device))
    engine.backward(losses.loss)
    gradient = torch.cat([safe_get_full_grad(p).flatten() for p in online.parameters()]).cpu()
    one = described(losses)
    engine.step()
    objective.follow(engine.module, 0.9)
    updated = torch.cat([p.detach().flatten() for p in online.parameters()]).cpu()
    return {**one, "loss": collectives.total(one["loss"]) / world.size, "gradient": gradient, "updated": updated}


class _Unread(TorchDispatchMode):
    """On the CPU: an error at operators that would wait for a GPU, because the host needs what they find."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            place is not None and place.dtype in (torch.bool, torch.uint8) for place in args[1]
        )
        if name in WAITING or by_mask:
            raise RuntimeError(f"{func} would wait for the device")
        return func(*args, **(kwargs or {}))


@contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """A RuntimeError where the host waits for the device: by torch's own check on CUDA, by operator on the CPU."""
    if device.type != "cuda":
        with _Unread():
            yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def unwaiting_step(device: torch.device, **mining: Any) -> dict[str, float]:
    """Two steps with their updates and what is measured beside them, the second under ``no_waiting``.

    Without DeepSpeed, whose own step waits for the device under ZeRO.

    Returns:
        The sums that were measured.
    """
    online, objective = networks(torch.float32)
    for net in (online, *objective.kept.values()):
        net.to(device)
    batch, chooser, meter = global_batch(torch.float32).to(device), miner(objective, **mining), Meter(device)
    if chooser.history:
        chooser.history.remember(online, objective.target, 0.1)
    optimiser = build_optimiser(online, OptimiserConfig(), 0)

    def step(number: int) -> None:
        losses = loss_with_mined_positives(online, objective, batch, chooser, **context(device) | {"step": number})
        losses.loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        objective.follow(online, 0.9)
        measure(meter, losses, chooser, number)

    step(5)  # libraries start, constants and the queue are made
    with no_waiting(device):
        step(6)
    return meter.flush()


def described(losses: Losses) -> dict[str, Any]:
    """On the CPU: this rank's loss, and every rank's positives."""
    index = collectives.gather(losses.found.mined.index[:, 0]).cpu() if losses.found else torch.empty(0)
    return {"loss": losses.loss.detach().cpu(), "index": index}


def flat_gradient(online: Online) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in online.parameters() if p.grad is not None]).cpu()


def context(device: torch.device) -> dict[str, Any]:
    return {"weight": 0.25, "step": 5, "lr": 0.1, "clock": Clock(device)}


def relative(found: torch.Tensor, truth: torch.Tensor) -> float:
    """|found - truth| / |truth| over all entries together, in float64."""
    truth = truth.double()
    return float(torch.linalg.vector_norm(found.double() - truth) / torch.linalg.vector_norm(truth))
