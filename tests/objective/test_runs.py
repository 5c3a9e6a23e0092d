"""Runs of every objective: what they leave, and that a stop changes nothing, MoCo's queue included."""

from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch

from tests.data.tiny import make_dataset
from tests.ranks import RankFailedError, run_ranks
from tests.train.same import differing
from tests.train.test_elastic import run_all
from tests.train.test_run import metrics, stop_after, tiny_config
from tests.train.tiny_run import BATCH, context, global_batch, miner, networks, tiny_backbone
from tracekin import checkpoint
from tracekin.config import Config, ObjectiveName, own
from tracekin.train.loop import pretrain

NAMES = get_args(ObjectiveName)
STEPS, SAVED = 6, 2
PARTS = {
    "barlow_twins": {"loss_invariance", "loss_redundancy"},
    "vicreg": {"loss_invariance", "loss_variance", "loss_covariance"},
}


def config_of(folder: Path, name: str, *overrides: str) -> Config:
    heads = [] if "predictor_hidden" in own(name).widths else ["model.predictor_hidden=0"]
    options = {"moco": ["objective.queue=48"], "wmse": ["model.projection=6"]}.get(name, [])
    fixed = ["train.log_every=1", "train.epochs=2", f"train.save_every={SAVED}", "mining.warmup=0", "optimiser.lr=0.05"]
    fixed += ["mining.policy=tracin_cosine", f"objective.name={name}", f"name={name}"]
    return tiny_config(folder, *fixed, *heads, *options, *overrides)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Config]:
    """Finished runs of each objective on one rank; of MoCo on two as well."""
    folder = tmp_path_factory.mktemp("objectives")
    make_dataset(folder / "data", train=50, val=4, test=4)
    found = {name: config_of(folder, name) for name in NAMES}
    found["two"] = config_of(folder, "moco", "name=two")
    run_ranks(run_all, 1, [found[name] for name in NAMES])
    run_ranks(run_all, 2, [found["two"]])
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_run_says_what_its_loss_is_made_of(whole: dict[str, Config], name: str) -> None:
    lines = metrics(whole[name])
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    said = {key for key in lines[-1] if key.startswith("loss_")} - {"loss_seconds", "loss_mined"}
    assert said == {f"loss_{name}"} | PARTS.get(name, set())
    for line in lines:
        assert line["loss"] == pytest.approx(line[f"loss_{name}"] + 0.25 * line["loss_mined"], rel=1e-5, abs=1e-6)
        assert (line["tau"] is None) == (not own(name).momentum)
        assert line["mined_fraction"] > 0 or (name == "moco" and line["step"] == 1)  # its queue is empty


def test_a_stop_changes_no_bit_of_any(whole: dict[str, Config], tmp_path: Path) -> None:
    resumed = {name: stop_after(whole[name], SAVED, tmp_path) for name in NAMES}
    run_ranks(run_all, 1, [*resumed.values()])
    last = f"checkpoints/step-{STEPS:08d}"
    for name, config in resumed.items():
        assert differing(whole[name].run_folder / last, config.run_folder / last) == []
        assert [line["loss"] for line in metrics(config)] == [line["loss"] for line in metrics(whole[name])]
    model = checkpoint.load_part(resumed["moco"].run_folder / last, "model")
    assert (model["memory.ids_N"] >= 0).all()
    assert int(model["memory.written"]) == STEPS * 16


def test_mocos_queue_goes_along_into_another_world(whole: dict[str, Config], tmp_path: Path) -> None:
    resumed = stop_after(whole["two"], SAVED, tmp_path)
    run_ranks(run_all, 1, [resumed])
    for before, after in zip(metrics(whole["two"]), metrics(resumed), strict=True):
        assert before["samples_digest"] == after["samples_digest"]
        assert after["loss"] == pytest.approx(before["loss"], rel=1e-4)


def going_on(rank: int, config: Config) -> None:
    with tiny_backbone():
        pretrain(config, allow_change=True)


def test_another_objective_or_queue_does_not_fit(whole: dict[str, Config], tmp_path: Path) -> None:
    stopped = stop_after(whole["moco"], SAVED, tmp_path)
    longer = replace(stopped, objective=replace(stopped.objective, queue=64))
    with pytest.raises(RankFailedError, match=r"memory does not fit objective\.queue: \S+ is \[48.* there and \[64"):
        run_ranks(going_on, 1, longer)
    other = replace(config_of(tmp_path, "vicreg"), name="moco", data=stopped.data)
    with pytest.raises(RankFailedError, match=r"online does not fit model\.\*"):
        run_ranks(going_on, 1, other)


def test_a_refused_step_leaves_the_queue_alone() -> None:
    from tracekin.train.step import train_step

    online, objective = networks(torch.float64, name="moco")
    memory = objective.kept["memory"].state_dict()
    before = {key: tensor.clone() for key, tensor in memory.items()}
    train_step(
        online,
        objective,
        global_batch(torch.float64),
        miner(objective, "none"),
        tau=0.9,
        accept=lambda loss: False,
        **context(),
    )
    assert all(torch.equal(memory[key], before[key]) for key in before)
    batch = global_batch(torch.float64)
    objective.remember(objective.project(batch.views, online(batch.views), 0), batch.index)
    assert int(memory["written"]) == BATCH
