"""The commands that submit, as a user types them: what they refuse, before torch is imported and anything is written.

tests/slurm submits with them to a real Slurm; here is none, or programs that answer for it.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from launch import runs
from tests.data.tiny import make_dataset
from tests.launch.recorded import Slurm

ROOT = Path(__file__).parent.parent.parent
PATH = os.environ["PATH"]
CONFIG = {
    "name": "tiny",
    "data": {"manifest": "data/manifest.json", "image_size": 16, "workers": 1},
    "model": {"projector_hidden": 16, "projection": 8, "predictor_hidden": 16},
    "train": {"epochs": 1, "global_batch": 16, "precision": "fp32", "log_every": 1, "threads": 1},
    "monitor": {"wandb": "disabled"},
}
SWEEP = {"name": "two", "config": "tiny.yaml", "grid": {"seed": [0, 1]}, "parallel": 1}
NUM_STEPS = 4
TORCH = "torch was imported"
# Runs a module as python -m does, and tells at the end whether torch was imported.
PROBE = f"""
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
finally:
    if "torch" in sys.modules:
        print("{TORCH}", file=sys.stderr)
"""


class Said(NamedTuple):
    code: int
    out: str
    error: str


class Desk:
    """Where a user sits: a folder with a config and a packed set, and what is on PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "tiny.yaml").write_text(yaml.safe_dump(CONFIG))
        (folder / "two.yaml").write_text(yaml.safe_dump(SWEEP))

    def launch(self, module: str, *words: str) -> Said:
        environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'src'}"}
        done = subprocess.run(
            [sys.executable, "-c", PROBE, f"launch.{module}", *words],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        return Said(done.returncode, done.stdout, done.stderr)

    def files(self) -> set[str]:
        return {
            str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if "slurm-commands" not in str(path)
        }

    def refuses(self, said: str, module: str, *words: str) -> None:
        """One line on stderr, code 2, nothing printed or written, no torch."""
        before = self.files()
        code, out, error = self.launch(module, *words)
        assert (code, out) == (2, ""), error
        assert said in error
        assert error.count("\n") == 1
        assert self.files() == before


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    make_dataset(folder, train=64, val=8, test=8)
    return folder


@pytest.fixture
def desk(tmp_path: Path, packed: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    """Without any program of Slurm."""
    (tmp_path / "no-programs").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "no-programs"))
    shutil.copytree(packed, tmp_path / "data")
    return Desk(tmp_path)


@pytest.fixture
def site(desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    """With programs that describe one partition of two nodes, and know of no job."""
    found = Slurm(tmp_path, monkeypatch)
    partition = "PartitionName=cpu Default=YES MaxTime=UNLIMITED State=UP\n"
    found.says("scontrol", f"{partition}KillWait = 300 sec\nMaxArraySize = 1001\n")
    found.says("sinfo", "n1|8|16000|idle|(null)\nn2|8|16000|idle|(null)\n")
    for name in ("sbatch", "srun", "sacct", "squeue"):
        found.says(name)
    (tmp_path / "cpu.yaml").write_text("partition: cpu\nnodes: 2\ntasks: 2\nsignal_seconds: 300\n")
    return found


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("absent.yaml", ("absent.yaml",)),
        ("unknown key train.epoch; did you mean train.epochs?", ("tiny.yaml", "train.epoch=3")),
        ("train.epochs=0 is out of range", ("tiny.yaml", "train.epochs=0")),
        ("train.epochs", ("tiny.yaml", "train.epochs=many")),
        ("elsewhere.json", ("tiny.yaml", "data.manifest=elsewhere.json")),
        ("train.global_batch=15 cannot be divided among 2 ranks", ("tiny.yaml", "train.global_batch=15")),
        ("there is no profile lokal in slurm/profiles; did you mean local?", ("tiny.yaml", "--profile", "lokal")),
        ("scontrol is not here: run this on a Slurm login node", ("tiny.yaml", "--profile", "a100")),
        ("slurm.conf is not there. Is that cluster up?", ("tiny.yaml", "--profile", "dev")),
    ],
)
def test_pretrain_refuses(desk: Desk, said: str, words: tuple[str, ...]) -> None:
    desk.refuses(said, "pretrain", *words)


def test_pretrain_refuses_yaml_that_is_none(desk: Desk) -> None:
    (desk.folder / "tiny.yaml").write_text("train: [epochs\n")
    desk.refuses("tiny.yaml", "pretrain", "tiny.yaml")


def test_pretrain_refuses_the_folder_of_another_run(desk: Desk) -> None:
    folder = desk.folder / "runs" / "tiny"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({**CONFIG, "seed": 5}))
    desk.refuses("holds a run of another config (seed 5 -> 0)", "pretrain", "tiny.yaml")


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("partition=gpu is not one of this Slurm's: cpu.", ("--set", "partition=gpu")),
        ("4 GPUs on 2 node(s); partition cpu has nodes of at most 0", ("--set", "gpus=4")),
        ("does not exceed train.stop_seconds", ("--set", "signal_seconds=10")),
        ("cannot be divided among 6 ranks", ("--set", "tasks=3")),
    ],
)
def test_pretrain_refuses_what_this_slurm_cannot_run(
    desk: Desk, site: Slurm, said: str, words: tuple[str, ...]
) -> None:
    desk.refuses(said, "pretrain", "tiny.yaml", "--profile", "cpu.yaml", *words)
    assert site.calls("sbatch") == []


def test_a_dry_run_shows_script_and_config_and_writes_nothing(desk: Desk, site: Slurm) -> None:
    before = desk.files()
    code, out, error = desk.launch("pretrain", "tiny.yaml", "seed=7", "--profile", "cpu.yaml", "--dry-run")
    assert (code, error) == (0, "")
    script, _, config = out.partition("# runs/tiny/launch/config.yaml\n")
    assert script.startswith("#!/bin/bash")
    assert "#SBATCH --partition=cpu" in script
    assert yaml.safe_load(config)["seed"] == 7
    assert yaml.safe_load(config)["train"]["epochs"] == 1
    assert desk.files() == before
    assert [call for call in site.calls("sbatch") if "--version" not in call] == []


def test_a_run_is_submitted_frozen_and_noted(desk: Desk, site: Slurm) -> None:
    site.says("sbatch", "Submitted batch job 41\n")
    code, out, error = desk.launch("pretrain", "tiny.yaml", "seed=7", "--profile", "cpu.yaml")
    assert (code, error) == (0, "")
    assert "runs/tiny: job 41, 4 steps on 4 rank(s)" in out
    folder = desk.folder / "runs" / "tiny"
    (line,) = runs.submissions(folder)
    assert {key: line[key] for key in ("stage", "job", "profile", "cluster", "logs", "steps")} == {
        "stage": "pretrain",
        "job": "41",
        "profile": "cpu.yaml",
        "cluster": "slurm",
        "logs": "runs/tiny/launch",
        "steps": NUM_STEPS,
    }
    assert yaml.safe_load((folder / "launch" / "config.yaml").read_text())["seed"] == 7
    (code_folder,) = (folder / "launch").glob("code-*")
    assert (code_folder / "src" / "tracekin" / "cli.py").is_file()


def test_a_run_in_slurm_or_finished_is_not_submitted_again(desk: Desk, site: Slurm) -> None:
    folder = desk.folder / "runs" / "tiny"
    runs.record(folder, stage="pretrain", job="41", cluster="slurm", slurm_conf="", steps=NUM_STEPS)
    site.says("squeue", "41|PENDING|0||Priority|0:00|\n")
    words = ("pretrain", "tiny.yaml", "--profile", "cpu.yaml")
    before = desk.files()
    code, out, _ = desk.launch(*words)
    assert (code, out) == (0, "runs/tiny has job 41 waiting or running already. Nothing is submitted.\n")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "latest").write_text(f"step-{NUM_STEPS:08d}\n")
    code, out, error = desk.launch(*words)
    assert (code, out) == (0, "runs/tiny is finished: 4 steps. Nothing is submitted.\n")
    assert TORCH not in error
    assert site.calls("sbatch") == []
    assert desk.files() - before == {"runs/tiny/checkpoints", "runs/tiny/checkpoints/latest"}


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("absent.yaml", ("absent.yaml", "--profile", "a100")),
        ("a sweep needs Slurm", ("two.yaml", "--profile", "local")),
        ("scontrol is not here", ("two.yaml", "--profile", "a100")),
        ("grid has the unknown key train.epoch", ("two.yaml", "--profile", "a100", "grid={train.epoch: [1]}")),
        ("train.epochs=0 is out of range", ("two.yaml", "--profile", "a100", "grid={train.epochs: [1, 0]}")),
        ("compute the same", ("two.yaml", "--profile", "a100", "grid={seed: [1, 1]}")),
    ],
)
def test_sweep_refuses(desk: Desk, said: str, words: tuple[str, ...]) -> None:
    desk.refuses(said, "sweep", *words)


def test_sweep_names_the_element_that_cannot_run(desk: Desk, site: Slurm) -> None:
    words = ("sweep", "two.yaml", "--profile", "cpu.yaml")
    desk.refuses(
        "train.global_batch=18: train.global_batch=18 cannot be", *words, "grid={train.global_batch: [16, 18]}"
    )
    desk.refuses("elsewhere.json", *words, "overrides=[data.manifest=elsewhere.json]")


def test_a_sweeps_dry_run_shows_elements_script_and_one_config(desk: Desk, site: Slurm) -> None:
    before = desk.files()
    code, out, error = desk.launch("sweep", "two.yaml", "--profile", "cpu.yaml", "--dry-run")
    assert (code, error) == (0, "")
    assert ": seed=0" in out
    assert ": seed=1" in out
    assert "#SBATCH --array=0-1%1" in out
    assert "to submit: 2 trainings, 2 evaluations" in out
    assert desk.files() == before


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("runs/absent has no checkpoint to evaluate", ("runs/absent",)),
        ("no run folder given", ("knn_k=5",)),
        ("unknown key knn", ("runs/absent", "knn=5")),
        ("scontrol is not here", ("runs/absent", "--profile", "a100")),
    ],
)
def test_evaluate_refuses(desk: Desk, said: str, words: tuple[str, ...]) -> None:
    desk.refuses(said, "evaluate", *words)


def test_evaluate_waits_for_what_still_trains(desk: Desk, site: Slurm) -> None:
    runs.record(desk.folder / "runs/tiny", stage="pretrain", job="41", cluster="slurm", slurm_conf="", steps=NUM_STEPS)
    site.says("squeue", "41|RUNNING|0|n1|None|0:10|\n")
    code, out, _ = desk.launch("evaluate", "runs/tiny", "--profile", "cpu.yaml", "--dry-run")
    assert code == 0
    assert "#SBATCH --dependency=afterok:41" in out
    assert "#SBATCH --ntasks-per-node=1" in out


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("without Slurm python -m shards.pack uses all cores", ("--recipe", "phantom")),
        ("--recipe fantom is not known; accepted: folder,", ("--recipe", "fantom", "--profile", "a100")),
        ("there is no source absent", ("absent", "--recipe", "folder", "--profile", "a100")),
        ("scontrol is not here", ("--recipe", "phantom", "--profile", "a100")),
    ],
)
def test_pack_refuses(desk: Desk, said: str, words: tuple[str, ...]) -> None:
    desk.refuses(said, "pack", *words, "--out", "new")


def test_pack_does_not_overwrite_a_set(desk: Desk) -> None:
    desk.refuses("data holds a packed set already", "pack", "--recipe", "phantom", "--profile", "a100", "--out", "data")


def test_two_ranks_train_on_this_machine_to_the_end(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", PATH)
    folder = desk.folder / "runs" / "tiny"

    def trained(*words: str) -> tuple[str, str]:
        """What is said of a submission, and the log of its job once it has ended."""
        before = len(runs.starts(folder))
        code, out, error = desk.launch("pretrain", "tiny.yaml", "--profile", "local", *words)
        assert (code, error) == (0, "")
        job = runs.submissions(folder)[-1]["job"]
        log = folder / "launch" / f"{job}_0_log.out"
        try:
            until = time.monotonic() + 200
            while not any(line["event"] == "end" for line in runs.starts(folder)[before:]):
                assert time.monotonic() < until, log.read_text() if log.exists() else "no log"
                time.sleep(0.5)
        except BaseException:
            os.kill(int(job), signal.SIGTERM)  # submitit's controller ends its ranks
            raise
        return out, log.read_text()

    out, log = trained()
    assert "4 steps on 2 rank(s)" in out
    assert [(line["outcome"], line["step"]) for line in runs.starts(folder)[1:]] == [("finished", NUM_STEPS)]
    assert runs.starts(folder)[0]["ranks"] == 2
    assert "2 ranks meet at 127.0.0.1:" in log
    assert "Nothing is submitted" in desk.launch("pretrain", "tiny.yaml", "--profile", "local").out
    revision = json.loads((folder / "environment.json").read_text())["git_sha"]
    (code_folder,) = (folder / "launch").glob("code-*")
    assert revision == (code_folder / "REVISION").read_text().strip()

    longer = ("train.epochs=2",)
    desk.refuses("(train.epochs 1 -> 2)", "pretrain", "tiny.yaml", "--profile", "local", *longer)
    _, log = trained(*longer, "--allow-config-change")
    assert "continuing under another config: train.epochs 1 -> 2" in log
    last = runs.starts(folder)[-1]
    assert (last["outcome"], last["step"]) == ("finished", 2 * NUM_STEPS)
