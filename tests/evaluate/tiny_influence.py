"""Run folders with tiny networks of every kind that influence needs, and a float64 loop that says what it means."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from tracekin import checkpoint
from tracekin.checkpoint import Keep
from tracekin.config import (
    Config,
    DataConfig,
    InfluenceConfig,
    ModelConfig,
    OptimiserConfig,
    TrainConfig,
    load,
    to_yaml,
)
from tracekin.data.augment import resolve, view
from tracekin.data.manifest import SPLITS, Manifest
from tracekin.data.reader import ShardReader
from tracekin.data.stream import augmented_batches
from tracekin.model.batch_norm import CrossRankBatchNorm
from tracekin.model.networks import Online, Target
from tracekin.objective import build_online
from tracekin.objective.byol import byol_loss

MODEL = ModelConfig(projector_hidden=12, projection=6, predictor_hidden=10)
RATES = {3: 0.2, 6: 0.05}
"""Step of each checkpoint -> its learning rate."""


def make_run(folder: Path, manifest: Manifest, rates: dict[int, float | None] = RATES, optimiser: str = "sgd") -> Path:
    """Write a run whose networks are drawn anew for each checkpoint; a rate of None is left out."""
    data = DataConfig(manifest=manifest.path, image_size=16, channels=1)
    config = Config(
        name=folder.name, folder=str(folder.parent), data=data, model=MODEL, optimiser=OptimiserConfig(name=optimiser)
    )
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    views = next(augmented_batches(manifest, "train", data, seed=5, batch=manifest.count("train"), workers=0)).views
    for step, rate in rates.items():
        torch.manual_seed(step)
        networks = {"online": _online(), "target": Target(_online())}
        for network in networks.values():
            learn_statistics(network, views)
        tensors = {f"{name}.{key}": t for name, network in networks.items() for key, t in network.state_dict().items()}
        state = {"dataset": manifest.fingerprint()} | ({} if rate is None else {"lr": rate})
        checkpoint.save(folder, step, {"model": tensors, "optimiser": {}}, state, Keep(len(rates)))
    return folder


def _online() -> Online:
    return build_online(Config(data=DataConfig(channels=1), model=MODEL, train=TrainConfig(precision="fp32")))


def learn_statistics(network: nn.Module, views: Tensor) -> None:
    """Set the batch norms' running statistics to those of ``views``; without, images barely differ in eval mode."""
    norms = [module for module in network.modules() if isinstance(module, CrossRankBatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        network(views)


def naive_scores(run_folder: Path, manifest: Manifest, split: str, config: InfluenceConfig) -> Tensor:
    """Scores of every image of ``split`` against every one of ``config.against``, by autograd: [R, C] float64."""
    folders = sorted((run_folder / "checkpoints").glob("step-*"))[-config.checkpoints :]
    weights = [RATES[checkpoint.load_state(folder)["step"]] if config.weight == "lr" else 1.0 for folder in folders]
    rows, columns = (
        torch.cat([math.sqrt(w) * gradients(f, manifest, s, config) for f, w in zip(folders, weights, strict=True)], 1)
        for s in (split, config.against)
    )
    if config.normalise:
        rows, columns = (torch.nn.functional.normalize(x, dim=1) for x in (rows, columns))
    return rows @ columns.T


def gradients(folder: Path, manifest: Manifest, split: str, config: InfluenceConfig) -> Tensor:
    """Each image's gradient of its own mean loss over the draws at the predictor's last layer, [images, parameters]."""
    run = load(Config, folder.parent.parent / "config.yaml")
    online, target = _online(), Target(_online())
    online.load_state_dict(checkpoint.load_model(folder, "online."))
    target.load_state_dict(checkpoint.load_model(folder, "target."))
    online.double().eval()
    target.double().eval()
    reader = ShardReader(manifest, split)
    found = []
    for number in range(len(reader)):
        losses = []
        for draw in range(config.draws):
            epoch = SPLITS.index(split) + len(SPLITS) * draw
            views = two_views(run, reader, number, config.seed, epoch)
            target_BVD = target(views)
            losses.append(byol_loss(online(views).output, target_BVD.flip(1))[0])
        mean = torch.stack(losses).mean()
        last: Sequence[Tensor] = [*online.predictor_last.parameters()]
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(mean, last)]))
    return torch.stack(found)


def two_views(run: Config, reader: ShardReader, number: int, seed: int, epoch: int) -> Tensor:
    """[2, 1, 1, S, S] float64, normalised as the tiny datasets of one channel are."""
    image, augmentation = reader.read(number).image, resolve(run.data.augment)
    views = [
        view(image, augmentation, image_size=16, channels=1, seed=seed, epoch=epoch, sample=number, view=v)
        for v in (0, 1)
    ]
    return ((torch.stack([torch.from_numpy(v.copy()) for v in views]) - 0.5) / 0.25)[:, None].double()
