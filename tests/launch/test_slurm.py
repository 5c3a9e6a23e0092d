"""Slurm's answers as values, from recordings of the real commands."""

from pathlib import Path

import pytest

from launch import slurm
from tests.launch import recorded
from tests.launch.recorded import Slurm
from tracekin.config import UserError


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurm:
    found = Slurm(tmp_path, monkeypatch)
    found.says("sacct", recorded.SACCT)
    found.says("squeue", recorded.SQUEUE)
    return found


def test_states_of_arrays_single_and_dependent_jobs(fake: Slurm) -> None:
    ids = ["2_0", "2_1", "2_2", "2_4", "2_9", "3", "6", "7_1", "7_2", "8_2", "8_3", "9", "77", "77_1"]
    found = slurm.jobs(ids)
    assert {job: info.state for job, info in found.items()} == {
        "2_0": "COMPLETED",
        "2_1": "FAILED",
        "2_2": "RUNNING",  # accounting still counts it to the pending range
        "2_4": "PENDING",
        "2_9": "PENDING",
        "3": "FAILED",
        "6": "PENDING",
        "7_1": "CANCELLED",
        "7_2": "PENDING",
        "8_2": "CANCELLED",  # accounting still counts it to the pending range, too
        "8_3": "PENDING",
        "9": "PENDING",
    }
    assert found["2_1"].exit_code == "3:0"
    assert found["3"].exit_code == "2:0"
    assert found["6"].reason == "DependencyNeverSatisfied"
    assert found["9"].restarts == 1
    assert (found["2_2"].nodes, found["2_4"].nodes, found["2_2"].reason) == ("n1", "", "")
    assert [word for word in fake.calls("sacct")[0].split() if word.startswith("--jobs")] == ["--jobs=2,3,6,7,8,9,77"]
    assert len(fake.calls("sacct")) == len(fake.calls("squeue")) == 1


def test_what_the_controller_forgot_comes_from_accounting(fake: Slurm) -> None:
    fake.says("sacct", recorded.SACCT_LATER)
    fake.says("squeue", error=recorded.SQUEUE_UNKNOWN, code=1)
    found = slurm.jobs(["6", "8_1", "8_2", "8_3", "9"])
    assert {job: info.state for job, info in found.items()} == {
        "6": "CANCELLED",
        "8_1": "CANCELLED",
        "8_2": "CANCELLED",  # cancelled before it started: in neither list, while the array is known
        "8_3": "CANCELLED",
        "9": "COMPLETED",
    }
    assert found["9"].restarts == 1  # one row more than one


def test_a_site_without_accounting_is_read_through_squeue(fake: Slurm) -> None:
    fake.says("sacct", error=recorded.NO_ACCOUNTING, code=1)
    assert slurm.jobs(["2_2", "9"])["2_2"].state == "RUNNING"


def test_a_job_that_only_accounting_believes_to_run_is_over(fake: Slurm) -> None:
    fake.says("sacct", "5|RUNNING|0:0|n1|None|3-00:00:00\n")
    fake.says("squeue", error=recorded.SQUEUE_UNKNOWN, code=1)
    assert slurm.jobs(["5"])["5"].state == "UNKNOWN"


def test_many_jobs_are_asked_in_few_questions(fake: Slurm) -> None:
    slurm.jobs([str(number) for number in range(1, 1201)])
    assert len(fake.calls("sacct")) == 3


@pytest.mark.parametrize(
    ("written", "elements"),
    [
        ("12", ["12"]),
        ("12_3", ["12_3"]),
        ("12_[3-5%2]", ["12_3", "12_4", "12_5"]),
        ("12_[1,3]", ["12_1", "12_3"]),
        ("12_[0,4-8:2,11%1]", ["12_0", "12_4", "12_6", "12_8", "12_11"]),
    ],
)
def test_ranges_are_expanded(fake: Slurm, written: str, elements: list[str]) -> None:
    fake.says("sacct", f"{written}|DEADLINE|0:0|None assigned|Priority|00:00:00\n")
    fake.says("squeue", error=recorded.SQUEUE_UNKNOWN, code=1)
    assert {job: info.state for job, info in slurm.jobs(elements).items()} == dict.fromkeys(elements, "DEADLINE")


def test_no_answer_is_said_in_slurms_own_words(fake: Slurm) -> None:
    fake.says("squeue", error=recorded.UNREACHABLE, code=1)
    with pytest.raises(UserError, match=r"^squeue: slurm_load_jobs error: Unable to contact slurm controller"):
        slurm.jobs(["9"])


def test_a_silent_controller_is_not_waited_for_without_end(fake: Slurm, monkeypatch: pytest.MonkeyPatch) -> None:
    (fake.folder / "sacct").write_text("#!/bin/sh\nexec /bin/sleep 60\n")
    monkeypatch.setattr(slurm, "TIMEOUT", 0.2)
    with pytest.raises(UserError, match="did not answer within"):
        slurm.jobs(["9"])


def test_a_missing_command_names_the_way_out(fake: Slurm) -> None:
    with pytest.raises(UserError, match="sbatch is not here: run this on a Slurm login node, or use --cluster local"):
        slurm.command(["sbatch", "x.sh"])


def test_slurm_conf_is_exported_to_the_command_alone(
    fake: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", "/the/users/own")
    conf = tmp_path / "slurm.conf"
    conf.write_text("")
    slurm.jobs(["9"], str(conf))
    slurm.jobs(["9"])
    assert [call.split("|")[0] for call in fake.calls("squeue")] == [str(conf), "/the/users/own"]


def test_a_missing_slurm_conf_is_refused_at_once(fake: Slurm) -> None:
    with pytest.raises(UserError, match=r"slurm_conf /no/such/slurm\.conf is not there"):
        slurm.jobs(["9"], "/no/such/slurm.conf")
    assert not fake.calls("sacct")


def test_partitions_and_their_settings(fake: Slurm) -> None:
    fake.says("scontrol", recorded.PARTITIONS)
    assert slurm.partitions() == ["dev", "high"]
    found = slurm.partition("high")
    assert found is not None
    assert (found["PreemptMode"], found["TRES"]) == ("OFF", "cpu=4,mem=16000M,gres/gpu=4")
    assert slurm.partition("nope") is None


def test_settings(fake: Slurm) -> None:
    fake.says("scontrol", recorded.SETTINGS)
    found = slurm.settings()
    assert (found["KillWait"], found["MaxArraySize"], found["PreemptParameters"]) == (
        "15 sec",
        "1001",
        "send_user_signal",
    )


def test_nodes(fake: Slurm) -> None:
    fake.says("sinfo", recorded.SINFO)
    assert slurm.nodes_of("dev") == [
        {"name": name, "cpus": 2, "memory": 8000, "gpus": 2, "state": "idle"} for name in ("n1", "n2")
    ]


@pytest.mark.parametrize(
    ("gres", "gpus"),
    [
        ("(null)", 0),
        ("gpu:4", 4),
        ("gpu:a100:8(S:0-1)", 8),
        ("gpu:a100:4(S:0,1),shard:16,gpu:t4:2", 6),
        ("craynetwork:4", 0),
    ],
)
def test_gpus_of_a_node(fake: Slurm, gres: str, gpus: int) -> None:
    fake.says("sinfo", f"n1|2|8000|idle|{gres}\n")
    assert slurm.nodes_of("dev")[0]["gpus"] == gpus


def test_cancelling_what_has_ended_is_no_error(fake: Slurm) -> None:
    ended = "scancel: error: Kill job error on job id 4: Invalid job id specified"
    fake.says("scancel", error=ended, code=1)
    slurm.cancel(["4"])
    fake.says("scancel", error=f"{ended}\nscancel: error: Kill job error on job id 5: Access/permission denied", code=1)
    with pytest.raises(UserError, match="scancel: Kill job error on job id 5: Access/permission denied"):
        slurm.cancel(["4", "5"])
