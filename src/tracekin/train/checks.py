"""What can be known to be wrong before anything heavy starts."""

from pathlib import Path

from tracekin.config import Config, UserError, flat, load, to_dict
from tracekin.data.manifest import Manifest

# Keys that a run may change when it continues: they do not alter what is computed.
FREE_KEYS = {"name", "folder", "data.workers"}
FREE_KEYS |= {f"train.{key}" for key in ("log_every", "keep_checkpoints", "threads", "zero_stage")}
FREE_SECTIONS = ("monitor.",)


def check_run(config: Config, manifest: Manifest, world_size: int) -> None:
    """Check a config against its data, its world and the run folder that it would continue.

    Raises:
        UserError: fewer samples than a global batch, ranks that do not divide it, a batch too small for batch norm,
            a policy that needs labels on a set without, or a run folder of another config.
    """
    count, batch = manifest.count("train"), config.train.global_batch
    if batch < 2:
        raise UserError(
            f"train.global_batch={batch} is too small: batch norm and mining need at least 2 images a step."
        )
    if count < batch:
        raise UserError(
            f"{manifest.folder / 'manifest.json'} has {count} train images, fewer than train.global_batch={batch};"
            f" use a batch of at most {count}."
        )
    if batch % world_size:
        raise UserError(
            f"train.global_batch={batch} cannot be divided among {world_size} ranks; use a multiple of {world_size}."
        )
    if config.mining.policy == "oracle" and manifest.task == "unlabelled":
        raise UserError(
            f"mining.policy=oracle needs labels, and {manifest.name} has none; use tracin, feature or random."
        )
    _check_continues(config, config.run_folder / "config.yaml")


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
