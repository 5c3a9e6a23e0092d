"""The command as a user types it: one clear line and exit code 2 for a mistake, no traceback, nothing half-written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.data.tiny import make_dataset
from tests.ranks import run_command


def tracekin(*arguments: str, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tracekin.cli", *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    make_dataset(folder / "data", train=12, val=4, test=4)
    (folder / "run.yaml").write_text("data: {manifest: data/manifest.json, image_size: 24}\ntrain: {global_batch: 8}\n")
    return folder


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pretrain", "rum.yaml"], ["rum.yaml", "run.yaml"]),
        (["pretrain", "run.yaml", "mining.polcy=none"], ["mining.polcy", "mining.policy"]),
        (["pretrain", "run.yaml", "train.epochs=two"], ["train.epochs", "two"]),
        (
            ["pretrain", "run.yaml", "data.manifest=nowhere/manifest.json"],
            ["nowhere/manifest.json", "data/manifest.json"],
        ),
        (["pretrain", "run.yaml", "train.global_batch=16"], ["12 samples", "global batch of 16"]),
        (["pretrain", "run.yaml", "init.from=nowhere.pth"], ["init.from=nowhere.pth", "no such file"]),
        (["pretrain"], ["CONFIG"]),
        (["pretain"], ["pretain"]),
        (["evaluate", "runs/nothing"], ["runs/nothing", "config.yaml"]),
        (["evaluate", "run.yaml", "k=3"], ["unknown key k"]),
        (["report", "runs/nothing", "--out", "out"], ["runs/nothing"]),
    ],
)
def test_a_mistake_gets_one_line_and_exit_code_2(project: Path, arguments: list[str], words: list[str]) -> None:
    must_be_refused(tracekin(*arguments, cwd=project), words, project)


def test_a_mistake_that_torch_finds_gets_them_too(project: Path) -> None:
    result = run_command("pretrain", "run.yaml", "init.from=run.yaml", cwd=project)
    must_be_refused(result, ["init.from", "run.yaml", "no file of weights"], project)


def must_be_refused(result: subprocess.CompletedProcess[str], words: list[str], project: Path) -> None:
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert all(word in result.stderr for word in words), result.stderr
    assert sorted(p.name for p in project.iterdir()) == ["data", "run.yaml"]


def test_a_damaged_shard_is_named(project: Path) -> None:
    shard = project / "data" / "train-000000.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-512])
    try:
        result = tracekin("pretrain", "run.yaml", cwd=project)
    finally:
        shard.write_bytes(whole)
    assert result.returncode == 2
    assert "train-000000.tar" in result.stderr


def test_online_without_a_key(project: Path) -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    result = tracekin("pretrain", "run.yaml", "monitor.wandb=online", cwd=project, env=kept | {"HOME": str(project)})
    assert result.returncode == 2, result.stderr
    assert "WANDB_API_KEY" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (project / "runs").exists()


def test_a_missing_compiler_is_named(project: Path) -> None:
    """DeepSpeed would die in a traceback on CPU."""
    if torch.cuda.is_available():
        pytest.skip("DeepSpeed builds nothing where there is a GPU")
    result = tracekin("pretrain", "run.yaml", cwd=project, env={**os.environ, "PATH": "", "CXX": "no-such-compiler"})
    assert result.returncode == 2, result.stderr
    assert "C++ compiler" in result.stderr
    assert "apt-get install g++" in result.stderr
    assert not (project / "runs").exists()


def test_the_whole_way(project: Path) -> None:
    """Pretrain with a loader worker and the real W&B client offline, again, evaluate, report.

    The first command starts as a user's does, with all its imports; the others have them from the forkserver.
    """
    short = ["train.epochs=2", "model.projector_hidden=32", "model.projection=16", "model.predictor_hidden=32"]
    command = ["pretrain", "run.yaml", "name=way", *short]
    first = tracekin(*command, "monitor.wandb=offline", cwd=project)
    assert first.returncode == 0, first.stderr
    assert "next: tracekin evaluate runs/way" in first.stdout
    run = project / "runs" / "way"
    wandb_id = (run / "wandb_id").read_text().strip()
    files = list(run.glob(f"wandb/offline-run-*-{wandb_id}/run-{wandb_id}.wandb"))
    assert len(files) == 1
    sent = files[0].read_bytes()
    assert b"loss_byol" in sent
    host = os.uname().nodename
    for secret in (str(project), "data/manifest.json", sys.executable, *([host] if len(host) > 4 else [])):
        assert secret.encode() not in sent  # two letters stand in any compressed bytes

    again = run_command(*command, cwd=project)
    assert again.returncode == 0, again.stderr
    assert "is finished" in again.stdout
    scored = run_command("evaluate", "runs/way", "knn_k=3", "linear_c=[0.1]", "workers=0", cwd=project)
    assert scored.returncode == 0, scored.stderr
    assert all(word in scored.stdout for word in ("pixels", "untrained", "tracin_cosine", "k 3", "T 0.07"))
    assert max(map(len, scored.stdout.splitlines())) <= 80
    reported = run_command("report", "runs/way", "--out", "out", cwd=project)
    assert reported.returncode == 0, reported.stderr
    summary = json.loads((project / "out" / "summary.json").read_text())
    assert [row["method"] for row in summary["rows"]] == ["pixels", "untrained", "tracin_cosine"]
    assert "data:image/svg+xml" in (project / "out" / "index.html").read_text()


def test_help_fits_a_terminal() -> None:
    for arguments in ([], ["pretrain"], ["evaluate"], ["report"], ["export"]):
        result = tracekin(*arguments, "--help", cwd=Path.cwd())
        assert result.returncode == 0
        assert max(map(len, result.stdout.splitlines())) <= 80
