"""The code that a job runs is what was submitted, whatever becomes of the checkout."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch import snapshot
from tracekin.config import UserError

FILES = {
    "src/tracekin/a.py": "A = 1\n",
    "launch/job.py": "B = 1\n",
    "shards/pack.py": "C = 1\n",
    "slurm/job.sh": "true\n",
    "tests/test_a.py": "no part of a job\n",
    "README.md": "nor this\n",
}


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small one, committed."""
    root = tmp_path / "checkout"
    for name, text in {**FILES, ".gitignore": "*.tmp\n__pycache__/\n"}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "slurm" / "job.sh").chmod(0o755)
    monkeypatch.setattr(snapshot, "ROOT", root)
    git(root, "init", "--quiet")
    git(root, "add", ".")
    git(root, "-c", "user.name=a", "-c", "user.email=a@b.example", "commit", "--quiet", "-m", "x")
    return root


def git(root: Path, *words: str) -> str:
    alone = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    done = subprocess.run(["git", *words], cwd=root, env=alone, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_the_same_code_is_one_folder_and_an_edit_another(checkout: Path, tmp_path: Path) -> None:
    first = snapshot.take(tmp_path / "run")
    assert snapshot.take(tmp_path / "run") == first
    (checkout / "README.md").write_text("no code")
    assert snapshot.take(tmp_path / "run") == first
    (checkout / "src/tracekin/a.py").write_text("A = 2\n")
    second = snapshot.take(tmp_path / "run")
    assert second != first
    assert (first / "src/tracekin/a.py").read_text() == "A = 1\n"
    (checkout / "src/tracekin/a.py").rename(checkout / "src/tracekin/b.py")
    assert snapshot.take(tmp_path / "run") not in (first, second)
    assert len(list((tmp_path / "run").iterdir())) == 3


def test_what_is_in_it(checkout: Path, tmp_path: Path) -> None:
    (checkout / "src/tracekin/new.py").write_text("not yet in git\n")
    (checkout / "src/tracekin/notes.tmp").write_text("ignored\n")
    (checkout / "launch/__pycache__").mkdir()
    (checkout / "launch/__pycache__/job.pyc").write_bytes(b"ignored")
    (checkout / "shards/pack.py").unlink()  # deleted, and git does not know yet
    code = snapshot.take(tmp_path / "run")
    expected = {"src/tracekin/a.py", "src/tracekin/new.py", "launch/job.py", "slurm/job.sh", "REVISION"}
    assert files(code) == expected
    assert os.access(code / "slurm/job.sh", os.X_OK)


def test_its_revision_is_the_commit(checkout: Path, tmp_path: Path) -> None:
    commit = git(checkout, "rev-parse", "HEAD")
    assert (snapshot.take(tmp_path / "run") / "REVISION").read_text() == f"{commit}\n"
    (checkout / "launch/job.py").write_text("B = 2\n")
    assert (snapshot.take(tmp_path / "run") / "REVISION").read_text() == f"{commit}-dirty\n"


@pytest.mark.parametrize("how", ["no git", "no repository"])
def test_without_git_every_file_is_taken_that_is_no_cache(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    known = snapshot.take(tmp_path / "run").name
    shutil.rmtree(checkout / ".git")
    if how == "no git":
        monkeypatch.setenv("PATH", "")
    (checkout / "launch/__pycache__").mkdir()
    (checkout / "launch/__pycache__/job.cpython-311.pyc").write_bytes(b"cache")
    code = snapshot.take(tmp_path / "other")
    assert code.name == known
    assert files(code) == {name for name in FILES if name.split("/")[0] in snapshot.FOLDERS} | {"REVISION"}
    assert (code / "REVISION").read_text() == "unknown\n"


def test_a_copy_that_was_broken_off_is_made_again(checkout: Path, tmp_path: Path) -> None:
    name = snapshot.take(tmp_path / "other").name
    partial = tmp_path / "run" / f".{name}.partial"
    partial.mkdir(parents=True)
    (partial / "left.py").write_text("of a submission that was interrupted")
    code = snapshot.take(tmp_path / "run")
    assert "left.py" not in files(code)
    assert not partial.exists()


def test_a_folder_that_cannot_be_written_is_said(checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot freeze the code"):
        snapshot.take(tmp_path / "file" / "run")


def test_a_job_imports_the_snapshot_from_a_checkout_that_was_broken_since(tmp_path: Path) -> None:
    """The real code, with the variables that a batch script sets, in the working directory of a job."""
    code = snapshot.take(tmp_path / "run")
    broken = tmp_path / "checkout"
    for name in ("launch/job.py", "src/tracekin/cli.py", "launch/__init__.py", "shards/__init__.py", "torch.py"):
        (broken / name).parent.mkdir(parents=True, exist_ok=True)
        (broken / name).write_text("raise SystemExit(9)\n")
    probe = (
        "import launch.job, shards.pack, tracekin.cli\n"
        "from tracekin.monitor.environment import git_sha\n"
        "print(launch.job.__file__, shards.pack.__file__, tracekin.cli.__file__, git_sha(), sep='\\n')"
    )
    frozen = {**os.environ, "PYTHONPATH": f"{code / 'src'}:{code}", "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, "-c", probe], cwd=broken, env=frozen, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    *imported, revision = done.stdout.split()
    assert imported == [str(code / name) for name in ("launch/job.py", "shards/pack.py", "src/tracekin/cli.py")]
    assert revision == (code / "REVISION").read_text().strip()
