"""Mining at scale and over cheaper transport: formulas by hand, what they are held against, claims that can fail."""

import copy
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import harness, mining_bytes, mining_scale, mining_transport, policy_study
from benchmarks.mining_bytes import MODES, Received, Shape, received_bytes
from tests.data.tiny import make_dataset
from tests.ranks import run_ranks
from tests.test_benchmark_study import write_run
from tests.train.tiny_run import tiny_backbone
from tracekin.config import Config, load
from tracekin.distributed import collectives
from tracekin.distributed.collectives import Traffic

NAN = float("nan")
CPU = torch.device("cpu")
TINY = Shape(rows=4, hidden=600, projection=8, labels=2)
STEP = {"seconds": 1.0, "of": "nothing"}


def test_bytes_by_hand() -> None:
    shape = Shape(rows=3, hidden=1000, projection=10, labels=2)
    deltas, targets, identity = 80, 80, 24  # a column: 2 views of 10 in fp32; two int64 and two floats
    for mode, gpus, expected in (
        ("exact", 4, 12 * (8000 + deltas + targets + identity)),
        ("bf16", 4, 12 * (4000 + deltas // 2 + targets + identity)),
        ("sketch 512", 4, 12 * (4096 + deltas + targets + identity)),
        ("node", 4, 12 * (8000 + deltas + targets + identity)),
        ("node", 64, 24 * (8000 + deltas + targets + identity)),
        ("ring", 4, 9 * 8000 + 12 * (deltas + targets + identity)),
    ):
        assert received_bytes(mode, gpus, shape) == expected, (mode, gpus)


@settings(max_examples=10, deadline=None)
@given(
    shape=st.builds(
        Shape, st.integers(1, 5), st.sampled_from([3, 512, 600]), st.integers(1, 5), labels=st.integers(0, 3)
    ),
    gpus=st.sampled_from([8, 16, 24]),
)
def test_simulated_worlds_count_as_the_formula_says(shape: Shape, gpus: int) -> None:
    for by_world in mining_bytes.count_in_worlds(shape, (gpus,)).values():
        assert by_world[str(gpus)]["ratio"] == 1
        assert by_world[str(gpus)]["complete"]


def test_large_worlds_are_scaled() -> None:
    for by_world in mining_bytes.count_in_worlds(Shape(rows=8, hidden=16, projection=4), (8, 64)).values():
        assert by_world["64"]["ratio"] == 1
        assert by_world["64"]["complete"]


def test_another_count_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Traffic, "count", lambda self, tensor: setattr(self, "bytes", self.bytes + tensor.numel()))
    for by_world in mining_bytes.count_in_worlds(TINY, (8,)).values():
        assert abs(by_world["8"]["ratio"] - 1) > 0.1


def test_real_ranks_receive_what_the_formula_says() -> None:
    received = run_ranks(mining_bytes.receive_every, 2, TINY)
    found = mining_bytes.check_ranks(received, TINY)
    assert set(found) == set(MODES)
    for one in found.values():
        assert one["ratio"] == 1
        assert one["complete"]
    received[1]["bf16"] = received[1]["bf16"]._replace(right=7)
    received[1]["ring"] = received[1]["ring"]._replace(bytes=1)
    found = mining_bytes.check_ranks(received, TINY)
    assert not found["bf16"]["complete"]
    assert found["ring"]["ratio"] < 0.1


def test_transfers_and_their_table() -> None:
    rows = mining_bytes.transfers(Shape(), 0.5)
    first = rows[0]
    assert (first["gpus"], first["mode"]) == (8, "exact")
    assert first["seconds"][25] == pytest.approx(2048 * 36900 / 25e9, rel=1e-3)
    assert first["share"][25] == first["seconds"][25] / 0.5
    assert first["shortest_step_seconds"][400] == pytest.approx(100 * first["bytes"] / 400e9)
    for step in (1e-3, 0.5, 100.0):
        lines = mining_bytes.table(mining_bytes.transfers(Shape(), step))
        assert len(lines) == 2 + len(rows)
        assert len({len(line) for line in lines}) == 1
        assert len(lines[0]) <= 80
    assert sum("!" in line for line in lines) == 0
    assert mining_bytes.reach(rows)["exact"][25] < mining_bytes.reach(rows)["exact"][400]
    assert all(
        most == 0
        for speeds in mining_bytes.reach(mining_bytes.transfers(Shape(), 1e-9)).values()
        for most in speeds.values()
    )
    assert all(
        most == 1024
        for speeds in mining_bytes.reach(mining_bytes.transfers(Shape(), 1e9)).values()
        for most in speeds.values()
    )


@given(power=st.floats(0.5, 2.5), first=st.floats(1e-3, 10))
def test_the_slope_is_the_power(power: float, first: float) -> None:
    sizes = (4096, 8192, 65536)
    found = {str(size): {"seconds": {"median": first * size**power}} for size in sizes}
    found["1024"] = {"seconds": {"median": 100.0}}  # too small to count
    assert mining_scale.slope(found) == pytest.approx(power)
    assert math.isnan(mining_scale.slope({key: found[key] for key in ("1024", "4096")}))


def good() -> dict[str, Any]:
    mode = {str(size): {"seconds": {"median": size * 1e-6}, "peak_bytes": 1 << 29} for size in (4096, 8192)}
    one = {"ratio": 1.019, "complete": True}
    return {
        "scale": {"fp32": mode, "ring": copy.deepcopy(mode)},
        "ring_blocks": 3,
        "worlds": {"exact": {"8": one}},
        "ranks": {"exact": dict(one)},
    }


@pytest.mark.parametrize(
    ("path", "value", "broken"),
    [
        (("scale", "fp32", "8192", "seconds", "median"), 8192e-6 * 1.2, "time"),
        (("scale", "ring", "4096", "peak_bytes"), (1 << 29) + 1, "memory"),
        (("ring_blocks",), 3.5, "memory"),
        (("worlds", "exact", "8", "ratio"), 0.979, "bytes"),
        (("ranks", "exact", "complete"), False, "bytes"),
    ],
)
def test_each_claim_can_fail(path: tuple[str, ...], value: float, broken: str) -> None:
    assert all(mining_scale.summarise(good())["holds"].values())
    found = good()
    place: Any = found
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert [name for name, holds in mining_scale.summarise(found)["holds"].items() if not holds] == [broken]


def test_memory_beyond_the_pool_is_bounded_by_the_chunk() -> None:
    found = mining_scale.measure(Shape(rows=64, hidden=16, projection=8), (8192, 32768), rounds=1)
    assert set(found) == {"fp32", "bf16", "ring"}
    for mode in ("fp32", "bf16"):
        small, large = (found[mode][size]["peak_bytes"] for size in ("8192", "32768"))
        assert 0 < large <= 1.1 * small
    assert found["ring"]["32768"]["peak_bytes"] >= 32768 * 2 * 2 * 8 * 4, "targets and deltas of everybody"


def test_blocks_that_a_ring_holds_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 2 <= mining_scale.ring_blocks(TINY) <= 4
    hoard = []
    start_shift = collectives.start_shift

    def hoarding(*arguments: Any) -> Any:
        hoard.append(start_shift(*arguments))
        return hoard[-1]

    monkeypatch.setattr(collectives, "start_shift", hoarding)
    assert mining_scale.ring_blocks(TINY) == pytest.approx(7, abs=0.1)


def test_sizes_that_do_not_fit_are_left_out() -> None:
    column = 2 * (6 * 4096 + 10 * 256)
    assert mining_scale.fitting((1024, 4096), Shape(), mining_scale.SPARE + 4095 * column) == [1024]
    assert mining_scale.fitting((1024,), Shape(), 1e6) == []


def test_the_step_is_a_gpus_where_one_is_on_record(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(mining_scale, "run_ranks", lambda *_, **__: [3.0])
    assert mining_scale.read_step(Shape(), 1)["seconds"] == 3.0
    assert "NO GPU" in mining_scale.read_step(Shape(), 1)["of"]
    for name, rows, step in (("a", 256, 0.5), ("b", 256, 0.4), ("c", 64, 0.1)):
        policies = {"tracin": {"plain_step_seconds": {"median": step}}}
        record = {"device": {"name": name}, "resnet50_224_bf16": {"rows": rows, "policies": policies}}
        (tmp_path / f"gpu-{name}.json").write_text(json.dumps(record))
    (tmp_path / "gpu-d.json").write_text(json.dumps({"resnet50_224_bf16": {"error": "it broke"}}))
    found = mining_scale.read_step(Shape(), 1)
    assert found["seconds"] == 0.4
    assert "on one b" in found["of"]


def test_a_cpu_step_is_timed() -> None:
    sizes = ["model.projector_hidden=32", "model.projection=16", "model.predictor_hidden=32", "data.image_size=32"]
    config = load(Config, None, [*sizes, "train.global_batch=4"])
    assert run_ranks(mining_bytes.cpu_step_seconds, 1, config, 1, 1)[0] > 0


@pytest.mark.parametrize(("peak_mib", "code"), [(512, 0), (0, 1)])
def test_the_scale_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], peak_mib: int, code: int
) -> None:
    few = Shape(rows=32, hidden=8, projection=4)
    ideal = {mode: Received(received_bytes(mode, 2, few), 64, 64) for mode in MODES}
    monkeypatch.setattr(mining_scale, "run_ranks", lambda *_: [ideal, ideal])
    monkeypatch.setattr(mining_scale, "read_step", lambda *_: STEP)
    monkeypatch.setattr(
        mining_scale, "BOUND", {**mining_scale.BOUND, "slope_off_1": 9, "ring_blocks": 9, "peak_mib": peak_mib or 1e-6}
    )
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    words = (
        "--rows=32 --hidden=8 --projection=4 --rounds=1 --threads=1 --save --sizes 32 4096 8192 4194304 --memory=1.2"
    )
    monkeypatch.setattr(sys, "argv", ["mining_scale", *words.split()])
    with pytest.raises(SystemExit) as exit_:
        mining_scale.main()
    assert exit_.value.code == code
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line for line in lines if len(line) > 80] == []
    assert lines[0].startswith("Left out, for want of memory: 4194304 columns")
    record = json.loads(last)
    assert list(record)[-1] == "ratio"
    assert set(record["scale"]["ring"]) == {"4096", "8192"}, "32 columns are one rank's"
    assert record["ratio"]["counted_bytes"] == 1
    assert record == json.loads((tmp_path / "mining_scale.json").read_text(encoding="utf-8"))


def test_sizes_that_are_no_ranks_rows_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["mining_scale", "--sizes", "1000"])
    with pytest.raises(SystemExit) as exit_:
        mining_scale.main()
    assert exit_.value.code == 2


def test_outcomes_by_hand() -> None:
    """Five anchors: same choice, a worse one, none instead of one, one instead of none, none both times."""
    exact, column = torch.tensor([1, 0, 0, -1, -1]), torch.tensor([1, 2, -1, 0, -1])
    score = torch.tensor([[0, 4, 1, 0, 0], [8, 0, 2, 0, 0], [5, 0, 0, 0, 0], [-1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]).float()
    sharing = torch.zeros(5, 5, dtype=torch.bool)
    sharing[1, 2] = sharing[2, 0] = True
    outcome = mining_transport.compare_choices(exact, column, score, sharing)
    expected = {
        "changed": [0, 1, 1, 1, NAN],
        "was": [NAN, 0, 1, NAN, NAN],
        "now": [NAN, 1, NAN, 0, NAN],
        "regret": [0, 0.75, 1, NAN, NAN],
    }
    for key, values in expected.items():
        torch.testing.assert_close(getattr(outcome, key), torch.tensor(values), equal_nan=True, check_dtype=False)
    found = mining_transport.measure(mining_transport.Outcome(*(part[None] for part in outcome)), torch.ones(1, 5))
    assert found["changed"] == 0.75
    assert found["hit"] == 1
    assert found["regret"] == pytest.approx(1.75 / 3)


def test_settings_are_named_and_fit_the_width() -> None:
    names = [one.name for one in mining_transport.settings(300)]
    assert names == ["exact", "64", "128", "256", "bf16", "bf16 64", "bf16 128", "bf16 256"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run of two epochs, its networks drawn instead of trained."""
    root = tmp_path_factory.mktemp("transport")
    manifest = make_dataset(root / "data", train=24, group_size=1, classes=3)
    model = ["model.projector_hidden=16", "model.projection=8", "model.predictor_hidden=16"]
    data = [f"data.manifest={root / 'data' / 'manifest.json'}", "data.image_size=16", "data.workers=0"]
    rest = [f"folder={root}", "name=run", "train.global_batch=8", "mining.policy=none"]
    write_run(load(Config, None, [*model, *data, *rest]), manifest)
    with tiny_backbone():
        yield root / "run"


def test_the_transport_command(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--pools", "8,12", "--anchors", "24", "--sketches", "2,8", "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["mining_transport", str(run_folder), *words])
    mining_transport.main()
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line for line in lines if len(line) > 80] == []
    record = json.loads(last)
    assert list(record)[-1] == "ratio"
    assert record["epochs"] == [2], "the newest alone"
    assert record["anchors"] == {"8": 24, "12": 24}
    for policy in mining_transport.POLICIES:
        for pool, found in record["changes"]["2"][policy].items():
            assert list(found) == ["exact", "2", "8", "bf16", "bf16 2", "bf16 8"]
            assert (found["exact"]["changed"], found["exact"]["regret"]) == (0, 0)
            assert found["2"]["changed"] > 0
            assert found["2"]["regret"] > 0
            shape = Shape(rows=int(pool), hidden=16, projection=8, labels=3)
            for mode, name in (("exact", "exact"), ("bf16", "bf16")):
                assert found[name]["bytes"] == received_bytes(mode, 1, shape) / int(pool)
            assert found["exact"]["bytes"] - found["2"]["bytes"] == 2 * 14 * 4
    assert record["ratio"] <= 1


def test_the_exact_choice_is_the_registrys(run_folder: Path) -> None:
    run, manifest = policy_study.read_run(run_folder)
    (point,) = policy_study.find_checkpoints(run_folder, run, manifest, [1])
    images = policy_study.draw_images(run, manifest, 1, 12, CPU)
    networks = policy_study.Networks(run, CPU)
    networks.load(point.folder)
    (batch,) = images.batches
    layers, prediction, target = networks.project(batch.views)
    for policy in mining_transport.POLICIES:
        miner = mining_transport.open_miner(policy, mining_transport.EXACT, images, networks)
        projected = mining_transport.Projected(layers[0].hidden, prediction, target)
        choice, _ = mining_transport.choose_batch(miner, projected, batch, point.lr)
        mined = policy_study.mine_policy(policy, batch, tuple(layers[:1]), target, images.exclude_group, 0)
        assert torch.equal(choice.column, mined.index[:, 0])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--epochs", "7"], "no checkpoint of epoch 7"),
        (["--pools", "1"], "--pools 2 to 4096"),
        (["--sketches", "0"], "--sketches 1 or more"),
    ],
)
def test_mistakes_are_told(
    run_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    told: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["mining_transport", str(run_folder), *words])
    with pytest.raises(SystemExit) as exit_:
        mining_transport.main()
    assert exit_.value.code == 2
    assert told in " ".join(capsys.readouterr().err.split())
