"""What must survive a stop: gathered from all ranks for a checkpoint, and put back from one in any world."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tracekin import checkpoint
from tracekin.config import Config, UserError
from tracekin.data.manifest import Manifest
from tracekin.distributed import collectives
from tracekin.objective.objective import Objective
from tracekin.train.checks import changes, check_same
from tracekin.train.engine import load_optimiser_tensors, optimiser_tensors
from tracekin.train.miner import Miner
from tracekin.train.randomness import gather_random_state, restore_random_state


def gather_parts(engine: Any, objective: Objective, miner: Miner, device: torch.device) -> dict[str, dict[str, Tensor]]:
    """The tensors of a checkpoint, by checkpoint.PARTS; on rank 0 copies on the host, empty on the others. Collective.

    The training may go on as soon as this returns.
    """
    optimiser, ranks = optimiser_tensors(engine), gather_random_state(device)
    if collectives.rank():
        return {}
    networks = {"online": engine.module, **objective.kept}
    model = {f"{name}.{key}": t for name, net in networks.items() for key, t in net.state_dict().items()}
    parts = {"model": model, "optimiser": optimiser, "ranks": ranks}
    if miner.queue:
        parts["queue"] = miner.queue.state()
    return {part: {name: t.detach().to("cpu", copy=True) for name, t in held.items()} for part, held in parts.items()}


class Found(NamedTuple):
    """The checkpoint that a run goes on from."""

    folder: Path
    state: dict[str, Any]
    """As checkpoint.load_state has it."""
    changed: list[str]
    """What differs that alters the run: ``key old -> new``."""


def find_checkpoint(
    config: Config, manifest: Manifest, *, allow_change: bool, say: Callable[[str], None]
) -> Found | None:
    """The newest sound checkpoint of a run, the same for every rank; None if there is none. Collective.

    Args:
        config: of the run that goes on.
        manifest: of its data.
        allow_change: go on even if either has changed.
        say: told what is damaged or has changed.

    Raises:
        UserError: there are checkpoints and all are damaged, a change that is not allowed, or another optimiser.
    """
    folder: Path | None = None
    error: UserError | None = None
    if collectives.rank() == 0:  # alone: it reads every byte
        try:
            folder = checkpoint.latest(config.run_folder, say)
        except UserError as damaged:
            error = damaged
    folder, error = collectives.broadcast_object((folder, error))
    if error is not None:
        raise error
    if folder is None:
        return None
    state = checkpoint.load_state(folder)
    same_shards = state["dataset"] == manifest.fingerprint()
    if not allow_change:
        check_same(config, state["config"], str(folder))
        if not same_shards:
            raise UserError(
                f"{folder} was trained on other shards than {config.data.manifest} holds now; give this run another"
                f" name=..., remove {config.run_folder}, or go on all the same with --allow-config-change."
            )
    if (before := state["config"]["optimiser"]["name"]) != config.optimiser.name:
        raise UserError(
            f"{folder} holds the state of optimiser.name={before}, which {config.optimiser.name} cannot take over: keep"
            f" it, or start a new run from its encoder with init.from={config.run_folder}."
        )
    changed = [*changes(config, state["config"]), *([] if same_shards else ["other shards"])]
    if changed:
        queue = "; the queue of remembered images starts empty" if config.mining.queue else ""
        say(f"continuing under another config: {', '.join(changed)}{queue}")
    return Found(folder, state, changed)


def load_networks(folder: Path, networks: dict[str, nn.Module]) -> None:
    """Set networks, by name; before the engine is built, which makes copies of the weights.

    Raises:
        UserError: the checkpoint is damaged, or of networks of another shape.
    """
    tensors = checkpoint.load_part(folder, "model")
    for name, net in networks.items():
        own = {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
        try:
            _fill(net, own)
        except ValueError as error:
            keys = "objective.*" if name == "memory" else "objective.* and model.*"
            raise UserError(
                f"{folder}: {name} does not fit {keys}: {error}; keep them, or start a new run from its encoder with"
                f" init.from={folder.parents[1]}."
            ) from None


def load_rest(
    found: Found, engine: Any, objective: Objective, miner: Miner, device: torch.device, say: Callable[[str], None]
) -> None:
    """Set the optimiser, what the miner remembers and this rank's random state. Collective.

    What mining remembers of another config or dataset is left out: its images may be others, or have other factors.

    Raises:
        UserError: the checkpoint is damaged.
    """
    load_optimiser_tensors(engine, checkpoint.load_part(found.folder, "optimiser"))
    if miner.queue and not found.changed and (found.folder / "queue.safetensors").exists():
        miner.queue.load(checkpoint.load_part(found.folder, "queue"), device)
    if miner.history:
        wanted = min(miner.mining.checkpoints, found.state["epochs"])
        lasting = checkpoint.complete(found.folder.parents[1], up_to=found.folder, lasting=True)[-wanted:]
        lasting = collectives.broadcast_object(lasting if wanted else [])
        for path in lasting:
            rate = checkpoint.load_state(path)["lr"]
            load_networks(path, miner.history.remember(engine.module, objective.target, rate))
        if len(lasting) < wanted:
            say(
                f"only {len(lasting)} of the {wanted} checkpoints that mining.policy={miner.mining.policy} sums over"
                " are left: until the next ones the losses differ from an unbroken run's"
            )
    restore_random_state(checkpoint.load_part(found.folder, "ranks"), device)


def _fill(net: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load a state dict.

    Raises:
        ValueError: what does not fit, in words.
    """
    own = net.state_dict()
    if lacking := sorted(own.keys() ^ tensors.keys()):
        more = f" and {len(lacking) - 1} more are" if len(lacking) > 1 else " is"
        raise ValueError(f"{lacking[0]}{more} in one of them alone")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            shapes = f"{list(tensor.shape)} there and {list(own[name].shape)} under this config"
            raise ValueError(f"{name} is {shapes}")
    net.load_state_dict(tensors)
