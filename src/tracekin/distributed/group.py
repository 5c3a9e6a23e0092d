"""The process group as a context manager."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from tracekin.distributed.collectives import TIMEOUT
from tracekin.distributed.network import interface_to
from tracekin.distributed.world import World, meeting_point


@contextmanager
def process_group(world: World, device: torch.device, timeout: timedelta = TIMEOUT) -> Iterator[None]:
    """Initialise torch.distributed for the block (gloo on CPU, NCCL on CUDA); a world of one needs no launcher.

    Several ranks meet at torchrun's store, or where world.meeting_point says.

    Raises:
        RuntimeError: if the ranks do not meet within ``timeout``: a run never falls back to private trainings.
    """
    if dist.is_initialized():  # a test or a notebook brought its own
        yield
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    # Mining's exchange is on its way while batch norms reduce on another communicator: without an order that all ranks
    # keep, two communicators can wait for each other.
    os.environ.setdefault("NCCL_LAUNCH_ORDER_IMPLICIT", "1")
    if world.size == 1:
        store = dist.HashStore()  # type: ignore[attr-defined]  # documented, but not in its __all__
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    else:
        address, port = meeting_point()
        where = f"tcp://{address}:{port}"
        if "TORCHELASTIC_RUN_ID" in os.environ:
            where = "env://"  # torchrun's agent already serves a store there
        else:
            # Else gloo takes the interface of this host's name, which Debian resolves to a loopback address.
            interface = os.environ.get("GLOO_SOCKET_IFNAME") or interface_to(address)
            if interface:
                os.environ["GLOO_SOCKET_IFNAME"] = interface
            if world.is_main:
                print(
                    f"{world.size} ranks meet at {address}:{port} over {interface or 'any interface'};",
                    _cores(),
                    flush=True,
                )
        dist.init_process_group(backend, where, rank=world.rank, world_size=world.size, timeout=timeout)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _cores() -> str:
    """What the launcher's binding leaves this rank: one core alone, for all loaders too, is a mistake often made."""
    if not hasattr(os, "sched_getaffinity"):
        return ""
    cores = sorted(os.sched_getaffinity(0))
    return f"rank 0 may use {len(cores)} cores: {cores[0]} to {cores[-1]}"
