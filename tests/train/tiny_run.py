"""A tiny net and a fixed global batch, for tests that compare worlds."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from tracekin import objective
from tracekin.config import Config, MiningConfig, ModelConfig, ObjectiveConfig, TrainConfig, own
from tracekin.data.batch import Batch
from tracekin.distributed.world import World
from tracekin.model.batch_norm import convert_batch_norms
from tracekin.model.networks import Online
from tracekin.monitor.metrics import Clock
from tracekin.objective import Objective, build_objective, build_online
from tracekin.train.miner import Miner

MODEL = ModelConfig(projector_hidden=24, projection=8, predictor_hidden=16)
HEADLESS = replace(MODEL, predictor_hidden=0)
"""Of the objectives without a predictor."""
BATCH = 16
CPU = torch.device("cpu")


def tiny_config(name: str = "byol", model: ModelConfig | None = None, **options: Any) -> Config:
    """Of the tiny networks for an objective."""
    predicts = "predictor_hidden" in own(name, options.get("version")).widths
    return Config(
        model=model or (MODEL if predicts else HEADLESS),
        objective=ObjectiveConfig(name=name, **options),  # type: ignore[arg-type]
        train=TrainConfig(global_batch=BATCH, precision="fp32"),
    )


@contextmanager
def tiny_backbone() -> Iterator[None]:
    """Networks built in the block have a small convolutional encoder instead of a ResNet."""

    def build(config: ModelConfig, channels: int, norm_groups: int = 0) -> nn.Module:
        net = nn.Sequential(
            nn.Conv2d(channels, 8, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        net.num_features = 16
        return convert_batch_norms(net, norm_groups)

    original = objective.build_backbone
    objective.build_backbone = build
    try:
        yield
    finally:
        objective.build_backbone = original


def networks(
    dtype: torch.dtype, seed: int = 0, name: str = "byol", model: ModelConfig | None = None, **options: Any
) -> tuple[Online, Objective]:
    """The tiny online network and its objective, whose target is a little apart from it, as after some training."""
    torch.manual_seed(seed)
    config = tiny_config(name, model, **options)
    with tiny_backbone():
        online = build_online(config)
    found = build_objective(config, online)
    if found.target is not None:
        with torch.no_grad():
            for parameter in found.target.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    for net in (online, *found.kept.values()):
        net.to(dtype)  # drawn in one dtype, so that all dtypes start from the same numbers
    return online, found


def global_batch(dtype: torch.dtype, seed: int = 1, views: int = 2) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    label = torch.nn.functional.one_hot(torch.arange(BATCH) % 3, 3).float()
    viewed = torch.randn(views, BATCH, 3, 12, 12, generator=generator, dtype=torch.float64).to(dtype)
    ids = 1000 * seed + torch.arange(BATCH) * 7 + 3  # other images of the same groups for every seed
    return Batch(views=viewed, index=ids, group=torch.arange(BATCH) // 2, label=label)


def rows_of(batch: Batch, world: World) -> Batch:
    share = world.share(BATCH)
    return Batch(
        views=batch.views[:, share], index=batch.index[share], group=batch.group[share], label=batch.label[share]
    )


def context(step: int = 5) -> dict[str, object]:
    return {"weight": 0.25, "step": step, "lr": 0.1, "clock": Clock(CPU)}


def miner(of: Objective, policy: str, local_size: int = 1, **mining: Any) -> Miner:
    return Miner(MiningConfig(policy=policy, **mining), of, 0, local_size)  # type: ignore[arg-type]
