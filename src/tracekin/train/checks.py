"""What can be known to be wrong before anything heavy starts."""

from pathlib import Path

from tracekin.config import Config, UserError, flat, load, to_dict
from tracekin.data.manifest import Manifest
from tracekin.distributed.world import World

# Keys that a run may change when it continues: they do not alter what is computed.
FREE_KEYS = {"name", "folder", "data.workers", "mining.chunk", "mining.ring_above"}
FREE_KEYS |= {f"train.{key}" for key in ("log_every", "keep_checkpoints", "threads", "zero_stage")}
FREE_SECTIONS = ("monitor.",)


def check_run(config: Config, manifest: Manifest, world: World) -> None:
    """Check a config against its data, its world and the run folder that it would continue.

    Raises:
        UserError: fewer samples than a global batch, ranks that do not divide it, a batch too small for batch norm,
            a policy that needs labels on a set without, a pool that is too small, or a run folder of another config.
    """
    count, batch = manifest.count("train"), config.train.global_batch
    if batch < 2:
        raise UserError(
            f"train.global_batch={batch} is too small: batch norm and mining need at least 2 images a step."
        )
    if count < batch:
        raise UserError(
            f"{manifest.path} has {count} train images, fewer than train.global_batch={batch};"
            f" use a batch of at most {count}."
        )
    if batch % world.size:
        raise UserError(
            f"train.global_batch={batch} cannot be divided among {world.size} ranks; use a multiple of {world.size}."
        )
    _check_mining(config, manifest, world)
    _check_continues(config, config.run_folder / "config.yaml")


def _check_mining(config: Config, manifest: Manifest, world: World) -> None:
    mining, batch = config.mining, config.train.global_batch
    if mining.policy == "none":
        return
    for key in ("policy", "compare"):
        if getattr(mining, key) == "oracle" and manifest.task == "unlabelled":
            raise UserError(f"mining.{key}=oracle needs labels, and {manifest.name} has none; use feature or random.")
    if mining.pool == "node" and world.size % world.local_size:
        raise UserError(
            f"mining.pool=node needs as many ranks on every node, and {world.size} ranks are no multiple of this node's"
            f" {world.local_size}; use mining.pool=global or rank."
        )
    ranks = {"rank": 1, "node": world.local_size, "global": world.size}[mining.pool]
    pool = batch // world.size * ranks
    if mining.k > pool - 1:
        wider = " or mining.pool=global" if mining.pool != "global" else ""
        raise UserError(
            f"mining.k={mining.k} positives cannot be chosen from a pool of {pool} images, the anchor among them;"
            f" accepted is 1 to {pool - 1}. Use a larger train.global_batch{wider}."
        )
    if mining.sketch_dim >= config.model.predictor_hidden:
        raise UserError(
            f"mining.sketch_dim={mining.sketch_dim} does not narrow model.predictor_hidden="
            f"{config.model.predictor_hidden}; use fewer, or 0 to send activations whole."
        )
    if 0 < mining.queue < batch:
        raise UserError(
            f"mining.queue={mining.queue} cannot hold one global batch of {batch}; accepted is 0, or {batch} and more."
        )
    if mining.policy.startswith("tracin_cp") and config.train.keep_checkpoints < mining.checkpoints:
        raise UserError(
            f"mining.policy={mining.policy} sums over the last {mining.checkpoints} checkpoints, which a run that"
            f" continues must find: set train.keep_checkpoints to {mining.checkpoints} or more."
        )


def _check_continues(config: Config, path: Path) -> None:
    if not path.exists():
        return
    old, new = dict(flat(to_dict(load(Config, path)))), dict(flat(to_dict(config)))
    changed = [
        f"{key} {old[key]} -> {new[key]}"
        for key in new
        if old[key] != new[key] and key not in FREE_KEYS and not key.startswith(FREE_SECTIONS)
    ]
    if changed:
        raise UserError(
            f"{path.parent} holds a run of another config ({', '.join(changed)});"
            " give this one another name=... or remove that folder."
        )
