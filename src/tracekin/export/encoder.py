"""The encoder of a run's newest checkpoint, and what whoever loads it has to know."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tracekin import __version__, checkpoint
from tracekin.config import Config, ModelConfig, UserError, load, shareable
from tracekin.data.batch import Format
from tracekin.data.manifest import Manifest, read_manifest
from tracekin.model.backbone import plain_backbone


@dataclass(frozen=True)
class Encoder:
    """A plain torchvision net in eval mode: [N, channels, S, S] float32, normalised -> [N, num_features]."""

    net: nn.Module
    model: ModelConfig
    channels: int
    image_size: int
    num_features: int
    stem: str
    """Run and checkpoint, for file names."""
    facts: dict[str, Any]
    """``encoder``, ``preprocessing`` and ``provenance``: JSON values, no path of this machine."""


def read_encoder(run_folder: Path, manifest: str | None = None) -> Encoder:
    """The online backbone of a run's newest checkpoint, with plain batch norms.

    Args:
        run_folder: what ``tracekin pretrain`` left.
        manifest: where the run's manifest.json lies now, if no longer where its config says.

    Raises:
        UserError: no complete checkpoint, or a manifest that is missing or of other shards.
    """
    newest = checkpoint.latest(run_folder)
    if newest is None:
        raise UserError(f"{run_folder} has no complete checkpoint; let `tracekin pretrain` finish an epoch.")
    run, state = load(Config, run_folder / "config.yaml"), checkpoint.load_state(newest)
    images = read_manifest(manifest or run.data.manifest, complete=False)
    if images.fingerprint() != state["dataset"]:
        raise UserError(
            f"{newest} was trained on other shards than {images.path} holds; name its own manifest with --manifest."
        )
    net = plain_backbone(run.model, run.data.channels)
    net.load_state_dict(checkpoint.load_model(newest, "online.backbone."))
    num_features = int(net.num_features)  # type: ignore[arg-type]
    facts = {
        "encoder": {"net": run.model.backbone, "small_stem": run.model.small_stem, "num_features": num_features},
        "preprocessing": _preprocessing(run, images),
        "provenance": _provenance(run_folder, run, state, images),
    }
    stem = f"{Path(run.name).name}-{newest.name}"
    return Encoder(net.eval(), run.model, run.data.channels, run.data.image_size, num_features, stem, facts)


def _preprocessing(run: Config, manifest: Manifest) -> dict[str, Any]:
    """How evaluation prepares an image: tracekin.data.augment.plain_view, then the batch's normalisation."""
    mean, std = Format(manifest, run.data.channels).normalisation.flatten(1).tolist()
    return {
        "image_size": run.data.image_size,
        "channels": run.data.channels,
        "colour": "RGB" if run.data.channels == 3 else "grey (luma of RGB)",
        "crop": "shortest side to image_size (bicubic, antialiased), then the central square",
        "value_range": [0.0, 1.0],
        "mean": mean,
        "std": std,
        "normalisation": "(value - mean) / std of each channel, after scaling to value_range",
    }


def _provenance(run_folder: Path, run: Config, state: dict[str, Any], manifest: Manifest) -> dict[str, Any]:
    environment = state["environment"]
    initial = environment.get("init")
    return {
        "run": run.name,
        "step": state["step"],
        "dataset": manifest.name,
        "fingerprint": manifest.fingerprint(),
        "config": shareable(run, manifest.name),
        "config_sha256": hashlib.sha256((run_folder / "config.yaml").read_bytes()).hexdigest(),
        "init": {key: initial[key] for key in ("file", "sha256", "format")} if initial else None,
        "git_sha": environment["git_sha"],
        "trained_with": {name: environment["packages"].get(name) for name in ("tracekin", "torch", "torchvision")},
        "exported_with": {"tracekin": __version__},
    }
