"""The keys of ``objective``: defaults as their sentences say, and one line for what cannot be."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.data.tiny import make_dataset
from tracekin.config import Config, UserError, load, own, to_dict
from tracekin.data.manifest import Manifest
from tracekin.distributed.world import World
from tracekin.train.checks import check_run

DEFAULTS: dict[str, tuple[dict[str, Any], tuple[int, int, int]]] = {
    "name=byol": ({"tau_base": 0.99}, (4096, 256, 4096)),
    "name=simsiam": ({}, (2048, 2048, 512)),
    "name=simclr": ({"temperature": 0.1}, (512, 128, 0)),
    "name=moco": (
        {"version": 2, "tau_base": 0.99, "temperature": 0.2, "queue": 16 * 256, "norm": "cross_rank"},
        (512, 128, 0),
    ),
    "name=moco norm=shuffled": (
        {"version": 2, "tau_base": 0.99, "temperature": 0.2, "queue": 16 * 256, "norm": "shuffled", "norm_groups": 8},
        (512, 128, 0),
    ),
    "name=moco version=3": ({"version": 3, "tau_base": 0.99, "temperature": 1.0}, (4096, 256, 4096)),
    "name=barlow_twins": ({"redundancy": 0.005}, (2048, 1024, 0)),
    "name=vicreg": ({"invariance": 25.0, "variance": 25.0, "covariance": 1.0}, (2048, 1024, 0)),
    "name=wmse": ({"sub_batch": 128}, (1024, 64, 0)),
}
"""By what is given: the options, and the heads' widths with 512 features and a batch of 256."""


def overrides(given: str) -> list[str]:
    """``objective.`` stands before keys that name no section."""
    return [part if "." in part.partition("=")[0] else f"objective.{part}" for part in given.split()]


@pytest.mark.parametrize("given", DEFAULTS)
def test_what_is_left_out_is_the_papers(given: str) -> None:
    config = load(Config, None, overrides(given))
    options, widths = DEFAULTS[given]
    assert {key: value for key, value in to_dict(config)["objective"].items() if value is not None} == {
        "name": config.objective.name,
        **options,
    }
    model = config.model
    assert (model.projector_hidden, model.projection, model.predictor_hidden) == widths
    assert set(own(config.objective.name, config.objective.version, config.objective.norm).options) == set(options)


@pytest.mark.parametrize("given", DEFAULTS)
def test_what_was_filled_in_loads_again(given: str) -> None:
    """A run's config.yaml says everything, and is a config."""
    config = load(Config, None, overrides(given))
    held = [(section, to_dict(config)[section]) for section in ("objective", "model")]
    said = [f"{section}.{key}={value}" for section, keys in held for key, value in keys.items() if value is not None]
    assert load(Config, None, said) == config


def test_widths_follow_the_features_and_the_batch() -> None:
    wide = load(Config, None, ["objective.name=vicreg", "model.backbone=resnet50", "train.global_batch=2048"]).model
    assert (wide.projector_hidden, wide.projection) == (8192, 8192)
    small = load(Config, None, ["objective.name=wmse", "train.global_batch=96"])
    assert (small.objective.sub_batch, small.model.projection) == (96, 48)
    assert load(Config, None, ["objective.name=wmse", "train.global_batch=4"]).model.projection == 2


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("name=dino", ["objective.name", "dino", "byol", "wmse"]),
        ("name=byl", ["objective.name", "byl", "byol"]),
        ("temprature=1", ["objective.temprature", "did you mean objective.temperature"]),
        ("name=byol temperature=0.1", ["objective.temperature=0.1", "simclr and moco", "objective.tau_base"]),
        ("name=simsiam tau_base=0.9", ["objective.tau_base=0.9", "byol and moco", "takes no key"]),
        ("name=vicreg redundancy=1", ["objective.redundancy=1", "barlow_twins", "objective.covariance"]),
        ("name=moco version=3 queue=256", ["objective.queue=256", "objective.version=3"]),
        ("name=moco norm_groups=4", ["objective.norm_groups=4", "norm=cross_rank", "objective.norm"]),
        ("name=moco version=4", ["objective.version", "[2, 3]"]),
        ("name=moco queue=300", ["objective.queue=300", "train.global_batch=256", "512", "4096"]),
        ("name=moco queue=128", ["objective.queue=128", "train.global_batch=256"]),
        ("name=moco queue=0", ["objective.queue=0", "1 or more"]),
        ("name=wmse sub_batch=100", ["objective.sub_batch=100", "does not divide", "train.global_batch=256"]),
        ("name=wmse sub_batch=64 model.projection=64", ["objective.sub_batch=64", "model.projection=64", "63", "32"]),
        ("name=wmse train.global_batch=32 model.projection=64", ["objective.sub_batch=32", "model.projection=64"]),
        ("name=wmse train.global_batch=131", ["objective.sub_batch=1", "train.global_batch=131", "larger"]),
        ("name=simclr model.predictor_hidden=64", ["model.predictor_hidden=64", "simclr", "no predictor"]),
        ("name=moco model.predictor_hidden=64", ["model.predictor_hidden=64", "moco, version=2", "no predictor"]),
        ("name=byol mining.mode=eliminate", ["mining.mode=eliminate", "objective.name=byol", "simclr", "attract"]),
        ("name=moco mining.mode=eliminate", ["mining.mode=eliminate", "mining.queue", "objective.queue=4096"]),
        ("name=moco mining.policy=tracin_cp", ["mining.policy=tracin_cp", "objective.version=3"]),
        ("name=simclr temperature=0", ["objective.temperature=0", "above 0"]),
        ("name=simclr temperature=.nan", ["objective.temperature", "above 0"]),
        ("name=byol tau_base=1.1", ["objective.tau_base=1.1", "0 <= x <= 1"]),
        ("name=vicreg variance=-1", ["objective.variance=-1", "0 or more"]),
    ],
)
def test_mistakes_get_one_line(given: str, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        load(Config, None, overrides(given))
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_no_mistake() -> None:
    for given in (
        "name=moco version=3 mining.policy=tracin_cp",
        "name=byol mining.mode=eliminate mining.policy=none",
        "name=moco queue=256",
    ):
        load(Config, None, overrides(given))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    folder = tmp_path_factory.mktemp("project")
    manifest = make_dataset(folder / "data", train=24, val=0, test=0)
    (folder / "run.yaml").write_text("data: {manifest: data/manifest.json, image_size: 24}\ntrain: {global_batch: 8}\n")
    return folder, manifest


@pytest.mark.parametrize(
    ("groups", "ranks", "fits"), [(4, 2, True), (4, 4, True), (8, 1, False), (3, 1, False), (2, 4, False)]
)
def test_norm_groups_fit_the_batch_and_the_ranks(
    project: tuple[Path, Manifest], groups: int, ranks: int, fits: bool
) -> None:
    """Parts of two images at least, as many on every rank."""
    folder, manifest = project
    given = overrides(f"name=moco norm=shuffled norm_groups={groups} train.global_batch=8")
    config, world = load(Config, None, [f"folder={folder / 'runs'}", *given]), World(0, ranks, 0, ranks)
    if fits:
        check_run(config, manifest, world)
        return
    with pytest.raises(UserError) as error:
        check_run(config, manifest, world)
    expected = [f"objective.norm_groups={groups}", "train.global_batch=8", f"{ranks} ranks", f"multiple of {ranks}"]
    assert all(word in str(error.value) for word in expected), str(error.value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("name=moco queue=12", ["objective.queue=12", "train.global_batch=8"]),
        ("name=moco norm=shuffled norm_groups=3", ["objective.norm_groups=3", "train.global_batch=8"]),
    ],
)
def test_the_command_says_it_and_writes_nothing(project: tuple[Path, Manifest], given: str, words: list[str]) -> None:
    folder, _ = project
    command = [sys.executable, "-m", "tracekin.cli", "pretrain", "run.yaml", *overrides(given)]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 2, result.stderr
    assert all(word in result.stderr for word in words), result.stderr
    assert result.stderr.count("\n") == 1
    assert sorted(path.name for path in folder.iterdir()) == ["data", "run.yaml"]
