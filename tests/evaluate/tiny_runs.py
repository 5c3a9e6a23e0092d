"""Run folders as ``tracekin pretrain`` leaves them, with a backbone that was never trained."""

import json
from pathlib import Path
from typing import Literal

import torch

from tracekin import checkpoint
from tracekin.config import (
    Config,
    DataConfig,
    MiningConfig,
    ModelConfig,
    ObjectiveConfig,
    ObjectiveName,
    Policy,
    to_dict,
    to_yaml,
)
from tracekin.data.manifest import Manifest
from tracekin.model.backbone import build_backbone


def make_run(
    folder: Path,
    manifest: Manifest,
    policy: Policy = "tracin",
    *,
    seed: int = 0,
    weights: int = 0,
    channels: Literal[1, 3] = 3,
    objective: ObjectiveName = "byol",
    model: ModelConfig = ModelConfig(),  # noqa: B008 -- it is frozen
) -> Path:
    """Write a run of ``seed`` whose backbone is initialised from the seed ``weights``; returns its folder."""
    config = Config(
        name=folder.name,
        folder=str(folder.parent),
        seed=seed,
        data=DataConfig(manifest=manifest.path, image_size=32, channels=channels),
        model=model,
        objective=ObjectiveConfig(objective),
        mining=MiningConfig(policy=policy),
    )
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    torch.manual_seed(weights)
    backbone = build_backbone(config.model, config.data.channels)
    tensors = {f"online.backbone.{name}": tensor for name, tensor in backbone.state_dict().items()}
    facts = {"world_size": 2, "engine": "deepspeed", "zero_stage": 0, "git_sha": "abc", "packages": {"torch": "2.x"}}
    state = {"dataset": manifest.fingerprint(), "config": to_dict(config), "environment": facts}
    checkpoint.save(folder, 40, {"model": tensors, "optimiser": {}}, state)
    (folder / "environment.json").write_text(json.dumps(facts))
    write_metrics(folder, policy)
    if policy != "none":
        pairs = [[n, n + 2, 0.5 / (n + 1)] for n in range(16)]
        (folder / "gallery.json").write_text(
            json.dumps({"step": 40, "dataset": manifest.fingerprint(), "pairs": pairs})
        )
    return folder


def write_metrics(folder: Path, policy: str) -> None:
    """Forty steps; a resumed run repeated step 20, and a kill tore the last line."""
    lines = [
        {
            "step": step,
            "loss": 4.0 / step,
            "hit_rate": None if policy == "none" else 0.4 + 0.02 * (step % 2),
            "chance_rate": None if policy == "none" else 0.25,
            "effective_rank": 10.0,
            "target_std": 0.9,
            "images_per_second": 100.0 + step,
        }
        for step in range(1, 41)
    ]
    lines.insert(20, lines[19] | {"loss": 99.0})
    lines[19], lines[20] = lines[20], lines[19]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 41, "lo')
