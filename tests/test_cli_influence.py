"""``tracekin influence`` as a user types it."""

import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.data.tiny import make_dataset
from tests.evaluate.tiny_influence import make_run
from tracekin.cli import main
from tracekin.data.manifest import read_manifest
from tracekin.data.reader import ShardReader


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset, a run ``runs/tiny``, a run without checkpoints, and a file where results might go."""
    folder = tmp_path_factory.mktemp("project")
    manifest = make_dataset(folder / "data", train=12, val=4, test=0, size=16, channels=1)
    make_run(folder / "runs" / "tiny", manifest)
    make_run(folder / "runs" / "young", manifest, {})
    (folder / "old.parquet").write_text("precious")
    (folder / "page.html").write_text("precious")
    return folder


def tracekin(*arguments: str, cwd: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code; what was printed is for capsys."""
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(sys, "argv", ["tracekin", *arguments])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["runs/tinny", "--out", "i.parquet"], ["runs/tinny is no run folder", "runs/tiny"]),
        (["runs/young", "--out", "i.parquet"], ["runs/young", "no complete checkpoint"]),
        (["runs/tiny", "--out", "i.parquet", "--split", "vall"], ["no split 'vall'", "train, val"]),
        (["runs/tiny", "--out", "i.parquet", "--split", "test"], ["no split 'test'", "train, val"]),
        (
            ["runs/tiny", "--out", "i.parquet", "images=0123456789"],
            ["images: 0123456789 ", "a key there is"],
        ),
        (["runs/tiny", "--out", "i.parquet", "k=13"], ["k=13", "12 images of train"]),
        (["runs/tiny", "--out", "i.parquet", "k=0"], ["k=0", "1 or more"]),
        (["runs/tiny", "--out", "i.parquet", "normalize=true"], ["normalize", "did you mean normalise?"]),
        (["runs/tiny", "--out", "i.parquet", "against=trian"], ["against", "trian"]),
        (["runs/tiny", "--out", "i.csv"], ["i.csv must end in .parquet"]),
        (["runs/tiny", "--out", "out/i.parquet"], ["no folder out"]),
        (["runs/tiny", "--out", "old.parquet"], ["old.parquet is there already"]),
        (["runs/tiny", "--out", "page.parquet"], ["page.html is there already"]),
        (["runs/tiny"], ["--out"]),
    ],
)
def test_a_mistake_gets_exit_code_2_and_leaves_nothing(
    project: Path,
    arguments: list[str],
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = {path: path.stat().st_mtime_ns for path in project.rglob("*")}
    code = tracekin("influence", *arguments, cwd=project, monkeypatch=monkeypatch)
    said = capsys.readouterr().err
    assert code == 2, said
    assert all(word in said for word in words), said
    if said.startswith("tracekin: "):  # else click's own usage error
        assert said.count("\n") == 1
    assert {path: path.stat().st_mtime_ns for path in project.rglob("*")} == before


def test_the_whole_way(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "influence.parquet"
    settings = ["k=3", "workers=0", "gallery=2"]
    code = tracekin(
        "influence", "runs/tiny", *settings, "--split", "val", "--out", str(out), cwd=project, monkeypatch=monkeypatch
    )
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert f"written: {out} {tmp_path / 'influence.html'}" in printed.out
    assert max(map(len, printed.out.splitlines()[:-1])) <= 80
    assert sorted(path.name for path in tmp_path.iterdir()) == ["influence.html", "influence.parquet"]
    reader = ShardReader(read_manifest(project / "data"), "val")
    table = pq.read_table(out).to_pylist()
    assert list(dict.fromkeys(row["image"] for row in table)) == [reader.key(number) for number in range(4)]
    assert max(row["rank"] for row in table) == 3


def test_help_fits_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert tracekin("influence", "--help", cwd=Path.cwd(), monkeypatch=monkeypatch) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert any("--split" in line for line in lines)
