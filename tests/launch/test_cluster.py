"""Profiles: what they say, what is wrong with them, and whether Slurm can ever run such a job."""

from dataclasses import replace
from pathlib import Path

import pytest

from launch.cluster import PROFILES, Profile, check_grace, check_profile, read_profile
from tests.launch.recorded import Slurm
from tracekin.config import Config, UserError

PARTITIONS = """\
PartitionName=gpu AllowGroups=ALL Default=NO MaxNodes=UNLIMITED MaxTime=1-00:00:00 State=UP
PartitionName=main AllowGroups=ALL Default=YES MaxNodes=UNLIMITED MaxTime=UNLIMITED State=UP
"""
NODES = "g1|32|257000|idle|gpu:a100:4(S:0-1)\ng2|32|257000|mixed|gpu:a100:4(S:0-1)\ng3|16|128000|idle|gpu:2\n"
CONFIG = "KillWait                = 60 sec\nMaxArraySize            = 1001\n"


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    found = Slurm(tmp_path, monkeypatch)
    found.says("scontrol", PARTITIONS)
    found.says("sinfo", NODES)
    return found


@pytest.mark.parametrize("path", sorted(PROFILES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_profile_of_the_house_loads_and_tells_its_name(path: Path) -> None:
    profile = read_profile(path.stem)
    assert profile == read_profile(str(path))
    assert f"--profile {path.stem}" in path.read_text()
    assert profile.num_tasks == profile.nodes * (profile.gpus or profile.tasks)


def test_the_dev_profile_names_the_dev_clusters_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_profile("dev").slurm_conf == str(tmp_path / ".dev-cluster" / "slurm.conf")


def test_values_may_be_given_over_a_profile() -> None:
    profile = read_profile("a100", ["nodes=4", "partition=debug", "setup=[module load x, export A=b]"])
    assert (profile.nodes, profile.partition, profile.num_tasks) == (4, "debug", 16)
    assert profile.setup == ("module load x", "export A=b")
    assert profile.account == read_profile("a100").account
    assert read_profile("a100", ["nodes=1"], "local").cluster == "local"


@pytest.mark.parametrize(
    ("name", "overrides", "said"),
    [
        ("a10", (), "no profile a10 in slurm/profiles; did you mean a100?"),
        ("mysite", (), "no profile mysite in slurm/profiles; accepted: a100, dev, h100, local, or the path of a YAML"),
        ("nowhere/mine.yaml", (), "nowhere/mine.yaml"),
        ("dev", ("partitions=x",), "unknown key partitions; did you mean partition?"),
        ("dev", ("nodes=0",), "nodes=0 is out of range: accepted is 1 or more."),
        ("dev", ("cpus=-1",), "cpus=-1 is out of range"),
        ("dev", ("minutes=0",), "minutes=0 is out of range"),
        ("dev", ("signal_seconds=0",), "signal_seconds=0 is out of range"),
        ("dev", ("gpus=-1",), "gpus=-1 is out of range: accepted is 0 or more."),
        ("dev", ("max_restarts=-1",), "max_restarts=-1 is out of range"),
        ("dev", ("memory_gb=-2",), "memory_gb=-2"),
        ("dev", ("nodes=two",), "nodes"),
        ("dev", ("cluster=pbs",), "cluster"),
        ("dev", ("nodes",), "is not an override: write key=value"),
        ("local", ("nodes=2",), "nodes=2: cluster=local is this machine alone; accepted is 1."),
        ("local", ("cluster=debug",), "cluster=debug runs one task in the command itself, not 2."),
    ],
)
def test_what_is_wrong_with_a_profile_is_said_on_one_line(name: str, overrides: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError) as caught:
        read_profile(name, overrides)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value) or said.startswith(str(overrides[0]))


def test_a_file_with_an_unknown_key_is_named(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text("partitoin: gpu\n")
    with pytest.raises(UserError, match=r"site\.yaml: unknown key partitoin; did you mean partition\?"):
        read_profile(str(path))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"partition": "gpus"}, "partition=gpus is not one of this Slurm's: gpu, main."),
        ({"nodes": 4}, "nodes=4: partition gpu has 3."),
        ({"gpus": 5}, "asks for 5 GPUs on 1 node(s); partition gpu has nodes of at most 4. Lower gpus"),
        ({"gpus": 4, "nodes": 3}, "asks for 4 GPUs on 3 node(s)"),
        ({"gpus": 4, "cpus": 9}, "asks for 36 cores on 1 node(s); partition gpu has nodes of at most 32. Lower cpus"),
        ({"gpus": 4, "memory_gb": 64.0}, "Lower memory_gb"),
        ({"minutes": 1441}, "minutes=1441: partition gpu allows 1440"),
    ],
)
def test_what_slurm_can_never_run_is_refused(fake: Slurm, changes: dict[str, object], said: str) -> None:
    with pytest.raises(UserError) as caught:
        check_profile(replace(Profile(partition="gpu"), **changes))
    assert said in str(caught.value)


def test_what_slurm_can_run_is_not(fake: Slurm) -> None:
    check_profile(Profile(partition="gpu", nodes=2, gpus=4, cpus=8, memory_gb=62.0, minutes=1440))
    check_profile(Profile(nodes=3, gpus=2, minutes=10**6))  # the default partition, without a limit
    assert "--partition=main" in fake.calls("sinfo")[-1]


def test_no_slurm_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Slurm(tmp_path, monkeypatch)
    with pytest.raises(UserError, match=r"scontrol is not here: .*--cluster local"):
        check_profile(Profile(partition="gpu"))
    check_profile(Profile(cluster="local"))


def test_a_run_must_be_able_to_save_itself_in_the_time_that_slurm_leaves(fake: Slurm) -> None:
    fake.says("scontrol", CONFIG)

    def config(seconds: float) -> Config:
        return replace(Config(), train=replace(Config().train, stop_seconds=seconds))

    check_grace(Profile(signal_seconds=60), config(59))
    with pytest.raises(UserError, match=r"signal_seconds=60 .* train\.stop_seconds=60.* Raise signal_seconds"):
        check_grace(Profile(signal_seconds=60), config(60))
    with pytest.raises(UserError, match=r"kills 60 s after TERM \(KillWait\).*train\.stop_seconds=60"):
        check_grace(Profile(signal_seconds=120), config(60))
    check_grace(Profile(cluster="local", signal_seconds=1), config(60))


def test_jobs_other_than_trainings_take_one_task() -> None:
    one = Profile(nodes=4, gpus=8, tasks=2, minutes=1000, other_minutes=30, cpus=12).of_one_task()
    assert (one.num_tasks, one.gpus, one.minutes, one.cpus) == (1, 1, 30, 12)
    assert Profile(nodes=2, tasks=4).of_one_task().num_tasks == 1
