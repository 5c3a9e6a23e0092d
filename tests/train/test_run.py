"""A whole run on a tiny dataset: what it leaves, how it continues, and the golden trace of its losses."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.data.tiny import make_dataset
from tests.ranks import RankFailedError, run_ranks
from tests.train.tiny_run import tiny_backbone
from tracekin import checkpoint
from tracekin.config import Config, UserError, load
from tracekin.data.manifest import read_manifest
from tracekin.distributed.world import World
from tracekin.train.checks import check_run

GOLDEN = Path(__file__).parent.parent / "golden" / "losses.json"
REQUIRED = [
    "step",
    "epoch",
    "loss",
    "loss_byol",
    "loss_mined",
    "lr",
    "tau",
    "hit_rate",
    "chance_rate",
    "mined_fraction",
    "max_in_degree",
    "distinct_fraction",
    "hub_share",
    "score_gap",
    "agreement",
    "target_std",
    "effective_rank",
    "alignment",
    "uniformity",
    "images_per_second",
    "data_wait_fraction",
    "mining_seconds",
    "step_seconds",
    "gathered_bytes",
]


def tiny_config(folder: Path, *overrides: str) -> Config:
    return load(
        Config,
        None,
        [
            f"folder={folder}",
            f"data.manifest={folder / 'data' / 'manifest.json'}",
            "name=tiny",
            "data.image_size=24",
            "data.workers=0",
            "model.projector_hidden=32",
            "model.projection=16",
            "model.predictor_hidden=32",
            "train.global_batch=16",
            "train.epochs=4",
            "train.precision=fp32",
            "train.threads=1",
            "train.log_every=2",
            "train.keep_checkpoints=9",
            "optimiser.lr=0.3",
            "monitor.wandb=disabled",
            "mining.policy=tracin",
            "mining.compare=feature",
            *overrides,
        ],
    )


def run(rank: int, config: Config) -> None:
    """One rank of a run with a tiny encoder."""
    from tracekin.train.loop import pretrain

    with tiny_backbone():
        pretrain(config)


def metrics(config: Config) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (config.run_folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A finished run of one rank: 4 epochs of 3 steps."""
    folder = tmp_path_factory.mktemp("runs")
    make_dataset(folder / "data", train=50, val=10, test=10)
    config = tiny_config(folder)
    run_ranks(run, 1, config)
    return config


def test_what_a_run_leaves(finished: Config) -> None:
    folder = finished.run_folder
    assert load(Config, folder / "config.yaml") == finished
    environment = json.loads((folder / "environment.json").read_text())
    assert (environment["world_size"], environment["engine"], environment["zero_stage"]) == (1, "deepspeed", 0)
    assert environment["packages"]["deepspeed"]
    newest = checkpoint.latest(folder)
    assert newest is not None
    assert newest.name == "step-00000012"
    assert checkpoint.load_state(newest)["config"]["train"]["epochs"] == 4
    assert set(checkpoint.load_model(newest, "online.backbone.")) > {"0.weight", "1.running_mean"}
    lines = metrics(finished)
    assert [line["step"] for line in lines] == [2, 3, 4, 6, 8, 9, 10, 12]
    assert all(set(REQUIRED) <= set(line) for line in lines)
    assert all(0 <= line["hit_rate"] <= 1 and 0 < line["chance_rate"] < 1 for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"]
    pairs = json.loads((folder / "gallery.json").read_text())["pairs"]
    assert pairs
    assert all(0 <= i < 50 and 0 <= j < 50 and i // 2 != j // 2 for i, j, _ in pairs)  # never of the anchor's own group


SAME = ("step", "epoch", "loss", "loss_byol", "loss_mined", "lr", "tau", "hit_rate", "chance_rate", "target_std")


def stop_after(config: Config, step: int, folder: Path) -> Config:
    """A copy of a finished run as it was at an earlier checkpoint."""
    shutil.copytree(config.run_folder, folder / config.name)
    for later in (folder / config.name / "checkpoints").glob("step-*"):
        if later.name > f"step-{step:08d}":
            shutil.rmtree(later)
    (folder / config.name / "checkpoints" / "latest").write_text(f"step-{step:08d}\n")
    return replace(config, folder=str(folder))


def assert_same_end(one: Config, other: Config) -> None:
    assert [[line[key] for key in SAME] for line in metrics(other)] == [
        [line[key] for key in SAME] for line in metrics(one)
    ]
    newest = [checkpoint.latest(config.run_folder) for config in (one, other)]
    for part in checkpoint.PARTS[: 3 if one.mining.queue else 2]:
        old, new = (checkpoint.load_part(path, part) for path in newest if path)
        assert old.keys() == new.keys()
        assert all(torch.equal(old[name], new[name]) for name in old)


def test_resumed_losses_are_bit_identical(finished: Config, tmp_path: Path) -> None:
    """Stopped at a checkpoint and started again, nothing differs."""
    config = stop_after(finished, 6, tmp_path)
    run_ranks(run, 1, config)
    assert_same_end(finished, config)


@pytest.mark.parametrize(
    "mining",
    [
        ["mining.policy=tracin_cp_cosine", "mining.k=2"],
        ["mining.policy=ghost", "mining.queue=24", "mining.queue_half_life=2", "mining.transport=bf16"],
        ["mining.policy=fnc", "mining.support_views=1", "mining.keep=mutual"],
    ],
    ids=lambda mining: mining[0].rpartition("=")[2],
)
def test_what_mining_remembers_survives_a_stop(finished: Config, tmp_path: Path, mining: list[str]) -> None:
    """Older checkpoints, the queue: two ranks over a ring, stopped and started again, end as if unbroken."""
    manifest = f"data.manifest={finished.data.manifest}"
    whole = tiny_config(tmp_path / "a", manifest, *mining, "mining.ring_above=0", "mining.warmup=0", "optimiser.lr=0.1")
    run_ranks(run, 2, whole)
    lines = metrics(whole)
    assert lines[-1]["mined_fraction"] > 0
    assert lines[-1]["gathered_bytes"] > 0
    assert 0 <= lines[-1]["agreement"] <= 1
    config = stop_after(whole, 6, tmp_path / "b")
    run_ranks(run, 2, config)
    assert_same_end(whole, config)


def test_a_pool_of_one_rank_mines_its_own_images_only(finished: Config, tmp_path: Path) -> None:
    manifest = f"data.manifest={finished.data.manifest}"
    config = tiny_config(tmp_path, manifest, "mining.pool=rank", "train.epochs=1")
    run_ranks(run, 2, config)
    assert metrics(config)[-1]["gathered_bytes"] == 0
    assert metrics(config)[-1]["mined_fraction"] > 0


def test_adamw_on_two_ranks_with_zero_resumes_bit_for_bit(finished: Config, tmp_path: Path) -> None:
    manifest = f"data.manifest={finished.data.manifest}"
    whole = tiny_config(tmp_path / "a", manifest, "train.zero_stage=2", "optimiser.name=adamw", "optimiser.lr=0.002")
    run_ranks(run, 2, whole)
    config = stop_after(whole, 6, tmp_path / "b")
    run_ranks(run, 2, config)
    assert_same_end(whole, config)


def test_a_finished_run_does_nothing_again(finished: Config) -> None:
    before = (finished.run_folder / "metrics.jsonl").read_bytes()
    run_ranks(run, 1, finished)
    assert (finished.run_folder / "metrics.jsonl").read_bytes() == before


OF_THE_MACHINE = ("images_per_second", "data_wait_fraction", "gathered_bytes")
COUNTED = ("hit_rate", "mined_fraction", "max_in_degree", "distinct_fraction", "hub_share", "score_gap", "agreement")
"""What hangs on single choices: rounding may turn one of them, but a sum over ranks taken for a mean doubles it."""


def assert_same_whatever_the_world(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    """Every figure that does not measure the machine, and those that are counted in the mean over all lines."""
    for key in one[0].keys() | other[0].keys():
        if key in OF_THE_MACHINE or key.endswith("_seconds"):
            continue
        expected, found = ([line[key] for line in lines] for lines in (one, other))
        if key in ("skipped", "nonfinite"):
            assert max(expected) == max(found) == 0
            continue
        if key == "samples_digest":
            assert found == expected
            continue
        if key == "uniformity":
            assert -4 < min(found) <= max(found) < 0
        else:
            assert min(found) >= 0 < max(found), key  # not None, and not all 0
        if key in COUNTED:
            assert sum(found) == pytest.approx(sum(expected), rel=0.1), key
        else:
            assert found == pytest.approx(expected, rel=1e-3), key


@pytest.mark.parametrize("stage", [1, 2])
def test_two_ranks_with_zero_follow_the_same_losses_and_resume(finished: Config, tmp_path: Path, stage: int) -> None:
    """Two ranks see the same batches and losses as one; a run started at ZeRO 0 in one process goes on at theirs."""
    overrides = (f"data.manifest={finished.data.manifest}", f"train.zero_stage={stage}")
    config = tiny_config(tmp_path, *overrides)
    run_ranks(run, 2, config)
    one, two = metrics(finished), metrics(config)
    assert_same_whatever_the_world(one, two)
    assert two[-1]["gathered_bytes"] > 0
    # What one process began without ZeRO, two ranks finish with it.
    config = replace(stop_after(finished, 6, tmp_path / "resumed"), train=config.train)
    run_ranks(run, 2, config)
    assert metrics(config)[-1]["loss"] == pytest.approx(one[-1]["loss"], rel=1e-3)


def test_a_run_starts_from_the_weights_of_another_once(finished: Config, tmp_path: Path) -> None:
    """Backbones, online and target, are the other run's; heads are fresh; going on needs the other run no more."""
    source = Path(shutil.copytree(finished.run_folder, tmp_path / "source"))
    manifest = f"data.manifest={finished.data.manifest}"
    still = ("optimiser.lr=1e-12", "optimiser.weight_decay=0", "train.epochs=2", "mining.policy=none", "seed=5")
    config = tiny_config(tmp_path, manifest, f"init.from={source}", "mining.compare=none", *still)
    run_ranks(run, 2, config)
    theirs, ours = (
        checkpoint.load_part(found, "model") for found in map(checkpoint.latest, (source, config.run_folder)) if found
    )
    for name in ("0.weight", "1.weight", "1.bias", "3.weight"):
        for network in ("online", "target"):
            assert torch.allclose(ours[f"{network}.backbone.{name}"], theirs[f"online.backbone.{name}"], atol=1e-7)
    assert not torch.allclose(theirs["target.backbone.0.weight"], theirs["online.backbone.0.weight"], atol=1e-4)
    assert not torch.allclose(ours["online.projector.0.0.weight"], theirs["online.projector.0.0.weight"], atol=1e-2)

    def recorded(config: Config) -> Any:
        newest = checkpoint.latest(config.run_folder)
        assert newest is not None
        beside = json.loads((config.run_folder / "environment.json").read_text())["init"]
        assert checkpoint.load_state(newest)["environment"]["init"] == beside
        return beside

    first = recorded(config)
    assert (first["path"], first["format"], len(first["sha256"])) == (str(source), "checkpoint step-00000012", 64)
    shutil.rmtree(source)
    stopped = stop_after(config, 3, tmp_path / "stopped")
    (stopped.run_folder / "environment.json").unlink()
    run_ranks(run, 1, stopped)
    assert metrics(stopped)[-1]["step"] == 6
    assert recorded(stopped) == first


def test_other_shards_under_the_same_path_are_refused(tmp_path: Path) -> None:
    make_dataset(tmp_path / "data", train=20, val=0, test=0)
    config = tiny_config(tmp_path, "train.epochs=1")
    run_ranks(run, 1, config)
    make_dataset(tmp_path / "data", train=20, val=0, test=0, seed=1)
    with pytest.raises(Exception, match="other shards"):
        run_ranks(run, 1, config)


def run_allowing(rank: int, config: Config) -> None:
    """One rank of ``tracekin pretrain --allow-config-change``."""
    from tracekin.train.loop import pretrain

    with tiny_backbone():
        pretrain(config, allow_change=True)


def test_another_config_goes_on_only_if_it_is_allowed_and_fits(finished: Config, tmp_path: Path) -> None:
    stopped = stop_after(finished, 6, tmp_path)
    slower = replace(stopped, optimiser=replace(stopped.optimiser, lr=0.2))
    with pytest.raises(RankFailedError, match=r"optimiser\.lr 0\.3 -> 0\.2.*--allow-config-change"):
        run_ranks(run, 1, slower)
    (stopped.run_folder / "config.yaml").unlink()  # the checkpoint knows it too
    with pytest.raises(RankFailedError, match=r"step-00000006 holds a run of another config .*lr 0\.3 -> 0\.2"):
        run_ranks(run, 1, slower)
    wider = replace(stopped, model=replace(stopped.model, projection=24))
    with pytest.raises(RankFailedError, match=r"model\.\*: \S+ is \[.*16.*\] there and \[.*24.*\] under this"):
        run_ranks(run_allowing, 1, wider)
    other = replace(stopped, optimiser=replace(stopped.optimiser, name="adamw"))
    with pytest.raises(RankFailedError, match=r"state of optimiser\.name=sgd, which adamw cannot"):
        run_ranks(run_allowing, 1, other)
    before = metrics(finished)

    run_ranks(run_allowing, 1, slower)
    lines = metrics(slower)
    assert [line["step"] for line in lines] == [line["step"] for line in before]
    assert lines[3]["loss"] == before[3]["loss"]
    assert lines[-1]["lr"] == pytest.approx(before[-1]["lr"] * 2 / 3)
    run_ranks(run, 1, slower)  # it is the run's own config now


def test_what_mining_remembers_of_another_config_is_left_out(finished: Config, tmp_path: Path) -> None:
    manifest = f"data.manifest={finished.data.manifest}"
    whole = tiny_config(tmp_path / "a", manifest, "mining.queue=24", "mining.warmup=0")
    run_ranks(run, 1, whole)
    config = stop_after(whole, 6, tmp_path / "b")
    run_ranks(run_allowing, 1, replace(config, mining=replace(config.mining, queue=48, sketch_dim=16)))
    assert [line["step"] for line in metrics(config)] == [line["step"] for line in metrics(whole)]
    newest = checkpoint.latest(config.run_folder)
    assert newest
    queue = checkpoint.load_part(newest, "queue")
    assert len(queue["ids"]) == 48
    assert min(queue["step"][: queue["written"]].tolist()) == 9  # the last three of 16 images each: 48


def test_a_set_may_move(finished: Config, tmp_path: Path) -> None:
    config = stop_after(finished, 9, tmp_path)
    moved = shutil.copytree(Path(finished.data.manifest).parent, tmp_path / "elsewhere")
    run_ranks(run, 1, replace(config, data=replace(config.data, manifest=str(moved / "manifest.json"))))
    assert_same_end(finished, config)


def test_golden_losses(finished: Config) -> None:
    """A refactor proves that it changed nothing (fp32, one thread; CPUs differ by less than 1e-4)."""
    losses = [[line["step"], line["loss"], line["loss_byol"], line["loss_mined"]] for line in metrics(finished)]
    if not GOLDEN.exists():
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps(losses, indent=1) + "\n")
        pytest.fail(f"{GOLDEN} did not exist and was written: look at it and commit it")
    golden = json.loads(GOLDEN.read_text())
    assert len(golden) == len(losses)
    for expected, actual in zip(golden, losses, strict=True):
        assert actual == pytest.approx(expected, rel=1e-4)


def test_unlabelled_images_train_and_leave_rates_out(tmp_path: Path) -> None:
    make_dataset(tmp_path / "data", train=20, val=0, test=0, task="unlabelled")
    config = tiny_config(tmp_path, "train.epochs=1", "data.channels=1", "data.augment.preset=xray")
    run_ranks(run, 2, config)
    last = metrics(config)[-1]
    assert last["hit_rate"] is None
    assert last["chance_rate"] is None
    assert last["mined_fraction"] > 0


@pytest.mark.parametrize(
    ("overrides", "world_size", "words"),
    [
        (["train.global_batch=64"], 1, ["50 samples", "global batch of 64"]),
        (["train.global_batch=10"], 3, ["train.global_batch=10", "3 ranks"]),
        (["train.global_batch=1"], 1, ["train.global_batch=1", "batch norm"]),
        (["optimiser.lr=0.1"], 1, ["optimiser.lr", "0.3 -> 0.1", "name="]),
        (["mining.policy=none", "seed=4"], 1, ["mining.policy tracin -> none", "seed 0 -> 4"]),
        (["mining.k=16"], 1, ["mining.k=16", "pool of 16", "1 to 15"]),
        (["mining.k=8", "mining.pool=rank"], 2, ["mining.k=8", "pool of 8", "mining.pool=global"]),
        (["mining.k=8", "mining.pool=node"], 4, ["pool of 8"]),
        (["mining.queue=15"], 1, ["mining.queue=15", "16"]),
        (["name=new", "init.from=nowhere.pth"], 1, ["init.from=nowhere.pth", "no such file"]),
        (["name=new", "init.from=tests"], 1, ["init.from=tests", "without a checkpoint"]),
        (["mining.policy=tracin_cp", "train.keep_checkpoints=1"], 1, ["tracin_cp", "train.keep_checkpoints to 2"]),
    ],
)
def test_what_cannot_work_is_said_first(
    finished: Config, overrides: list[str], world_size: int, words: list[str]
) -> None:
    config = tiny_config(Path(finished.folder), *overrides)
    with pytest.raises(UserError) as error:
        check_run(config, read_manifest(config.data.manifest), World(0, world_size, 0, 2 if world_size == 4 else 1))
    assert all(word in str(error.value) for word in words), str(error.value)


def test_what_does_not_alter_the_run_may_change(finished: Config) -> None:
    config = tiny_config(Path(finished.folder), "train.log_every=5", "data.workers=3", "monitor.wandb=offline")
    check_run(config, read_manifest(config.data.manifest), World(0, 2, 0, 2))
