"""A thousand configs, sound and broken, the same ones every time: each is taken, or refused by one line; nothing else.

They go through the command's own door; only the training itself is left out.
"""

import sys
import types
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml

from launch.cluster import Profile, read_profile
from launch.grid import SweepConfig, elements, read_sweep
from tests import fuzz
from tests.data.tiny import make_dataset
from tracekin import cli
from tracekin.config import Config, EvaluateConfig, InfluenceConfig, UserError, load, to_yaml
from tracekin.config.errors import LONGEST

BLOCK = 100


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a data set, a finished run and a base config."""
    folder = tmp_path_factory.mktemp("desk")
    make_dataset(folder / "data", train=12, val=4, test=4, size=8)
    (folder / "run").mkdir()
    (folder / "run" / "config.yaml").write_text("")
    (folder / "base.yaml").write_text("")
    return folder


@pytest.fixture
def taken(desk: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The configs with which the commands' work was begun; the modules that would do it are not there."""
    monkeypatch.chdir(desk)
    found: list[Any] = []
    modules: dict[str, dict[str, Callable[..., Any]]] = {
        "train.loop": {"pretrain": lambda config, **options: found.append(config)},
        "evaluate.run": {"evaluate_run": lambda run, config: found.append(config)},
        "evaluate.summary": {"collect": lambda runs: ()},
        "evaluate.table": {"table": lambda rows: ""},
        "evaluate.influence": {
            "prepare": lambda run, split, config: found.append(config),
            "find_influences": lambda study: (),
        },
        "evaluate.influence_table": {"write_influences": lambda study, influences, out: ()},
    }
    for name, functions in modules.items():
        module = types.ModuleType(f"tracekin.{name}")
        module.__dict__.update(functions)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return found


def command(*words: str) -> Callable[[fuzz.Given], int]:
    return lambda given: cli.call([*words, given.file, *given.overrides])[0]


def over_a_run(*words: str) -> Callable[[fuzz.Given], int]:
    """A command that reads no config file: what the file states is given on the command line."""

    def call(given: fuzz.Given) -> int:
        try:
            stated = yaml.safe_load(given.content or b"")
        except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError):
            stated = None
        lines = [f"{k}={fuzz.written(v)}" for k, v in stated.items()] if isinstance(stated, dict) else []
        words_given = [word for word in lines + given.overrides if "\0" not in word and not word.startswith("-")]
        return cli.call([*words, *words_given])[0]

    return call


def of_launch(read: Callable[[fuzz.Given], Any], taken: list[Any]) -> Callable[[fuzz.Given], int]:
    def call(given: fuzz.Given) -> int:
        try:
            taken.append(read(given))
        except UserError as error:
            print(f"launch: {error}", file=sys.stderr)
            return 2
        return 0

    return call


def check(
    given: fuzz.Given, schema: type, door: Callable[[fuzz.Given], int], capsys: pytest.CaptureFixture[str]
) -> tuple[int, str]:
    """Whether it was taken, 0 or 2, and what is wrong with how it was."""
    fuzz.place(Path(), given)
    before = sorted(path.name for path in Path().iterdir())
    code = door(given)
    said = capsys.readouterr().err
    if code not in (0, 2):
        return code, f"exit code {code}: {said[-500:]}"
    if sorted(path.name for path in Path().iterdir()) != before:
        return code, "something was written"
    if code == 0:
        return code, "" if not said else f"it was taken with {said!r}"
    if said.count("\n") != 1 or not said[:-1].isprintable() or len(said) > LONGEST + 20:
        return code, f"not one line, or not a line: {said!r}"
    keys = [key for known in {schema, Config} for key, _ in fuzz.leaves(known)]
    places = (
        given.file,
        *given.overrides,
        *keys,
        "the command line",
        "the value in",
        "config file .",
        "no manifest at",
        "sweep",
    )
    if not any(str(UserError(place))[:50] in said for place in places if place):
        return code, f"the line does not say where: {said!r}"
    return code, ""


def run(
    numbers: range,
    schema: type,
    base: dict[str, Any] | Callable[[Random], dict[str, Any]],
    door: Callable[[fuzz.Given], int],
    taken: list[Any],
    capsys: pytest.CaptureFixture[str],
) -> dict[str, int]:
    """Configs of these numbers, every other one sound but for ranges; how many were taken, by kind.

    What was taken must be read back from how it is written.
    """
    wrong, counts = [], {"sound": 0, "broken": 0}
    for number in numbers:
        random = Random(f"tracekin {number}")
        make = fuzz.broken if number % 2 else fuzz.sound
        given = make(schema, random, base(random) if callable(base) else base)
        taken.clear()
        code, problem = check(given, schema, door, capsys)
        if code == 0:
            counts[make.__name__] += 1
            for config in taken:
                Path("again.yaml").write_text(to_yaml(config), encoding="utf-8")
                if load(type(config), "again.yaml") != config:
                    problem = problem or "it is not read back as it was written"
        if problem:
            wrong.append(f"number {number}: {problem}\n{given!r:.600}")
    Path("again.yaml").unlink(missing_ok=True)
    if wrong:
        pytest.fail("\n\n".join(wrong[:5]), pytrace=False)
    return counts


@pytest.mark.parametrize("start", range(0, 1000, BLOCK))
def test_configs_of_a_pretraining(start: int, taken: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    base = {"data.manifest": "data/manifest.json", "train.global_batch": 8}
    counts = run(range(start, start + BLOCK), Config, base, command("pretrain"), taken, capsys)
    assert counts["sound"] >= BLOCK / 4  # most are taken: it is not all refused at the door
    assert counts["broken"] <= BLOCK / 10


@pytest.mark.parametrize(
    ("schema", "words"),
    [(EvaluateConfig, ("evaluate", "run")), (InfluenceConfig, ("influence", "run", "--out", "a.parquet"))],
)
def test_settings_of_an_evaluation(
    schema: type, words: tuple[str, ...], taken: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    counts = run(range(2 * BLOCK), schema, {}, over_a_run(*words), taken, capsys)
    assert counts["sound"] >= BLOCK / 2


def test_profiles(taken: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    door = of_launch(lambda given: read_profile(given.file, given.overrides), taken)
    counts = run(range(3 * BLOCK), Profile, {}, door, taken, capsys)
    assert counts["sound"] >= BLOCK


def test_sweeps(taken: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Their grids hold values of every knob, some of them hostile."""
    knobs = list(fuzz.leaves(Config))

    def base(random: Random) -> dict[str, Any]:
        grid: dict[str, Any] = {"grid.seed": [0, 1]}
        for key, kind in random.sample(knobs, random.randint(0, 2)):
            values = [fuzz.value_of(kind, random) for _ in range(2)]
            grid[f"grid.{key}"] = values + ([random.choice(fuzz.VALUES)] if random.random() < 0.3 else [])
        return {"config": "base.yaml", **grid}

    door = of_launch(lambda given: elements(read_sweep(given.file, given.overrides))[0].config, taken)
    counts = run(range(3 * BLOCK), SweepConfig, base, door, taken, capsys)
    assert counts["sound"] >= BLOCK / 10  # many grids hold a value that is out of range


def test_texts_mean_what_they_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of the environment, where keys may lie, is put into a config."""
    monkeypatch.setenv("WANDB_API_KEY", "0123456789")
    texts = ["${oc.env:WANDB_API_KEY}", "${seed}", "a\\${b}", "\\\\${", "${"]
    for text in texts:
        (tmp_path / "run.yaml").write_text(yaml.safe_dump({"folder": text, "monitor": {"project": text}}))
        config = load(Config, tmp_path / "run.yaml", [f"name={text}"])
        assert (config.folder, config.monitor.project, config.name) == (text, text, text)
    profile = load(Profile, None, ["setup=['export A=${B:-x}']"])
    assert list(profile.setup) == ["export A=${B:-x}"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (fuzz.LAUGHS, "not YAML of plain values: aliases .* in line 2"),
        ("seed: 1\ntrain: {epochs: 2}\nseed: 2\n", "the key seed stands here a second time in line 3"),
        ("train:\n  epochs: 2\n  epochs: 3\n", "the key epochs stands here a second time in line 3"),
        ("name: !!python/object/apply:os.system ['touch pwned']\n", "could not determine a constructor .* in line 1"),
        ("seed: 2001-99-99\n", "month must be in 1..12"),
        ("seed: " + "[" * 100_000, "nested too deeply"),
        ("#" * 2_000_000, "more than 1048576 bytes"),
        ("seed: 0x" + "f" * 5000, "seed is out of range"),
        ("seed: 9223372036854775808", "whole numbers of 64 bits"),
        ('name: "a\\u001b[2J"', "holds a control character"),
        ("name: " + "a" * 256, "too long"),
        ("folder: " + "a/" * 2000, "too long"),
        ("seed: {}", "seed: "),
    ],
)
def test_what_the_fuzz_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, says: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(content)
    with pytest.raises(UserError, match=says) as caught:
        load(Config, "run.yaml")
    assert str(caught.value).isprintable()
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_a_grid_of_too_many_elements_is_refused_before_they_are_made(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("")
    keys = ["seed", "train.epochs", "mining.k", "data.workers", "data.streams", "mining.queue"]
    sweep = {"config": str(tmp_path / "base.yaml"), "grid": {key: list(range(1000)) for key in keys}}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    with pytest.raises(UserError, match="grid has 1000000000000000000 elements; accepted are 100000"):
        elements(read_sweep(tmp_path / "sweep.yaml"))


def test_a_run_folder_that_cannot_be_made_is_named(
    taken: list[Any], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    sound = ["base.yaml", "data.manifest=data/manifest.json", "train.global_batch=8"]
    assert cli.call(["pretrain", *sound, f"folder={tmp_path}"])[0] == 0
    assert cli.call(["pretrain", *sound, "folder=base.yaml"])[0] == 2
    assert "base.yaml is a file; give another folder=" in capsys.readouterr().err
    assert len(taken) == 1
