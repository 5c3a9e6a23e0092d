"""Score one finished run: bank and probe on train, choices on val, scores on test."""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from tqdm import tqdm

from tracekin import checkpoint
from tracekin.config import Config, EvaluateConfig, UserError, load, to_yaml
from tracekin.data.manifest import SPLITS, Manifest, read_manifest
from tracekin.data.stream import evaluation_batches
from tracekin.evaluate import knn, linear
from tracekin.evaluate.features import PIXELS_SIDE, Encoder, Features, features, pixels
from tracekin.evaluate.metrics import PROBES, estimates
from tracekin.files import write_text
from tracekin.model.backbone import build_backbone
from tracekin.model.precision import set_convolution_precision

Splits = dict[str, Features]


@dataclass(frozen=True)
class Scored:
    """One method's row, and what it predicted for each test image."""

    row: dict[str, Any]
    probability: dict[str, NDArray[np.float32]]
    """By probe: [N, L]."""


# Scores of the baselines, by everything they depend on: several runs of one command compute them once.
_baselines: dict[str, dict[str, Scored]] = {}


def evaluate_run(run_folder: Path, config: EvaluateConfig, *, progress: bool = True) -> dict[str, Any]:
    """Score a run's newest checkpoint, and the baselines beside it; print nothing but a progress bar.

    Features are those of the online backbone after global pooling, in eval mode and fp32. Writes
    ``evaluations/CHECKPOINT-DATASET-SPLIT.json`` into the run's folder, and beside it a .npz with the predictions for
    each scored image, which paired comparisons between runs need.

    Args:
        run_folder: what ``tracekin pretrain`` left.
        config: settings of the evaluation.
        progress: show a bar on a terminal.

    Returns:
        What the JSON holds: the facts, and ``rows``, one a method, the run's own last.

    Raises:
        UserError: no such run, no checkpoint, no labels, a split missing or too small.
    """
    run, newest = _read_run(run_folder)
    manifest = read_manifest(config.manifest or run.data.manifest)
    _check(manifest, config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    set_convolution_precision("ieee")

    encoders: dict[str, Encoder] = {run.mining.policy: _trained(run, newest).to(device)}
    key = _baseline_key(run, manifest, config)
    if config.baselines and key not in _baselines:
        encoders |= {"pixels": pixels, "untrained": _untrained(run).to(device)}
    encoded = _encode(encoders, manifest, run, config, device, progress)
    multilabel = manifest.task == "multilabel"
    scored = {name: _score(name, splits, config, multilabel, device) for name, splits in encoded.items()}
    if config.baselines:
        _baselines.setdefault(key, {name: scored[name] for name in ("pixels", "untrained") if name in scored})
        scored = _baselines[key] | {run.mining.policy: scored[run.mining.policy]}

    test = encoded[run.mining.policy][config.split]
    name = f"{newest.name}-{manifest.name.replace('/', '-')}-{config.split}"
    content = _facts(run, newest, manifest, test, config, device) | {
        "predictions": f"{name}.npz",
        "rows": [s.row for s in scored.values()],
    }
    _write(run_folder / "evaluations", name, content, scored, test)
    return content


def _read_run(run_folder: Path) -> tuple[Config, Path]:
    if not (run_folder / "config.yaml").is_file():
        raise UserError(f"{run_folder} is no run: it has no config.yaml. Name what `tracekin pretrain` made.")
    newest = checkpoint.latest(run_folder)
    if newest is None:
        raise UserError(f"{run_folder} has no complete checkpoint; let `tracekin pretrain` finish an epoch.")
    return load(Config, run_folder / "config.yaml"), newest


def _check(manifest: Manifest, config: EvaluateConfig) -> None:
    where = manifest.path
    if manifest.task == "unlabelled":
        raise UserError(f"{where} has no labels to score with; name a multiclass or multilabel one: manifest=PATH.")
    for split in ("train", config.split):
        manifest.shards(split)
    if not manifest.splits.get("val") and len(config.linear_c) > 1:
        raise UserError(
            f"{where} has no val split, where linear_c would be chosen among {', '.join(map(str, config.linear_c))}; "
            "fix it with one value, for example linear_c=[0.1], or pack the dataset with a val split."
        )
    bank = manifest.count("train")
    if bank < config.knn_k:
        raise UserError(f"knn_k={config.knn_k} exceeds the {bank} images of train in {where}; lower it.")


def _trained(run: Config, folder: Path) -> nn.Module:
    backbone = build_backbone(run.model, run.data.channels)
    backbone.load_state_dict(checkpoint.load_model(folder, "online.backbone."))
    return backbone.eval()


def _untrained(run: Config) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.seed)
        return build_backbone(run.model, run.data.channels).eval()


def _baseline_key(run: Config, manifest: Manifest, config: EvaluateConfig) -> str:
    data = (run.data.image_size, run.data.channels, run.seed)
    shards = [shard.sha256 for shards in manifest.splits.values() for shard in shards]
    return repr((data, shards, to_yaml(run.model), to_yaml(replace(config, manifest=None))))


def _encode(
    encoders: dict[str, Encoder],
    manifest: Manifest,
    run: Config,
    config: EvaluateConfig,
    device: torch.device,
    progress: bool,
) -> dict[str, Splits]:
    """Features of every split the manifest has, by encoder."""
    held = [split for split in SPLITS if manifest.splits.get(split)]
    encoded: dict[str, Splits] = {name: {} for name in encoders}
    with tqdm(
        total=sum(map(manifest.count, held)),
        desc=f"features of {run.name}",
        unit="img",
        disable=not progress or not sys.stderr.isatty(),
    ) as bar:
        for split in held:
            batches = evaluation_batches(manifest, split, run.data, batch=config.batch, workers=config.workers)

            def counted(batches: Any = batches) -> Any:
                for batch in batches:
                    yield batch
                    bar.update(len(batch.index))

            for name, found in features(encoders, counted(), device).items():
                encoded[name][split] = found
    return encoded


def _score(name: str, splits: Splits, config: EvaluateConfig, multilabel: bool, device: torch.device) -> Scored:
    """Both probes of one method; each result carries the settings that its score depends on."""
    train, test = splits["train"], splits[config.split]
    near = knn.knn_probability(
        train.x, train.label, test.x, k=config.knn_k, temperature=config.knn_temperature, device=device
    )
    fitted, c = linear.linear_probability(train, splits.get("val"), test, grid=config.linear_c, multilabel=multilabel)
    settings = {
        "knn": {"k": config.knn_k, "temperature": config.knn_temperature, "normalisation": knn.NORMALISATION},
        "linear": {"c": c, "grid": list(config.linear_c), "normalisation": linear.NORMALISATION},
    }
    probability = {"knn": near, "linear": fitted}
    row: dict[str, Any] = {"method": name, "num_features": train.x.shape[1]}
    for probe in PROBES:
        row[probe] = settings[probe] | estimates(
            probability[probe],
            test.label,
            test.group,
            multilabel=multilabel,
            replicates=config.bootstrap,
            seed=config.seed,
        )
    return Scored(row, probability)


def _facts(
    run: Config, newest: Path, manifest: Manifest, test: Features, config: EvaluateConfig, device: torch.device
) -> dict[str, Any]:
    return {
        "run": run.name,
        "method": run.mining.policy,
        "objective": run.objective.name,
        "seed": run.seed,
        "checkpoint": newest.name,
        "step": checkpoint.load_state(newest)["step"],
        "encoder": f"online {run.model.backbone} after global pooling, eval mode, fp32",
        "pixels": f"views area-averaged to {PIXELS_SIDE}x{PIXELS_SIDE}",
        "image_size": run.data.image_size,
        "channels": run.data.channels,
        "dataset": manifest.name,
        "manifest": manifest.path,
        "task": manifest.task,
        "classes": manifest.classes,
        "images": {split: manifest.count(split) for split in SPLITS if manifest.splits.get(split)},
        "split": config.split,
        "groups": len(np.unique(test.group)),
        "images_by_class": test.label.sum(0).tolist(),
        "bootstrap": {"replicates": config.bootstrap, "seed": config.seed, "unit": "group"},
        "device": device.type,
    }


def _write(folder: Path, name: str, content: dict[str, Any], scored: dict[str, Scored], test: Features) -> None:
    """Write the predictions, then the JSON that names them; each under a temporary name first."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {f"{s.row['method']}.{probe}": s.probability[probe] for s in scored.values() for probe in PROBES}
    temporary = folder / f"{name}.npz.partial"
    with temporary.open("wb") as file:
        np.savez_compressed(file, label=test.label, group=test.group, **arrays)  # type: ignore[arg-type]
    temporary.replace(folder / f"{name}.npz")
    write_text(folder / f"{name}.json", json.dumps(content, indent=1, allow_nan=False) + "\n")
