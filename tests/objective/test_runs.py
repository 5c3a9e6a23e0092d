"""Whole runs of every objective: what they log, that a stop leaves no trace, other worlds, other configs, export."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from tests.data.tiny import make_dataset
from tests.ranks import run_ranks
from tests.train.same import differing
from tests.train.test_run import metrics, stop_after, tiny_config
from tests.train.tiny_run import tiny_backbone
from tracekin import checkpoint, cli
from tracekin.config import Config, ObjectiveConfig, ObjectiveName, UserError, load

BATCH, STEPS, SAVED = 16, 6, 4
"""Images a step; steps of a run, three an epoch; those after which it was stopped."""
OBJECTIVES = {
    "byol": [],
    "simsiam": [],
    "simclr": ["mining.mode=eliminate"],
    "moco": ["objective.queue=48"],
    "moco_shuffled": ["objective.queue=48", "objective.norm=shuffled", "objective.norm_groups=4"],
    "moco_v3": ["objective.version=3", "mining.policy=tracin_cp"],
    "barlow_twins": [],
    "vicreg": ["mining.queue=32"],
    "wmse": ["model.projection=4", "objective.sub_batch=8", "mining.policy=ghost"],
}
"""By the run's name; with mining of every kind, each somewhere."""
PARTS = {"barlow_twins": ["invariance", "redundancy"], "vicreg": ["invariance", "variance", "covariance"]}
WITHOUT_TARGET = ("simsiam", "simclr", "barlow_twins", "vicreg", "wmse")
ELASTIC = ("moco", "moco_shuffled")


class Runs(NamedTuple):
    """Finished runs by name, and what became of the same runs stopped after ``SAVED`` steps and started again."""

    whole: dict[str, Config]
    resumed: dict[str, Config]
    wide: dict[str, Config]
    """Those of two ranks."""
    narrowed: dict[str, Config]
    """The same, gone on with one rank."""
    refused: dict[str, str]
    """What was said to those who would go on with another objective."""
    exported: Config
    """Of a ResNet."""


def configured(folder: Path, name: str, *overrides: str) -> Config:
    objective = f"objective.name={name.removesuffix('_shuffled').removesuffix('_v3')}"
    predictor = "model.predictor_hidden=" + ("32" if name in ("byol", "simsiam", "moco_v3") else "0")
    every = ("mining.warmup=0", "train.log_every=1", "train.epochs=2", f"train.save_every={SAVED}", "optimiser.lr=0.05")
    return tiny_config(folder, f"name={name}", objective, predictor, *every, *OBJECTIVES[name], *overrides)


def train(rank: int, configs: Sequence[Config], resnet: Config | None = None) -> None:
    """One rank of several runs, one after another."""
    from tracekin.train.loop import pretrain

    with tiny_backbone():
        for config in configs:
            pretrain(config)
    if resnet:
        pretrain(resnet)


def go_on(rank: int, configs: Sequence[Config], others: dict[str, Config]) -> dict[str, str]:
    """``train``, and what is said to those who ask for another config with --allow-config-change."""
    from tracekin.train.loop import pretrain

    train(rank, configs)
    said = {}
    with tiny_backbone():
        for name, config in others.items():
            try:
                pretrain(config, allow_change=True)
            except UserError as error:
                said[name] = str(error)
    return said


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("runs")
    make_dataset(folder / "data", train=3 * BATCH, val=4, test=4)
    data = f"data.manifest={folder / 'data' / 'manifest.json'}"
    whole = {name: configured(folder, name) for name in OBJECTIVES}
    wide = {name: configured(folder / "wide", name, data, "train.zero_stage=1") for name in ELASTIC}
    exported = configured(folder / "resnet", "moco_shuffled", data, "train.epochs=1", "train.save_every=0")
    run_ranks(train, 1, [*whole.values()], exported)
    run_ranks(train, 2, [*wide.values()])
    resumed = {name: stop_after(config, SAVED, folder / "resumed") for name, config in whole.items()}
    narrowed = {name: stop_after(config, SAVED, folder / "narrowed") for name, config in wide.items()}
    others = {}
    for name, objective in (
        ("byol", ObjectiveConfig("simclr")),
        ("vicreg", ObjectiveConfig("byol")),
        ("moco", ObjectiveConfig("moco", queue=64)),
    ):
        stopped = stop_after(whole[name], SAVED, folder / "others")
        mining = replace(stopped.mining, mode="attract")
        widths = replace(stopped.model, predictor_hidden=32 if objective.name == "byol" else 0)
        others[name] = replace(stopped, objective=objective, mining=mining, model=widths)
    refused = run_ranks(go_on, 1, [*resumed.values(), *narrowed.values()], others)[0]
    return Runs(whole, resumed, wide, narrowed, refused, exported)


def test_every_objective_is_here(runs: Runs) -> None:
    assert {config.objective.name for config in runs.whole.values()} == set(get_args(ObjectiveName))


def last(config: Config) -> Path:
    return config.run_folder / "checkpoints" / f"step-{STEPS:08d}"


def losses_of(line: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in line.items() if key.startswith("loss") and key != "loss_seconds"}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_run_logs_its_losses_and_their_parts(runs: Runs, name: str) -> None:
    config, lines = runs.whole[name], metrics(runs.whole[name])
    objective = config.objective
    assert [line["step"] for line in lines] == [*range(1, STEPS + 1)]
    for line in lines:
        own, mined = line[f"loss_{objective.name}"], line["loss_mined"]
        assert losses_of(line).keys() == {
            "loss",
            f"loss_{objective.name}",
            "loss_mined",
            *(f"loss_{part}" for part in PARTS.get(name, [])),
        }
        assert line["loss"] == pytest.approx(own + config.mining.weight * mined, rel=1e-5)
        assert (mined == 0) == (config.mining.mode == "eliminate" or line["mined_fraction"] == 0)
        if name == "vicreg":
            weighed = sum(objective.option(part) * line[f"loss_{part}"] for part in PARTS[name])
            assert own == pytest.approx(weighed, rel=1e-5)
        if name == "barlow_twins":
            assert own == pytest.approx(line["loss_invariance"] + 0.005 * line["loss_redundancy"], rel=1e-5)
        assert (line["tau"] is None) == (name in WITHOUT_TARGET)
    assert all(line["mined_fraction"] > 0 for line in lines[1:])
    assert all(math.isfinite(line["loss"]) for line in lines)
    if name in ELASTIC:  # nothing is compared with an empty memory
        assert lines[0]["loss"] == 0 < lines[1]["loss"]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_stop_leaves_no_trace(runs: Runs, name: str) -> None:
    """The same losses and, in the last checkpoint, the same bits: networks, memory, optimiser, random states."""
    one, other = runs.whole[name], runs.resumed[name]
    steps = [json.loads(line) for line in (other.run_folder / "starts.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if line["event"] == "start"] == [0, SAVED]
    for before, after in zip(metrics(one), metrics(other), strict=True):
        assert losses_of(before) == losses_of(after)
        assert before["samples_digest"] == after["samples_digest"]
    assert differing(last(one), last(other)) == []


@pytest.mark.parametrize("name", ELASTIC)
def test_moco_goes_on_in_another_world_with_its_queue(runs: Runs, name: str) -> None:
    unbroken, narrowed, alone = runs.wide[name], runs.narrowed[name], runs.whole[name]
    for before, after, single in zip(*map(metrics, (unbroken, narrowed, alone)), strict=True):
        assert after["samples_digest"] == before["samples_digest"] == single["samples_digest"]
        assert after["loss"] == pytest.approx(before["loss"], rel=1e-4)
        assert after["loss"] == pytest.approx(single["loss"], rel=1e-4)
    at_stop = checkpoint.load_part(narrowed.run_folder / "checkpoints" / f"step-{SAVED:08d}", "model")
    at_end, theirs = (checkpoint.load_part(last(config), "model") for config in (narrowed, unbroken))
    assert at_end["memory.written"] == STEPS * BATCH
    # The three batches that are held: the fourth, of two ranks, stands where the first one stood; then one rank's.
    assert torch.equal(at_end["memory.keys_NVD"][:BATCH], at_stop["memory.keys_NVD"][:BATCH])
    assert torch.equal(at_end["memory.ids_N"], theirs["memory.ids_N"])
    assert not torch.equal(at_end["memory.ids_N"], at_stop["memory.ids_N"])
    assert torch.allclose(at_end["memory.keys_NVD"], theirs["memory.keys_NVD"], atol=1e-3)
    lengths = torch.linalg.vector_norm(at_end["memory.keys_NVD"], dim=2)
    assert torch.allclose(lengths, torch.ones(3 * BATCH, 2), atol=1e-5)


def test_a_run_of_another_objective_is_refused_in_one_line(runs: Runs) -> None:
    """It names what does not fit, whose keys those are, and the way out; the run is as it was."""
    said = {
        "byol": "online does not fit objective.* and model.*: predictor.0.bias and 8 more are in one of them alone",
        "vicreg": "online does not fit objective.* and model.*: ",
        "moco": "memory does not fit objective.*: ids_N is [48] there and [64] under this config",
    }
    assert runs.refused.keys() == said.keys()
    for name, words in said.items():
        line = runs.refused[name]
        run = Path(line.partition("/checkpoints/")[0])
        assert words in line
        assert line.endswith(f"keep them, or start a new run from its encoder with init.from={run}.")
        assert len(line.splitlines()) == 1
        assert [path.name for path in checkpoint.complete(run)] == ["step-00000003", "step-00000004"]
        assert load(Config, run / "config.yaml") == runs.whole[name]


def test_an_encoder_that_no_predictor_trained_is_exported(runs: Runs, tmp_path: Path) -> None:
    """Of MoCo, its batch norms over groups: the file holds torchvision's names and the checkpoint's bits."""
    out = tmp_path / "encoder.safetensors"
    folder = runs.exported.run_folder
    result = CliRunner().invoke(cli.cli, ["export", str(folder), "--format", "safetensors", "--out", str(out)])
    assert result.exit_code == 0, result.output
    newest = checkpoint.latest(folder)
    assert newest is not None
    trained, found = checkpoint.load_model(newest, "online.backbone."), load_file(out)
    assert found.keys() == trained.keys() > {"conv1.weight", "layer4.1.bn2.running_var"}
    assert all(torch.equal(found[name], trained[name]) for name in found)
