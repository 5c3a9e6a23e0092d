"""slurm/dev-cluster where there is no Slurm: what it refuses and what it says. The cluster itself: make slurm-test."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "slurm" / "dev-cluster"


@pytest.fixture
def checkout() -> Iterator[Path]:
    """A checkout of the script alone, so that a cluster of this checkout is not touched; readable by every user."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        root.chmod(0o755)
        (root / "slurm").mkdir(mode=0o755)
        shutil.copy(SCRIPT, root / "slurm" / "dev-cluster")
        yield root


def call(
    checkout: Path, *arguments: str, path: str | None = None, user: int | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the script with these arguments, PATH and user id."""
    environment = dict(os.environ, PATH=path or os.environ["PATH"])
    command = [checkout / "slurm" / "dev-cluster", *arguments]
    return subprocess.run(command, env=environment, user=user, capture_output=True, text=True, timeout=60, check=False)


def only(checkout: Path, *programs: str) -> str:
    """A PATH with these programs only."""
    folder = checkout / "bin"
    folder.mkdir(mode=0o755)
    for program in programs:
        found = shutil.which(program)
        assert found, program
        (folder / program).symlink_to(found)
    return str(folder)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["start"],
        ["up", "2"],
        ["up", "--nodes"],
        ["up", "--nodes", "0"],
        ["up", "--nodes", "17"],
        ["up", "--nodes", "two"],
        ["up", "--nodes=2", "now"],
        ["up", "--node", "2"],
        ["down", "--nodes", "2"],
        ["env", "sh"],
    ],
)
def test_bad_arguments_are_answered_with_the_usage(checkout: Path, arguments: list[str]) -> None:
    answer = call(checkout, *arguments)
    assert answer.returncode == 2
    assert answer.stderr.startswith("usage: slurm/dev-cluster up [--nodes N] | down | status | env\n")
    assert answer.stdout == ""
    assert not (checkout / ".dev-cluster").exists()


def test_the_usage_fits_a_terminal(checkout: Path) -> None:
    assert max(len(line) for line in call(checkout).stderr.splitlines()) <= 80


def test_missing_packages_are_named_with_the_line_that_installs_them(checkout: Path) -> None:
    answer = call(checkout, "up", path=only(checkout, "bash", "env", "cat", "dirname", "sort"))
    assert answer.returncode == 2
    packages = "mariadb-client mariadb-server munge slurm-wlm slurmdbd"
    assert f"dev-cluster: missing packages: {packages}" in answer.stderr
    assert f"apt-get install --no-install-recommends {packages}\n" in answer.stderr
    assert not (checkout / ".dev-cluster").exists()


def test_only_what_is_missing_is_named(checkout: Path) -> None:
    path = only(checkout, "bash", "env", "cat", "dirname", "sort")
    for program in ("munged", "mariadbd", "mariadb-install-db", "mariadb-admin", "slurmctld", "slurmd", "sinfo"):
        (checkout / "bin" / program).symlink_to(checkout / "bin" / "cat")
    answer = call(checkout, "up", path=path)
    assert answer.returncode == 2
    assert "dev-cluster: missing packages: slurmdbd; install them with\n" in answer.stderr


def test_it_runs_as_root_only(checkout: Path) -> None:
    answer = call(checkout, "up", user=65534 if os.geteuid() == 0 else None)
    assert answer.returncode == 2
    assert "dev-cluster: must run as root" in answer.stderr
    assert not (checkout / ".dev-cluster").exists()


def test_env_before_up_says_what_to_do(checkout: Path) -> None:
    answer = call(checkout, "env")
    assert answer.returncode == 2
    assert answer.stdout == ""
    assert answer.stderr == "dev-cluster: there is no cluster here yet; start it with: slurm/dev-cluster up\n"


def test_env_survives_a_path_with_a_space(checkout: Path) -> None:
    root = checkout / "my checkout"
    shutil.copytree(checkout / "slurm", root / "slurm")
    (root / ".dev-cluster").mkdir()
    (root / ".dev-cluster" / "slurm.conf").touch()
    line = call(root, "env").stdout
    shown = subprocess.run(["bash", "-c", f'{line}printf %s "$SLURM_CONF"'], capture_output=True, text=True, check=True)
    assert shown.stdout == str(root.resolve() / ".dev-cluster" / "slurm.conf")


def test_down_with_nothing_running_is_no_error(checkout: Path) -> None:
    answer = call(checkout, "down")
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "dev-cluster: nothing runs\n", "")
    assert not (checkout / ".dev-cluster").exists()
