import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.grid import digest, elements, read_plan, read_sweep, sweep_folder, write_plan
from tracekin.config import Config, UserError, load


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes base.yaml and demo.yaml, the latter with other keys as given; returns its path."""
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text("train:\n  epochs: 7\n", encoding="utf-8")

    def write(**keys: Any) -> Path:
        grid = {"mining.policy": ["none", "tracin_cosine"], "seed": [0, 1]}
        path = Path("demo.yaml")
        path.write_text(yaml.safe_dump({"config": "base.yaml", "grid": grid} | keys, sort_keys=False), encoding="utf-8")
        return path

    return write


def test_every_combination_is_a_run_named_by_its_values_and_digits(write: Any) -> None:
    sweep = read_sweep(write(overrides=["train.log_every=3"]))
    found = elements(sweep)
    assert [element.assignment for element in found] == [
        {"mining.policy": policy, "seed": seed} for policy in ("none", "tracin_cosine") for seed in (0, 1)
    ]
    first = found[0]
    assert first.name == f"none-seed0-{digest(first.config)}"
    assert first.config.run_folder == Path("runs/sweeps/demo") / first.name == sweep_folder(sweep) / first.name
    assert (first.config.train.epochs, first.config.train.log_every) == (7, 3)


def test_elements_are_what_loading_each_alone_gives(write: Any) -> None:
    grid = {
        "optimiser": {"lr": [0.1, 1e-5, None]},  # a section is as good as a dotted key
        "data.augment.blur": [None, [1.0, 0.2]],
        "data.manifest": ["data/a/manifest.json", "data/b/manifest.json"],
        "mining.exclude_group": [True, False],
        "seed": [3, 4, 5],
    }
    found = elements(read_sweep(write(grid=grid, overrides=["mining.k=2"])))
    assert len(found) == 3 * 2 * 2 * 2 * 3
    for element in [*found[:3], *found[::7], found[-1]]:
        assigned = [f"{key}={json.dumps(value)}" for key, value in element.assignment.items()]
        name = f"name={element.config.name}"
        assert element.config == load(Config, "base.yaml", ["mining.k=2", *assigned, name])
    assert found[-1].name.startswith("lr_null-blur1.0-0.2-b-exclude_group_false-seed5-")
    assert len({element.name for element in found}) == len(found)


def test_what_is_left_out_follows_from_each_elements_own_values(write: Any) -> None:
    grid = {
        "mining.policy": ["none", "tracin_cosine"],
        "objective": {"name": ["moco", "barlow_twins"]},
        "train.global_batch": [8, 16],
        "model": {"backbone": ["resnet18", "resnet50"], "projection": [0, 24]},
        "seed": [0, 1],
    }
    found = elements(read_sweep(write(grid=grid)))
    for element in found:
        assigned = [f"{key}={value}" for key, value in element.assignment.items()]
        assert element.config == load(Config, "base.yaml", [*assigned, f"name={element.config.name}"])
    assert {element.config.objective.queue for element in found} == {None, 128, 256}
    assert {element.config.model.projector_hidden for element in found} == {512, 2048, 8192}


def test_a_key_that_is_a_word_of_python_is_a_grid_key(write: Any) -> None:
    """Each way in which an element gets its values: loaded, and put together from what was loaded before."""
    grid = {"seed": [0, 1], "init": {"from": [None, "weights/a.pth"]}}
    found = elements(read_sweep(write(grid=grid)))
    assert [(e.config.seed, e.config.init.from_) for e in found] == [
        (seed, path) for seed in (0, 1) for path in (None, "weights/a.pth")
    ]
    assert found[1].name.startswith("seed0-a.pth-")


def test_keys_that_alter_no_result_alter_no_name(write: Any) -> None:
    names = [element.name for element in elements(read_sweep(write()))]
    free = ["data.workers=5", "monitor.wandb=disabled", "train.keep_checkpoints=9"]
    assert [element.name for element in elements(read_sweep(write(overrides=free)))] == names
    other = [element.name for element in elements(read_sweep(write(overrides=["train.epochs=8"])))]
    assert not set(other) & set(names)


def test_a_run_that_is_there_keeps_its_name_when_the_grid_grows(write: Any) -> None:
    before = elements(read_sweep(write()))
    for element in before:
        element.config.run_folder.mkdir(parents=True)
    grid = {"mining.k": [1, 2], "mining.policy": ["none", "tracin_cosine"], "seed": [0, 1]}
    after = elements(read_sweep(write(grid=grid)))
    assert [element.name for element in after[:4]] == [element.name for element in before]
    assert after[4].name.startswith("k2-none-seed0-")


def test_exclusions_and_overrides_of_the_command_line(write: Any) -> None:
    path = write(exclude=[{"mining": {"policy": "none"}, "seed": 1}])
    assert [e.name.rpartition("-")[0] for e in elements(read_sweep(path, ["grid.seed=[1,2]", "parallel=3"]))] == [
        "none-seed2",
        "tracin_cosine-seed1",
        "tracin_cosine-seed2",
    ]
    assert read_sweep(path, ["parallel=3"]).parallel == 3


def test_long_values_are_bounded_and_safe_in_file_names(write: Any) -> None:
    grid = {"data.manifest": [f"s3://bucket/a b:c/{'x' * 300}.json", "../../etc/manifest.json"], "seed": [0]}
    for element in elements(read_sweep(write(grid=grid))):
        assert len(element.name) <= 100
        assert not set(element.name) & set("/\\ :=")
        assert not element.name.startswith((".", "-"))


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"grid": {"sed": [0]}}, "demo.yaml: grid has the unknown key sed; did you mean seed?"),
        ({"grid": {"policy": ["none"]}}, "did you mean mining.policy?"),
        ({"grid": {"seed": 3}}, r"grid.seed=3 is no list of values; write for example \[3\]"),
        ({"grid": {"seed": []}}, "grid.seed=.* is no list of values"),
        ({"grid": {}}, "grid is empty"),
        ({"grid": {"seed": ["a"]}}, "sweep demo, seed=a: seed: Value 'a'"),
        ({"grid": {"mining.k": [1, 0]}}, "mining.k=0: mining.k=0 is out of range"),
        ({"grid": {"mining.policy": ["non"]}}, "Invalid value 'non', expected one of"),
        ({"grid": {"name": ["x"]}}, "names its runs itself"),
        ({"overrides": ["folder=x"]}, "names its runs itself"),
        ({"overrides": ["trai.epochs=1"]}, "unknown key trai; did you mean train?"),
        ({"grid": {"data.workers": [0, 1]}}, "elements data.workers=0 and data.workers=1 compute the same"),
        ({"grid": {"seed": [0, 0]}}, "elements seed=0 and seed=0 compute the same"),
        ({"exclude": [{"seed": 7}]}, "exclude: seed=7 matches no element"),
        ({"exclude": [{"mining.k": 1}]}, "exclude names mining.k, which grid does not vary: mining.policy, seed"),
        ({"exclude": [{}]}, "an empty entry matches no element"),
        ({"exclude": [{"seed": 0}, {"seed": 1}]}, "exclude leaves none of 4 elements"),
        ({"config": "bas.yaml"}, "no such config file: bas.yaml. Did you mean base.yaml?"),
        ({"config": ""}, "config is missing"),
        ({"name": "a/b"}, "name='a/b' is no folder name"),
        ({"name": ".."}, "no folder name"),
        ({"parallel": -1}, "parallel=-1 is out of range"),
        ({"evaluate": ["knn_kk=3"]}, "demo.yaml: evaluate: unknown key knn_kk; did you mean knn_k?"),
        ({"grids": {}}, "unknown key grids; did you mean grid?"),
    ],
)
def test_mistakes_are_named(write: Any, keys: dict[str, Any], says: str) -> None:
    path = write(**keys)
    with pytest.raises(UserError, match=says) as caught:
        elements(read_sweep(path))
    assert "\n" not in str(caught.value)


def test_a_value_that_only_fits_some_elements_names_the_one_it_does_not_fit(write: Any) -> None:
    """Also where the element is put together from values that were loaded before."""
    grid = {"mining.queue": [0, 512], "mining.pool": ["global", "rank"]}
    with pytest.raises(UserError, match=r"mining.queue=512 mining.pool=rank: .* it needs mining.pool=global"):
        elements(read_sweep(write(grid=grid)))


def test_the_plan_comes_back(write: Any) -> None:
    sweep = read_sweep(write(exclude=[{"seed": 1, "mining.policy": "none"}], evaluate=["knn_k=5"], parallel=2))
    found = elements(sweep)
    write_plan(sweep_folder(sweep), sweep, found)
    again, planned = read_plan(Path("runs/sweeps/demo"))
    assert again == sweep
    assert [(p.name, p.assignment, p.run) for p in planned] == [
        (e.name, e.assignment, e.config.run_folder) for e in found
    ]
    assert {p.manifest for p in planned} == {"data/phantom/manifest.json"}
    with pytest.raises(UserError, match="runs/sweeps is no sweep's folder"):
        read_plan(Path("runs/sweeps"))


def test_thousands_of_elements_are_put_together_from_few_loads(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from launch import grid as module

    loads = []
    monkeypatch.setattr(module, "load", lambda *a: (loads.append(a), load(*a))[1])
    found = elements(read_sweep(write(grid={"mining.policy": ["none", "random"], "seed": list(range(1000))})))
    assert len(found) == 2000
    assert found[1999].config.seed == 999
    assert len(loads) < 10


def test_torch_is_not_imported() -> None:
    code = "import sys, launch.grid, launch.table; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0


def test_the_shipped_sweep_expands(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    for path in sorted((root / "configs" / "sweeps").glob("*.yaml")):
        assert elements(read_sweep(path))
