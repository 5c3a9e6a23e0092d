"""Rank arithmetic as a value: a partition over a thousand nodes is tested on one CPU with no process.

In ``src`` this is the only reader of RANK and SLURM_* variables.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from tracekin.config import UserError


@dataclass(frozen=True)
class World:
    """Where this process stands among all processes of a run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.size, self
        assert 0 <= self.local_rank < self.local_size <= self.size, self

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, count: int) -> slice:
        """This rank's contiguous, equal share of ``count`` things.

        Raises:
            UserError: if the ranks do not divide ``count``.
        """
        if count % self.size:
            raise UserError(
                f"{count} images a step cannot be divided among {self.size} ranks; use a multiple of {self.size}."
            )
        each = count // self.size
        return slice(self.rank * each, (self.rank + 1) * each)


def world_from_environment(environment: Mapping[str, str] | None = None) -> World:
    """The world that torchrun (RANK, WORLD_SIZE, ...) or srun (SLURM_PROCID, SLURM_NTASKS, ...) announces; else of one.

    Raises:
        UserError: if a variable of the launcher is missing or no number.
    """
    env = os.environ if environment is None else environment
    if "RANK" in env and "WORLD_SIZE" in env:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    elif "SLURM_PROCID" in env and "SLURM_STEP_NUM_TASKS" in env:
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
    else:
        return World()
    try:
        rank, size, local_rank = (int(env[name]) for name in names[:3])
        # SLURM_STEP_TASKS_PER_NODE reads "4(x2),3": the first entry serves homogeneous jobs, which ours are.
        local_size = int(env.get(names[3], str(size)).split("(")[0].split(",")[0])
        return World(rank, size, local_rank, local_size)
    except (KeyError, ValueError, AssertionError) as error:
        raise UserError(f"the launcher's variables {', '.join(names)} do not describe a rank: {error!r}.") from None


def meeting_point(environment: Mapping[str, str] | None = None) -> tuple[str, int]:
    """Address and port where the ranks meet: MASTER_ADDR and MASTER_PORT, else the Slurm step's first node.

    Under Slurm the port comes from the job's number and its restarts: two jobs on one node, or a job and what is left
    of its last start, do not meet.
    """
    env = os.environ if environment is None else environment
    alone = env.get("SLURM_STEP_NUM_NODES", "1") == "1"  # then no name needs to be resolved
    nodes = "127.0.0.1" if alone else env["SLURM_STEP_NODELIST"]
    job = int(env.get("SLURM_JOB_ID", "0")) + int(env.get("SLURM_STEP_ID", "0"))
    port = env.get("MASTER_PORT") or str(20000 + (job + 1009 * this_start(env)[1]) % 10000)
    return env.get("MASTER_ADDR") or first_node(nodes), int(port)


def this_start(environment: Mapping[str, str] | None = None) -> tuple[str, int]:
    """Slurm's name of this job (``12``, or ``12_3`` in an array; empty without Slurm), and how often it restarted."""
    env = os.environ if environment is None else environment
    job = env.get("SLURM_JOB_ID", "")
    if "SLURM_ARRAY_JOB_ID" in env:
        job = f"{env['SLURM_ARRAY_JOB_ID']}_{env.get('SLURM_ARRAY_TASK_ID', '0')}"
    return job, int(env.get("SLURM_RESTART_COUNT", "0"))


def first_node(nodes: str) -> str:
    """The first host of Slurm's short notation: ``gpu[03-07,9],login`` is ``gpu03``."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", nodes)
    assert match, nodes
    return "".join(part or "" for part in match.groups())
