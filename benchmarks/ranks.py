"""Ranks for benchmarks and GPU tests: ``run_ranks(function, world_size, *args)`` returns each rank's value.

Every rank is a fresh process, because one that is forked cannot use CUDA if its parent ever looked for it. Ranks meet
in a file, so no port can be taken.
"""

import os
import pickle
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, backend: str | None = "gloo", timeout: float = 240
) -> list[Any]:
    """Run ``function(rank, *args)`` on ``world_size`` new processes, one CPU thread each.

    Args:
        function: at the top of its module, as are the classes of its arguments and value.
        world_size: number of processes.
        args: picklable.
        backend: of the process group; None starts none.
        timeout: seconds for all ranks together, their imports included (5 to 13 s).

    Returns:
        The ranks' values, by rank. Tensors should lie on the CPU.

    Raises:
        ProcessRaisedException: with the traceback of the rank that failed; the others are killed.
        TimeoutError: all are killed.
    """
    deadline = time.monotonic() + timeout
    with tempfile.TemporaryDirectory() as folder:
        ranks = torch.multiprocessing.spawn(
            _rank, (world_size, folder, backend, timeout, function, args), nprocs=world_size, join=False
        )
        try:
            while not ranks.join(timeout=max(0.1, deadline - time.monotonic()), grace_period=1):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{world_size} ranks of {function.__name__} had not returned after {timeout} s")
        finally:
            for process in ranks.processes:
                process.kill()
        return [pickle.loads((Path(folder) / f"{rank}.pickle").read_bytes()) for rank in range(world_size)]


def _rank(
    rank: int,
    world_size: int,
    folder: str,
    backend: str | None,
    timeout: float,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}  # LOCAL_RANK is set where the engine is built
    if backend is not None:
        store = dist.FileStore(str(Path(folder) / "store"), world_size)
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout)
        )
    value = function(rank, *args)
    (Path(folder) / f"{rank}.pickle").write_bytes(pickle.dumps(value))
    if backend is not None:
        dist.barrier()  # a rank that leaves early takes the connections of the others with it
        dist.destroy_process_group()
