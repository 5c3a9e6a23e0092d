"""Keys of objectives: the papers' where left out, and one line for what does not fit."""

import re
from pathlib import Path

import pytest

from tracekin.cli import call
from tracekin.config import Config, UserError, load
from tracekin.distributed.world import World
from tracekin.train.checks import _check_objective


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["byol"], {"tau_base": 0.99, "projection": 256, "projector_hidden": 4096, "predictor_hidden": 4096}),
        (["simsiam"], {"projection": 2048, "projector_hidden": 2048, "predictor_hidden": 512}),
        (["simclr"], {"temperature": 0.1, "projection": 128, "projector_hidden": 512, "predictor_hidden": 0}),
        (["moco"], {"temperature": 0.2, "tau_base": 0.99, "queue": 4096, "norm": "cross_rank", "norm_groups": None}),
        (["moco", "objective.norm=shuffled"], {"norm_groups": 8}),
        (["moco", "objective.version=3"], {"temperature": 1.0, "queue": None, "predictor_hidden": 4096}),
        (["barlow_twins"], {"redundancy": 0.005, "projection": 1024, "projector_hidden": 2048}),
        (["barlow_twins", "train.global_batch=64"], {"projection": 256}),
        (
            ["vicreg", "train.global_batch=4096"],
            {"invariance": 25, "variance": 25, "covariance": 1, "projection": 2048},
        ),
        (["wmse"], {"sub_batch": 128, "projection": 64, "projector_hidden": 1024}),
        (["wmse", "train.global_batch=64"], {"sub_batch": 64, "projection": 32}),
        (["wmse", "train.global_batch=192"], {"sub_batch": 96, "projection": 48}),
        (["simclr", "objective.temperature=0.5", "model.projection=7"], {"temperature": 0.5, "projection": 7}),
    ],
    ids=" ".join,
)
def test_what_is_left_out_is_the_papers(overrides: list[str], expected: dict[str, object]) -> None:
    config = load(Config, None, [f"objective.name={overrides[0]}", *overrides[1:]])
    found = vars(config.objective) | vars(config.model)
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["objective.name=simklr"], ["objective.name", "simclr"]),
        (["objective.name=simclr", "objective.queue=512"], ["objective.queue=512", "moco", "objective.temperature"]),
        (["objective.tau_base=0.9", "objective.name=vicreg"], ["objective.tau_base=0.9", "byol and moco", "variance"]),
        (["objective.name=simsiam", "objective.redundancy=1"], ["objective.redundancy=1", "takes no key"]),
        (["objective.name=moco", "objective.version=3", "objective.queue=512"], ["objective.queue", "version=3"]),
        (["objective.name=moco", "objective.norm_groups=4"], ["objective.norm_groups", "norm=cross_rank"]),
        (["objective.name=moco", "objective.queue=1000"], ["objective.queue=1000", "train.global_batch=256", "4096"]),
        (["objective.name=wmse", "objective.sub_batch=100"], ["objective.sub_batch=100", "train.global_batch=256"]),
        (["objective.name=wmse", "model.projection=128"], ["objective.sub_batch=128", "model.projection=128", "127"]),
        (
            ["objective.name=wmse", "train.global_batch=2", "model.projection=8"],
            ["objective.sub_batch=2", "projection=8"],
        ),
        (["objective.name=simclr", "model.predictor_hidden=64"], ["model.predictor_hidden=64", "no predictor"]),
        (["objective.name=simclr", "objective.temperature=0"], ["objective.temperature=0", "above 0"]),
        (["objective.name=vicreg", "objective.covariance=-1"], ["objective.covariance=-1", "0 or more"]),
        (["mining.mode=eliminate"], ["mining.mode=eliminate", "objective.name=byol", "simclr or moco"]),
        (["objective.name=moco", "mining.policy=tracin_cp"], ["mining.policy=tracin_cp", "moco's queue"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value[0], str) else None,
)
def test_what_does_not_fit_is_one_line(overrides: list[str], told: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load(Config, None, overrides)
    assert all(part in str(caught.value) for part in told), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("groups", "ranks", "fits"), [(4, 2, True), (8, 8, True), (4, 8, False), (5, 1, False), (16, 1, False)]
)
def test_groups_of_shuffled_batch_norm_fit_ranks_and_batch(groups: int, ranks: int, fits: bool) -> None:
    overrides = ["objective.name=moco", "objective.norm=shuffled", f"objective.norm_groups={groups}"]
    config = load(Config, None, [*overrides, "train.global_batch=16"])
    world = World(0, ranks, 0, ranks)
    if fits:
        _check_objective(config, world)
    else:
        with pytest.raises(UserError, match=rf"objective\.norm_groups={groups} .* multiple of {ranks} that divides"):
            _check_objective(config, world)


def test_the_command_ends_with_2_and_leaves_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["pretrain", "configs/demo.yaml", f"folder={tmp_path}", "objective.name=moco", "objective.queue=100"]
    assert call(words)[0] == 2
    assert re.search(r"objective\.queue=100 is no multiple of train\.global_batch=64", capfd.readouterr().err)
    assert [*tmp_path.iterdir()] == []
