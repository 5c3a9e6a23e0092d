"""A tiny net and a fixed global batch, for tests that compare worlds."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tracekin.config import MiningConfig, ModelConfig
from tracekin.data.batch import Batch
from tracekin.distributed.world import World
from tracekin.model import byol
from tracekin.model.batch_norm import convert_batch_norms
from tracekin.monitor.metrics import Clock
from tracekin.train.miner import Miner

MODEL = ModelConfig(projector_hidden=24, projection=8, predictor_hidden=16)
BATCH = 16
CPU = torch.device("cpu")


@contextmanager
def tiny_backbone() -> Iterator[None]:
    """Networks built in the block have a small convolutional encoder instead of a ResNet."""

    def build(config: ModelConfig, channels: int) -> nn.Module:
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
        return convert_batch_norms(net)

    original = byol.build_backbone
    byol.build_backbone = build
    try:
        yield
    finally:
        byol.build_backbone = original


def networks(dtype: torch.dtype, seed: int = 0) -> tuple[byol.Online, byol.Target]:
    """The tiny online network, and a target that is a little apart from it, as after some training."""
    torch.manual_seed(seed)
    with tiny_backbone():
        online = byol.Online(MODEL, 3)
    target = byol.Target(online)
    with torch.no_grad():
        for parameter in target.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return online.to(dtype), target.to(dtype)  # drawn in one dtype, so that all dtypes start from the same numbers


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


def miner(online: byol.Online, policy: str, local_size: int = 1, **mining: Any) -> Miner:
    return Miner(MiningConfig(policy=policy, **mining), online, 0, local_size)  # type: ignore[arg-type]
