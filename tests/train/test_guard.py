"""A training that goes wrong says so and harms nothing: losses that are no numbers, ranks that drift, collapse."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.data.tiny import make_dataset
from tests.ranks import RankFailedError, run_ranks
from tests.train.test_run import assert_same_end, metrics, run, tiny_config
from tests.train.tiny_run import tiny_backbone
from tracekin import checkpoint
from tracekin.config import Config
from tracekin.data.manifest import read_manifest
from tracekin.data.reader import ShardReader
from tracekin.train.guard import Collapse, DivergedError


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """An unbroken run of two ranks, 4 epochs of 3 steps, whose mining remembers images."""
    folder = tmp_path_factory.mktemp("whole")
    make_dataset(folder / "data", train=50, val=10, test=10)
    config = tiny_config(folder, "train.log_every=1", "mining.queue=24", "mining.warmup=0", "train.save_every=2")
    run_ranks(run, 2, config)
    return config


def run_with(rank: int, config: Config, change: str, bad_rank: int, steps: tuple[int, ...]) -> str:
    """A run in which one rank is harmed at some steps; what it raised, as text."""
    from tracekin.train import loop
    from tracekin.train.guard import DriftError

    original = loop.train_step

    def harmed(engine: Any, target: Any, batch: Any, miner: Any, **context: Any) -> Any:
        hit = rank == bad_rank and context["step"] in steps
        if hit and change == "nan":
            batch.views[0, 0, 0, 0, 0] = math.nan  # one pixel: the loss, and the batch norms' running statistics
        losses = original(engine, target, batch, miner, **context)
        if hit and change == "weight":
            with torch.no_grad():
                engine.module.predictor_last.weight[0, 0] += 1e-6
        if hit and change == "image":
            batch.index[1] = batch.index[0]
        return losses

    loop.train_step = harmed
    with tiny_backbone():
        try:
            loop.pretrain(config)
        except (DivergedError, DriftError) as error:
            return f"{type(error).__name__}: {error}"
    return ""


def test_a_loss_that_is_no_number_costs_its_step_alone(whole: Config, tmp_path: Path) -> None:
    config = replace(whole, folder=str(tmp_path))
    assert run_ranks(run_with, 2, config, "nan", 1, (6,)) == ["", ""]
    lines = metrics(config)
    assert [line["nonfinite"] for line in lines] == [0] * 6 + [1] + [0] * 5
    assert [line["loss"] is None for line in lines] == [False] * 6 + [True] + [False] * 5
    before = metrics(whole)
    assert [line["samples_digest"] for line in lines] == [line["samples_digest"] for line in before]
    assert [line["loss"] for line in lines[:6]] == [line["loss"] for line in before[:6]]
    newest = checkpoint.latest(config.run_folder)
    assert newest
    for part in ("model", "optimiser", "queue"):
        assert all(t.isfinite().all() for t in checkpoint.load_part(newest, part).values())
    told = [json.loads(line) for line in (config.run_folder / "nonfinite.jsonl").read_text().splitlines()]
    assert [(line["step"], line["rank"], len(line["images"])) for line in told] == [(7, 0, 8), (7, 1, 8)]
    reader = ShardReader(read_manifest(config.data.manifest), "train")
    assert all(reader.key(image["number"]) == image["key"] for line in told for image in line["images"])


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_refused_step_leaves_everything_as_it_was(whole: Config, tmp_path: Path, stage: int) -> None:
    """The checkpoint after a refused step holds what the one before it held, but for the images of the queue."""
    train = replace(whole.train, save_every=1, keep_checkpoints=99, zero_stage=stage)
    config = replace(whole, folder=str(tmp_path), train=train)
    run_ranks(run_with, 2, config, "nan", 0, (11,))
    before, after = (config.run_folder / "checkpoints" / f"step-{step:08d}" for step in (11, 12))
    for part in ("model", "optimiser"):
        old, new = checkpoint.load_part(before, part), checkpoint.load_part(after, part)
        assert old.keys() == new.keys()
        assert all(torch.equal(old[name], new[name]) for name in old)
    queue = checkpoint.load_part(after, "queue")
    assert queue["step"][: queue["written"]].unique().tolist() == [10]


def test_a_checkpoint_due_at_a_refused_step_comes_with_the_next_one(whole: Config, tmp_path: Path) -> None:
    config = replace(whole, folder=str(tmp_path), train=replace(whole.train, save_every=0, keep_checkpoints=9))
    run_ranks(run_with, 2, config, "nan", 0, (8,))  # the last of the third epoch
    lasting = checkpoint.complete(config.run_folder, lasting=True)
    assert [path.name[-2:] for path in lasting] == ["03", "06", "10", "12"]
    assert checkpoint.load_state(lasting[2])["epochs"] == 3


def test_too_many_in_a_row_end_all_ranks_and_the_last_checkpoint_goes_on(whole: Config, tmp_path: Path) -> None:
    config = replace(whole, folder=str(tmp_path))
    said = run_ranks(run_with, 2, config, "nan", 0, (7, 8, 9))
    assert said[0] == said[1]
    assert all(word in said[0] for word in ("DivergedError", "3 steps in a row", "step-00000006", "nonfinite.jsonl"))
    named = config.run_folder / "nonfinite.jsonl"
    assert [json.loads(line)["step"] for line in named.read_text().splitlines()] == [8, 8, 9, 9, 10, 10]
    run_ranks(run, 2, config)  # whatever it was has passed
    assert_same_end(whole, config)
    assert named.read_text() == ""  # the steps were accepted after all


@pytest.mark.parametrize(
    ("change", "words"),
    [("weight", "ranks 0, 1 differ in online.predictor_last.weight"), ("image", "rank 1 differs in images")],
)
def test_ranks_that_drift_apart_are_stopped_before_a_checkpoint(
    whole: Config, tmp_path: Path, change: str, words: str
) -> None:
    config = replace(whole, folder=str(tmp_path))
    said = run_ranks(run_with, 2, config, change, 1, (7,))
    assert said[0] == said[1]
    newest = checkpoint.latest(config.run_folder)
    assert newest
    assert newest.name == "step-00000006"
    assert re.search(words, said[0]), said[0]
    run_ranks(run, 2, config)  # the same command again
    assert_same_end(whole, config)


def test_a_collapse_warns_once_or_ends_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    record = {"step": 10, "target_std": 0.001, "effective_rank": 30.0}
    watch = Collapse(Config())
    watch.look(record | {"target_std": 0.5})
    watch.look(record | {"target_std": math.nan})
    assert capsys.readouterr().out == ""
    watch.look(record)
    watch.look(record)
    assert capsys.readouterr().out.count("target_std=0.001 is below 0.02") == 1
    strict = Collapse(replace(Config(), guard=replace(Config().guard, collapse="stop")))
    with pytest.raises(DivergedError, match=r"step 10: .*effective_rank=1 is below 1\.5"):
        strict.look(record | {"effective_rank": 1.0})
    Collapse(replace(Config(), guard=replace(Config().guard, collapse="off"))).look(record)


def test_a_collapsed_run_stops_on_every_rank(whole: Config, tmp_path: Path) -> None:
    guard = replace(whole.guard, collapse="stop", min_effective_rank=100.0)
    with pytest.raises(RankFailedError, match=r"DivergedError.*collapsed"):
        run_ranks(run, 2, replace(whole, folder=str(tmp_path), guard=guard))
