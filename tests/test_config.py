"""A mistake in a config dies at once, with one line that says what, where and what is accepted."""

from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracekin.config import Config, EvaluateConfig, InfluenceConfig, UserError, load, shareable, to_dict, to_yaml

ROOT = Path(__file__).parent.parent
SHIPPED = sorted(p for p in (ROOT / "configs").rglob("*.yaml") if p.parent.name != "sweeps")  # they are no Config


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.name)
def test_shipped_configs_load_and_state_only_differences(path: Path) -> None:
    loaded, default = to_dict(load(Config, path)), to_dict(Config())
    text = path.read_text(encoding="utf-8")
    assert text.startswith("#"), "a header comment says hardware, wall time and measured score"
    for word in ("hardware", "wall time", "score"):
        assert word in text.lower().split("\n\n")[0], f"{path.name}: the header lacks {word}"
    assert "to be measured" not in text
    for key, value in _leaves(_yaml(path)):
        assert _get(loaded, key) == value or isinstance(value, str)
        assert _get(default, key) != _get(loaded, key), f"{path.name}: {key} repeats the default"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.epocs=3", ["train.epocs", "did you mean train.epochs"]),
        ("epochs=3", ["epochs", "did you mean train.epochs"]),
        ("train=3", ["train is a section", "epochs"]),
        ("train.epochs=many", ["train.epochs", "many", "Integer"]),
        ("mining.policy=tracn", ["mining.policy", "tracn", "tracin_cosine"]),
        ("data.channels=2", ["data.channels", "[1, 3]"]),
        ("train.epochs=0", ["train.epochs=0", "1 or more"]),
        ("optimiser.lr=.nan", ["optimiser.lr", "above 0"]),
        ("optimiser.lr=inf", ["optimiser.lr", "finite"]),
        ("name=.", ["name", "relative path"]),
        ("optimiser.lr=-1", ["optimiser.lr", "above 0"]),
        ("mining.warmup=1.5", ["mining.warmup", "0 <= x <= 1"]),
        ("mining.k=0", ["mining.k=0", "1 or more"]),
        ("mining.layers=5", ["mining.layers=5", "1 to 4"]),
        ("mining.support_views=2", ["mining.support_views=2", "mining.policy=fnc"]),
        ("mining.compare=tracin", ["mining.compare=tracin", "feature, fnc, group, oracle, random, none"]),
        ("data.augment.blur=[0.5]", ["blur", "2"]),
        ("name=../elsewhere", ["name", "relative path"]),
        ("init.frm=a.pth", ["init.frm", "did you mean init.from"]),
        ("init.from_=a.pth", ["unknown key init.from_", "did you mean init.from?"]),
        ("init=a.pth", ["init is a section", "accepted in it: from."]),
        ("train.epochs", ["train.epochs", "key=value"]),
        ("train.epochs=[", ["train.epochs=[", "YAML"]),
    ],
)
def test_mistakes_are_named(override: str, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        load(Config, None, [override])
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("mining", "words"),
    [
        (["queue=64", "pool=node"], ["mining.queue=64", "mining.pool=global"]),
        (["queue=64", "policy=tracin_cp"], ["mining.queue=64", "mining.policy=tracin_cp"]),
    ],
)
def test_what_mining_cannot_combine(mining: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        load(Config, None, [f"mining.{one}" for one in mining])
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("name", ["on", "12:30", "2024_01", "1.10", "2024-01-02", "'quoted'", "0x1f"])
def test_text_stays_text(name: str, tmp_path: Path) -> None:
    assert load(Config, None, [f"name={name}"]).name == name.strip("'")
    (tmp_path / "run.yaml").write_text(f"name: {name}\n")
    if "'" not in name:
        with pytest.raises(UserError, match="quotes"):
            load(Config, tmp_path / "run.yaml")


def test_a_key_may_be_a_word_of_python(tmp_path: Path) -> None:
    """``init.from`` is what users write and read; the field has an underscore behind it."""
    (tmp_path / "run.yaml").write_text("init: {from: a.pth}\n")
    assert load(Config, tmp_path / "run.yaml").init.from_ == "a.pth"
    config = load(Config, tmp_path / "run.yaml", ["init.from=12:30"])
    assert config.init.from_ == "12:30"
    assert to_dict(config)["init"] == {"from": "12:30"}
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load(Config, tmp_path / "again.yaml") == config
    assert load(Config, tmp_path / "again.yaml", ["init.from=null"]).init.from_ is None


def test_what_is_shared_holds_no_path() -> None:
    here = [
        "folder=/home/me/runs",
        "data.manifest=/home/me/d/manifest.json",
        "data.cache=/home/me",
        "init.from=/home/me/a.pth",
    ]
    config = load(Config, None, here)
    shared = shareable(config, "mine")
    assert "/home/me" not in str(shared)
    assert (shared["data"]["manifest"], shared["init"]["from"]) == ("mine", "a.pth")
    assert shareable(Config(), "mine")["init"]["from"] is None


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "demo.yaml").write_text("train: {epochs: 2\n")
    (tmp_path / "list.yaml").write_text("- 1\n")
    for name, word in (("dmo.yaml", "demo.yaml"), ("demo.yaml", "not YAML"), ("list.yaml", "list")):
        with pytest.raises(UserError) as error:
            load(Config, tmp_path / name)
        assert name in str(error.value)
        assert word in str(error.value)


@given(
    epochs=st.integers(1, 10**6),
    lr=st.floats(1e-8, 1e3),
    blur=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    name=st.text("abcxyz/-_0189", min_size=1).filter(lambda s: not s.startswith("/") and ".." not in s),
)
def test_what_is_saved_loads_the_same(epochs: int, lr: float, blur: tuple[float, float], name: str) -> None:
    import tempfile

    overrides = [f"train.epochs={epochs}", f"optimiser.lr={lr!r}", f"data.augment.blur={list(blur)}", f"name='{name}'"]
    config = load(Config, None, overrides)
    assert (config.train.epochs, config.optimiser.lr, config.name) == (epochs, lr, name)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.yaml").write_text(to_yaml(config))
        assert load(Config, Path(folder) / "config.yaml") == config


def test_every_field_has_its_sentence() -> None:
    """The config module is the manual: a string stands under each field that is no section."""
    import ast
    import inspect

    from tracekin.config import knobs, objectives

    nodes = [node for page in (knobs, objectives) for node in ast.parse(inspect.getsource(page)).body]
    classes = {n.name: n for n in nodes if isinstance(n, ast.ClassDef)}
    undocumented = []
    for schema in (Config, EvaluateConfig, InfluenceConfig):
        stack = [schema]
        while stack:
            current = stack.pop()
            stack += [f.type for f in fields(current) if isinstance(f.type, type) and is_dataclass(f.type)]
            body = classes[current.__name__].body
            for node, following in zip(body, [*body[1:], None], strict=True):
                if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                    section = isinstance(node.annotation, ast.Name) and node.annotation.id in classes
                    said = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
                    if not section and not said:
                        undocumented.append(f"{current.__name__}.{node.target.id}")
    assert undocumented == []


def _yaml(path: Path) -> dict:
    import yaml

    return yaml.safe_load(path.read_text(encoding="utf-8")) or {}


def _leaves(tree: dict, prefix: str = ""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _get(tree: dict, key: str):
    for part in key.split("."):
        tree = tree[part]
    return tree
