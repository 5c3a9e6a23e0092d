"""Where jobs run: slurm/profiles/*.yaml as a typed Profile, checked against what Slurm has."""

import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from launch import slurm
from tracekin.config import Config, UserError, load

PROFILES = Path(__file__).parent.parent / "slurm" / "profiles"


@dataclass(frozen=True)
class Profile:
    """One way to run jobs on one site. The sentence under each field is the manual."""

    cluster: Literal["slurm", "local", "debug"] = "slurm"
    """Slurm; or this machine, in processes of their own (local) or in the command itself (debug)."""
    slurm_conf: str = ""
    """Path of the cluster's slurm.conf, relative to the checkout or absolute; empty takes the machine's own."""
    partition: str = ""
    """Slurm partition; empty takes the cluster's default. So do account and qos."""
    account: str = ""
    """Slurm account that is charged."""
    qos: str = ""
    """Slurm quality of service."""
    constraint: str = ""
    """Features that the nodes must have, such as a100&ib."""
    nodes: int = 1
    """Nodes of a pretraining; one task a GPU. All other jobs take one node and one task."""
    gpus: int = 0
    """GPUs a node; 0 trains on CPUs."""
    tasks: int = 1
    """Tasks a node where gpus is 0."""
    cpus: int = 1
    """CPU cores a task: its loader processes and itself."""
    memory_gb: float = 0.0
    """Memory a task, GB; 0 takes the partition's default."""
    minutes: int = 60
    """Time limit of a pretraining. A run that needs longer is requeued and goes on."""
    other_minutes: int = 60
    """Time limit of an evaluation, a table, a slice of a packing; USR2 leads it by half of it at most."""
    signal_seconds: int = 120
    """How long before the time limit Slurm sends USR2, upon which the run saves and is requeued."""
    max_restarts: int = 50
    """How often a job is requeued at most: after time limits, preemptions and deaths by signal together."""
    setup: tuple[str, ...] = ()
    """Lines of shell that run before srun: module load, conda activate, export."""
    container: str = ""
    """What runs a command inside a container image, with its arguments: apptainer exec --nv /images/torch.sif"""

    def __post_init__(self) -> None:
        for key in ("nodes", "tasks", "cpus", "minutes", "other_minutes", "signal_seconds"):
            if getattr(self, key) < 1:
                raise UserError(f"{key}={getattr(self, key)} is out of range: accepted is 1 or more.")
        for key in ("gpus", "memory_gb", "max_restarts"):
            if getattr(self, key) < 0:
                raise UserError(f"{key}={getattr(self, key)} is out of range: accepted is 0 or more.")
        if self.signal_seconds >= 60 * self.minutes:
            raise UserError(
                f"signal_seconds={self.signal_seconds} is as long as minutes={self.minutes} itself: a run would be told"
                " to stop as it starts. Raise minutes."
            )
        if self.cluster != "slurm" and self.nodes != 1:
            raise UserError(f"nodes={self.nodes}: cluster={self.cluster} is this machine alone; accepted is 1.")
        if self.cluster == "debug" and self.tasks_per_node != 1:
            raise UserError(f"cluster=debug runs one task in the command itself, not {self.tasks_per_node}.")

    @property
    def tasks_per_node(self) -> int:
        return self.gpus or self.tasks

    @property
    def num_tasks(self) -> int:
        return self.nodes * self.tasks_per_node

    def of_one_task(self) -> "Profile":
        """The same site for a job of one task, with at most one GPU."""
        lead = min(self.signal_seconds, 30 * self.other_minutes)
        return replace(self, nodes=1, gpus=min(1, self.gpus), tasks=1, minutes=self.other_minutes, signal_seconds=lead)


def read_profile(name: str, overrides: Sequence[str] = (), cluster: str | None = None) -> Profile:
    """A profile by its name in slurm/profiles, or by the path of a YAML file.

    Args:
        name: such as ``dev``, or a path that ends in .yaml.
        overrides: ``key=value`` for single fields.
        cluster: takes the place of the profile's, for a try without Slurm.

    Raises:
        UserError: no such profile, an unknown key, a value out of range.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else PROFILES / f"{name}.yaml"
    if not os.path.isfile(path):  # Path.is_file raises where a name is too long
        known = sorted(p.stem for p in PROFILES.glob("*.yaml"))
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]}?" if near else f"accepted: {', '.join(known)}, or the path of a YAML file."
        raise UserError(f"there is no profile {name} in slurm/profiles; {hint}")
    extra = [*overrides, *([f"cluster={cluster}"] if cluster else [])]
    try:
        profile = load(Profile, path, extra)
    except UserError as error:
        raise UserError(f"{error}" if str(path) in str(error) else f"profile {name}: {error}") from None
    if profile.slurm_conf:
        profile = replace(profile, slurm_conf=str(Path(profile.slurm_conf).absolute()))
    return replace(profile, setup=tuple(profile.setup))


def check_profile(profile: Profile) -> None:
    """Check that Slurm can ever run such a job.

    Raises:
        UserError: no Slurm here, an unknown partition, or more nodes, GPUs, cores or minutes than it has.
    """
    if profile.cluster != "slurm":
        return
    name = profile.partition
    known = slurm.partitions(profile.slurm_conf)
    name = name or next(iter(_defaults(known, profile.slurm_conf)), "")
    if name not in known:
        raise UserError(f"partition={name} is not one of this Slurm's: {', '.join(known)}.")
    nodes = slurm.nodes_of(name, profile.slurm_conf)
    if profile.nodes > len(nodes):
        raise UserError(f"nodes={profile.nodes}: partition {name} has {len(nodes)}.")
    wanted = {
        "gpus": (profile.gpus, "GPUs"),
        "cpus": (profile.cpus * profile.tasks_per_node, "cores"),
        "memory": (int(1024 * profile.memory_gb * profile.tasks_per_node), "MB of memory"),
    }
    for key, (number, what) in wanted.items():
        fits = sum(node[key] >= number for node in nodes)
        if fits < profile.nodes:
            most = max((node[key] for node in nodes), default=0)
            raise UserError(
                f"the profile asks for {number} {what} on {profile.nodes} node(s); partition {name} has nodes of at"
                f" most {most}. Lower {key if key != 'memory' else 'memory_gb'}, or use more nodes."
            )
    limit = _minutes((slurm.partition(name, profile.slurm_conf) or {}).get("MaxTime", "UNLIMITED"))
    if limit is not None and profile.minutes > limit:
        raise UserError(f"minutes={profile.minutes}: partition {name} allows {limit}; a longer run is requeued anyway.")


def longest_array(profile: Profile) -> int:
    """Elements that Slurm takes in one array; 1 where it takes no arrays."""
    return max(1, int(slurm.settings(profile.slurm_conf).get("MaxArraySize", "1001")))


def check_grace(profile: Profile, config: Config) -> None:
    """Check that a run has the time to save itself, whatever ends it.

    Raises:
        UserError: the lead of USR2, or Slurm's KillWait between TERM and KILL, is too short.
    """
    if profile.cluster != "slurm":
        return
    need = config.train.stop_seconds
    if profile.signal_seconds <= need:
        raise UserError(
            f"signal_seconds={profile.signal_seconds} of the profile does not exceed train.stop_seconds={need:g}, the"
            " time for train.check_every steps and a save: a time limit would lose steps. Raise signal_seconds."
        )
    words = slurm.settings(profile.slurm_conf).get("KillWait", "30 sec").split()
    if float(words[0]) <= need:
        raise UserError(
            f"this Slurm kills {words[0]} s after TERM (KillWait), which does not exceed train.stop_seconds={need:g},"
            " the time for a step and a save: a preemption would lose steps. If the run can save"
            " sooner (it says when it cannot), lower train.stop_seconds."
        )


def _defaults(known: Sequence[str], slurm_conf: str) -> list[str]:
    return [name for name in known if (slurm.partition(name, slurm_conf) or {}).get("Default") == "YES"]


def _minutes(written: str) -> int | None:
    """Slurm's ``1-02:00:00`` in minutes; None for no limit."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", written)
    return int(match[1] or 0) * 1440 + int(match[2]) * 60 + int(match[3]) if match else None
