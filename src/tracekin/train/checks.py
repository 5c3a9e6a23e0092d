"""What can be known to be wrong before anything heavy starts."""

import os
from pathlib import Path
from typing import Any

from tracekin.config import Config, UserError, flat, load, to_dict
from tracekin.data.manifest import Manifest, absent_shards
from tracekin.data.order import num_steps_per_epoch, shuffle_of
from tracekin.data.remote import is_remote
from tracekin.distributed.world import World

# Keys that a run may change when it continues: they do not alter what is computed.
FREE_KEYS = {"name", "folder", "mining.chunk", "mining.ring_above"}
FREE_KEYS |= {f"data.{key}" for key in ("workers", "max_bad_fraction", "cache", "cache_gb", "read_ahead", "augment_on")}
FREE_KEYS |= {f"train.{key}" for key in ("log_every", "save_every", "keep_checkpoints", "keep_every", "threads")}
FREE_KEYS |= {"train.zero_stage", "train.stop_seconds"}
FREE_SECTIONS = ("guard.", "monitor.")


def check_run(config: Config, manifest: Manifest, world: World, *, allow_change: bool = False) -> None:
    """Check a config against its data, its world and the run folder that it would continue.

    ``allow_change`` lets it continue a run of another config.

    Raises:
        UserError: fewer samples than a global batch, too many shards missing, a cache too small for remote shards,
            ranks, streams or groups that do not divide the batch, a batch too small for batch norm, a policy that needs
            labels on a set without, a pool that is too small, weights to start from that are not there, a run folder of
            another config or one that cannot be made.
    """
    batch = config.train.global_batch
    if batch < 2:
        raise UserError(
            f"train.global_batch={batch} is too small: batch norm and mining need at least 2 images a step."
        )
    if batch % world.size:
        raise UserError(
            f"train.global_batch={batch} cannot be divided among {world.size} ranks; use a multiple of {world.size}."
        )
    _check_objective(config, world)
    _check_data(config, manifest, world)
    _check_init(config)
    _check_mining(config, manifest, world)
    _check_folder(config.run_folder)
    path = config.run_folder / "config.yaml"
    if path.exists() and not allow_change:
        check_same(config, to_dict(load(Config, path)), str(path.parent))


def _check_data(config: Config, manifest: Manifest, world: World) -> None:
    data, count = config.data, manifest.count("train")
    shuffle = shuffle_of(data, config.seed, config.train.global_batch)
    num_steps_per_epoch(count, shuffle)
    absent = absent_shards(manifest, ["train"])
    if sum(len(shard.samples) for shard, _ in absent) > data.max_bad_fraction * count:
        more = f" (and {len(absent) - 1} more)" if len(absent) > 1 else ""
        raise UserError(f"{manifest.path} {absent[0][1]}{more}; copy it or pack again.")
    if not is_remote(manifest.folder):
        return
    shards = manifest.shards("train")
    nodes = max(1, world.size // world.local_size)
    streams = -(-data.streams // nodes) + (data.streams % nodes > 0)  # that one node reads, part of them shared
    window = min(len(shards), streams * (data.shuffle_shards or len(shards)))
    need = sum(sorted((shard.bytes for shard in shards), reverse=True)[: 2 * window])
    if need > data.cache_gb * 1e9:
        raise UserError(
            f"data.cache_gb={data.cache_gb:g} does not hold two windows of data.shuffle_shards={data.shuffle_shards}"
            f" shards ({streams} streams a node), {need / 1e9:.1f} GB of {manifest.path}: every shard would be fetched"
            " again and again. Raise data.cache_gb, or set data.shuffle_shards to a smaller number above 0."
        )


def _check_objective(config: Config, world: World) -> None:
    batch, groups = config.train.global_batch, config.objective.norm_groups
    if groups is not None and (groups % world.size or batch % groups or batch < 2 * groups):
        raise UserError(
            f"objective.norm_groups={groups} parts of train.global_batch={batch} over {world.size} ranks: accepted is a"
            f" multiple of {world.size} that divides the batch into parts of 2 images or more."
        )


def _check_init(config: Config) -> None:
    """Whether there is anything to start from; what it holds is looked at when the run starts."""
    if config.init.from_ is None or any(config.run_folder.glob("checkpoints/step-*/state.json")):
        return
    path = Path(config.init.from_)
    if not path.exists():
        raise UserError(f"init.from={path}: there is no such file or folder; correct the path or leave the key out.")
    if path.is_dir() and not any(any(path.glob(at)) for at in ("state.json", "checkpoints/step-*/state.json")):
        raise UserError(
            f"init.from={path} is a folder without a checkpoint; name a run's folder, a checkpoint's, or a file."
        )
    if path.suffix == ".onnx":
        raise UserError(
            f"init.from={path}: ONNX is for inference, and its weights no longer have their names; export the run again"
            " with --format safetensors."
        )


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
    if mining.sketch_dim >= config.model.last_hidden:
        key = "predictor_hidden" if config.model.predictor_hidden else "projector_hidden"
        raise UserError(
            f"mining.sketch_dim={mining.sketch_dim} does not narrow model.{key}={config.model.last_hidden}; use fewer,"
            " or 0 to send activations whole."
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


def _check_folder(folder: Path) -> None:
    """The run folder is there or can be made, as far as that can be told without making it."""
    try:
        nearest = next(path for path in (folder, *folder.parents) if path.exists())
        sound = nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)
    except OSError as error:
        raise UserError(
            f"the run's folder {folder} cannot be reached ({error.strerror}); give another folder=..."
        ) from None
    if not sound:
        wrong = "may not be written into" if nearest.is_dir() else "is a file"
        raise UserError(
            f"the run's folder {folder} cannot be made: {nearest} {wrong}; give another folder=... or name=..."
        )


def changes(config: Config, old: dict[str, Any]) -> list[str]:
    """``key old -> new`` for each key that alters what a run computes; ``old`` is another config as a dictionary."""
    before = dict(flat(old))
    return [
        f"{key} {before[key]} -> {value}"
        for key, value in flat(to_dict(config))
        if before.get(key, value) != value
        and key not in FREE_KEYS | {"data.manifest"}  # it may move: checksums tell whether the shards are the same
        and not key.startswith(FREE_SECTIONS)
    ]


def check_same(config: Config, old: dict[str, Any], where: str) -> None:
    """Check that a run may be continued under this config.

    Args:
        config: the new one.
        old: the one that the run had, as a dictionary.
        where: what holds the run.

    Raises:
        UserError: a key differs that alters what is computed.
    """
    if changed := changes(config, old):
        raise UserError(
            f"{where} holds a run of another config ({', '.join(changed)}); give this one another name=..., remove that"
            " folder, or continue it all the same with --allow-config-change."
        )
