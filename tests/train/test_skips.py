"""Images that cannot be read: a run goes on without them on every rank, says which, and ends above the limit."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.data.tiny import make_dataset
from tests.ranks import RankFailedError, run_ranks
from tests.train.test_run import metrics, run, tiny_config
from tracekin.config import Config, MonitorConfig
from tracekin.data import faults
from tracekin.data.manifest import Manifest
from tracekin.data.order import Shuffle, epoch_order
from tracekin.data.reader import Skipped
from tracekin.monitor.sinks import open_sinks
from tracekin.train.skips import Skips


@pytest.fixture
def damaged(tmp_path: Path) -> Manifest:
    """Three of fifty train images have a flipped byte."""
    manifest = make_dataset(tmp_path / "data", train=50, size=24, shard_size=10)
    for shard, sample in ((0, 3), (2, 9), (4, 0)):
        held = manifest.splits["train"][shard]
        with (tmp_path / "data" / held.file).open("r+b") as file:
            file.seek(held.samples[sample][0] + 800)
            file.write(b"\xfe\xfe")
    return manifest


def test_a_run_replaces_them_and_names_them(damaged: Manifest, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "data.max_bad_fraction=0.06", "data.last_batch=wrap", "train.epochs=2")
    run_ranks(run, 2, config)
    lines = metrics(config)
    assert lines[-1]["step"] == 2 * 4  # 50 images in batches of 16: the last wraps
    named = [json.loads(line) for line in (config.run_folder / "skipped.jsonl").read_text().splitlines()]
    assert {(s["number"], s["reason"]) for s in named} == {(3, "checksum"), (29, "checksum"), (40, "checksum")}
    assert sum(line["skipped"] for line in lines) == len(named) >= 6
    assert all(len(s["key"]) == 32 and s["shard"].startswith("train-") and 1 <= s["step"] <= 8 for s in named)


def test_too_many_end_the_run_on_every_rank(damaged: Manifest, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "data.max_bad_fraction=0.04", "data.last_batch=wrap")
    with pytest.raises(RankFailedError, match=r"UserError: .* could not be read in one epoch, more than"):
        run_ranks(run, 2, config)
    assert (config.run_folder / "skipped.jsonl").exists()
    assert max(line["step"] for line in metrics(config)) <= 4


def test_too_many_on_one_rank_alone_end_both(tmp_path: Path) -> None:
    manifest = make_dataset(tmp_path / "data", train=16, size=24, shard_size=16)
    config = tiny_config(tmp_path, "data.max_bad_fraction=0.1", "train.epochs=2", "train.log_every=1")
    mine = epoch_order([16], Shuffle(config.seed, 16), 0)[8:]  # rank 1's half of the only batch
    held = manifest.splits["train"][0]
    with (tmp_path / "data" / held.file).open("r+b") as file:
        for number in mine[:3].tolist():
            file.seek(held.samples[number][0] + 800)
            file.write(b"\xfe\xfe")
    with pytest.raises(RankFailedError, match=r"3 of 16 train images could not be read in one epoch"):
        run_ranks(run, 2, config)
    named = [json.loads(line) for line in (config.run_folder / "skipped.jsonl").read_text().splitlines()]
    assert {s["number"] for s in named} == set(mine[:3].tolist())


def run_impatient(rank: int, config: Config) -> None:
    """One rank of a run that waits for no file to come back; how long it would, tests/data/test_reader.py tells."""
    faults.time = SimpleNamespace(sleep=lambda pause: None)
    run(rank, config)


def test_a_missing_shard_counts_as_its_images(damaged: Manifest, tmp_path: Path) -> None:
    (tmp_path / "data" / damaged.splits["train"][1].file).unlink()
    with pytest.raises(RankFailedError, match=r"names the shard train-000001.tar, which is not there"):
        run_ranks(run, 1, tiny_config(tmp_path, "data.max_bad_fraction=0.1"))
    config = tiny_config(tmp_path, "data.max_bad_fraction=0.3", "train.epochs=1")
    run_ranks(run_impatient, 1, config)
    named = [json.loads(line) for line in (config.run_folder / "skipped.jsonl").read_text().splitlines()]
    assert "missing" in {s["reason"] for s in named}


def test_what_was_rolled_back_is_not_named_twice(tmp_path: Path) -> None:
    def flush(step: int, *numbers: int) -> None:
        skips = Skips(100, 1.0)
        skips.fresh = [Skipped(number, "00ff", "train-000000.tar", 0, "checksum", "flipped") for number in numbers]
        skips.flush(step, tmp_path)

    flush(4, 1, 2)
    flush(8, 3)
    flush(12, 4)
    open_sinks(MonitorConfig(wandb="disabled"), tmp_path, "run", {}, last_step=5)  # the run goes on from there
    flush(8, 3)
    named = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [(line["step"], line["number"]) for line in named] == [(4, 1), (4, 2), (8, 3)]
