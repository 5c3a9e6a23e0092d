"""The house's walls, read from the imports: dependencies point downwards only, and some libraries have one door."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Each room may import the rooms named; siblings never import each other.
LOWER = {"config", "files", "monitor", "distributed", "checkpoint"}
ALLOWED = {
    "config": set(),
    "files": {"config"},
    "distributed": {"config"},
    "monitor": {"config", "distributed", "files"},
    "checkpoint": {"config", "files"},
    "data": {"config", "files"},
    "influence": {"config"},
    "model": {"config", "distributed", "checkpoint"},
    "objective": {"config", "distributed", "model", "influence"},
    "train": LOWER | {"data", "model", "influence", "objective"},
    "evaluate": LOWER | {"data", "model", "influence", "objective"},
    "export": {"config", "files", "checkpoint", "data", "model"},
    "cli": {"config", "train", "evaluate", "export", "data", "distributed", "monitor"},
}
ONE_DOOR = {
    "deepspeed": {"src/tracekin/train/engine.py"},
    "wandb": {"src/tracekin/monitor/sinks.py"},
    "omegaconf": {"src/tracekin/config/loader.py"},
    "submitit": {"launch"},
    "onnxscript": {"src/tracekin/export/formats.py"},
    "torch.distributed": {"src/tracekin/distributed/collectives.py", "src/tracekin/distributed/group.py"},
}


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", sources("src/tracekin"), ids=lambda p: str(p.relative_to(ROOT)))
def test_rooms_import_downwards_only(path: Path) -> None:
    room = path.relative_to(ROOT / "src/tracekin").parts[0].removesuffix(".py")
    if room == "__init__":
        assert not any(name.startswith("tracekin") for name in imports(path))
        return
    for name in imports(path):
        parts = name.split(".")
        if (
            parts[0] == "tracekin"
            and len(parts) > 1
            and (ROOT / "src/tracekin" / parts[1]).with_suffix(".py").exists()
            | (ROOT / "src/tracekin" / parts[1]).is_dir()
        ):
            assert parts[1] == room or parts[1] in ALLOWED[room], f"{path.relative_to(ROOT)} imports {name}"
        assert parts[0] not in {"launch", "shards", "tests", "benchmarks"}, f"{path.relative_to(ROOT)} imports {name}"


def test_shards_import_only_the_contract() -> None:
    for path in sources("shards"):
        for name in imports(path):
            if name.startswith("tracekin"):
                assert name.startswith(("tracekin.config.", "tracekin.data.manifest.")), f"{path}: {name}"


@pytest.mark.parametrize("library", ONE_DOOR)
def test_libraries_have_one_door(library: str) -> None:
    found = set()
    for path in [*sources("src"), *sources("launch"), *sources("shards")]:
        if any(name == library or name.startswith(library + ".") for name in imports(path)):
            found.add(str(path.relative_to(ROOT)))
    strangers = {f for f in found if not any(f == door or f.startswith(door + "/") for door in ONE_DOOR[library])}
    assert not strangers


def test_only_world_reads_the_launchers_variables() -> None:
    readers = [p for p in sources("src") if any(word in p.read_text() for word in ('"RANK"', "SLURM_", '"WORLD_SIZE"'))]
    assert [p.name for p in readers] == ["world.py"]
