"""The process group as a context manager."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from tracekin.distributed.world import World


@contextmanager
def process_group(world: World, device: torch.device, timeout: timedelta = timedelta(minutes=30)) -> Iterator[None]:
    """Initialise torch.distributed for the block (gloo on CPU, NCCL on CUDA); a world of one needs no launcher.

    MASTER_ADDR and MASTER_PORT are read from the environment when there are several ranks, as torchrun sets them.

    Raises:
        RuntimeError: if the ranks do not meet within ``timeout``: a run never falls back to private trainings.
    """
    if dist.is_initialized():  # a test or a notebook brought its own
        yield
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    if world.size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29500")
        dist.init_process_group(backend, rank=world.rank, world_size=world.size, timeout=timeout)
    try:
        yield
    finally:
        dist.destroy_process_group()
