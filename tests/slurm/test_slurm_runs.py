"""A run on two nodes of a real Slurm: preempted, killed, out of time, on a lost node, cancelled."""

import math
import signal
from pathlib import Path

import pytest

from tests.slurm.cluster import (
    ROOT,
    STEPS_PER_EPOCH,
    Cluster,
    assert_identical,
    dev_cluster,
    kill,
    last_step,
    lines,
    newest_log,
    starts,
)

LAST = 7 * STEPS_PER_EPOCH


@pytest.fixture(scope="session")
def unbroken(cluster: Cluster) -> Path:
    """The run that nothing happens to."""
    folder, job = cluster.pretrain("unbroken")
    assert cluster.wait_for_end(job, folder) == "COMPLETED"
    return folder


def test_a_run_on_two_nodes(cluster: Cluster, unbroken: Path) -> None:
    assert starts(unbroken) == [(0, 0, "finished", "")]
    assert lines(unbroken / "starts.jsonl")[0]["ranks"] == 2
    log = newest_log(unbroken)
    assert log
    text = log.read_text()
    assert "2 ranks meet at 127.0.0.1:" in text  # the node's address as Slurm knows it: its name n1 resolves nowhere
    assert "over lo" in text
    said = cluster.launch("pretrain", str(cluster.config), "name=unbroken", "--profile", str(cluster.profile))
    assert "is finished" in said
    assert "Nothing is submitted" in said
    assert len(lines(unbroken / "submissions.jsonl")) == 1


def test_a_preemption_by_term_alone_loses_nothing_and_runs_what_was_submitted(cluster: Cluster, unbroken: Path) -> None:
    """Also the checkout is edited meanwhile, every part of it that the job runs."""
    folder, job = cluster.pretrain("term")
    broken = [cluster.checkout / name for name in ("src/tracekin/train/loop.py", "launch/job.py", "slurm/job.sh")]
    sound = [path.read_text() for path in broken]
    try:
        cluster.wait_for_step(folder, 6)
        for path in broken:
            path.write_text("exit 9\n" if path.suffix == ".sh" else "raise SystemExit(9)\n")
        cluster.take_all_nodes()
        assert cluster.wait_for_end(job, folder) == "COMPLETED"
    finally:
        for path, text in zip(broken, sound, strict=True):
            path.write_text(text)
    first, second = starts(folder)
    assert first == (0, 0, "preempted", "TERM")
    assert 6 <= second[1] < LAST - STEPS_PER_EPOCH  # well before its end
    assert second == (1, second[1], "finished", "")
    assert second[1] == lines(folder / "starts.jsonl")[1]["step"]  # no step was lost
    assert_identical(folder, unbroken)


def test_a_preemption_announced_by_usr2_loses_nothing(cluster: Cluster, unbroken: Path) -> None:
    folder, job = cluster.pretrain("usr2", "--set", "partition=grace")
    cluster.wait_for_step(folder, 6)
    cluster.take_all_nodes()
    assert cluster.wait_for_end(job, folder) == "COMPLETED"
    first, second = starts(folder)
    assert first == (0, 0, "preempted", "USR2")
    assert 6 <= second[1] < LAST - STEPS_PER_EPOCH
    assert second == (1, second[1], "finished", "")
    log = newest_log(folder)
    assert log
    assert "this job is" in log.read_text()  # submitit's handler
    assert_identical(folder, unbroken)


def test_the_same_run_with_plain_srun(cluster: Cluster, unbroken: Path) -> None:
    """slurm/pretrain.sbatch, without submitit, killed and requeued by the same rules."""
    shape = ("--partition=dev", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1")
    folder = cluster.checkout / "runs" / "plain"
    job = cluster.sbatch(*shape, "slurm/pretrain.sbatch", str(cluster.config), "name=plain")
    cluster.wait_for_step(folder, 6)
    kill(cluster.ranks(job)[:1])
    assert cluster.wait_for_end(job, folder) == "COMPLETED"
    assert starts(folder)[1] == (1, STEPS_PER_EPOCH, "finished", "")
    assert_identical(folder, unbroken)


@pytest.mark.timeout(600)  # three starts, a minute each, and the requeues between them
def test_a_time_limit_shorter_than_the_run_loses_nothing(cluster: Cluster, unbroken: Path) -> None:
    first, *_, last = lines(unbroken / "metrics.jsonl")
    speed = (last["step"] - first["step"]) / (last["time"] - first["time"])
    epochs = math.ceil(speed * 90 / STEPS_PER_EPOCH)  # of training alone: the signal comes a minute after the start
    limit = ("--set", "minutes=2", "--set", "signal_seconds=60")
    folder, job = cluster.pretrain("limit", f"train.epochs={epochs}", *limit)
    assert cluster.wait_for_end(job, folder) == "COMPLETED"
    found = starts(folder)
    assert len(found) >= 2
    assert all(start[2:] == ("preempted", "USR2") for start in found[:-1])
    assert [line["step"] for line in lines(folder / "metrics.jsonl")] == list(range(1, epochs * STEPS_PER_EPOCH + 1))


def test_a_killed_rank_is_a_restart_and_costs_an_epoch_at_most(cluster: Cluster, unbroken: Path) -> None:
    folder, job = cluster.pretrain("killed")
    cluster.wait_for_step(folder, 6)
    kill(cluster.ranks(job)[-1:])
    cluster.wait_for("the next start", lambda: len(starts(folder)) == 2, newest_log(folder))
    assert cluster.wait_for_end(job, folder) == "COMPLETED"
    assert starts(folder)[1] == (1, STEPS_PER_EPOCH, "finished", "")
    assert_identical(folder, unbroken)


def test_what_is_cancelled_stays_cancelled(cluster: Cluster) -> None:
    folder, job = cluster.pretrain("cancelled")
    cluster.wait_for_step(folder, 3)
    assert job in cluster.launch("cancel", str(folder))
    assert cluster.wait_for_end(job, folder) == "CANCELLED"
    (start,) = starts(folder)
    assert start[2:] == ("preempted", "TERM")  # it saved what it had
    assert "cancelled" in cluster.launch("status", str(folder))
    assert cluster.facts(job)["Restarts"] == "0"


@pytest.mark.parametrize("with_its_tasks", [False, True], ids=["slurmd-alone", "slurmd-and-tasks"])
def test_a_lost_node(cluster: Cluster, with_its_tasks: bool) -> None:
    """Slurm starts the run on the other node; on the lost one its processes may still run, and write nothing more."""
    folder, job = cluster.pretrain(f"lost-{with_its_tasks}", "--set", "nodes=1", "--set", "tasks=2")
    try:
        cluster.wait_for_step(folder, 6)
        node = cluster.facts(job)["NodeList"]
        slurmd = int((ROOT / ".dev-cluster" / "pid" / f"slurmd-{node}").read_text())
        old = cluster.pids(job)
        kill(cluster.daemons(node) if with_its_tasks else [slurmd])
        if with_its_tasks:
            kill(old)
        else:  # asleep, as behind a broken network: they would be done before Slurm misses the node
            kill(cluster.ranks(job), signal.SIGSTOP)
        before = last_step(folder)
        cluster.wait_for("the start elsewhere", lambda: len(starts(folder)) == 2, newest_log(folder))
        assert cluster.facts(job)["NodeList"] != node
        if not with_its_tasks:
            cluster.wait_for_step(folder, 5, start=1)
            asleep = set(old) & set(cluster.ranks(job))
            assert len(asleep) == 2
            kill(sorted(asleep), signal.SIGCONT)
            cluster.wait_for("the end of the old ranks", lambda: not asleep & set(cluster.ranks(job)))
            assert "was taken over by a newer start" in "".join(p.read_text() for p in folder.glob("launch/*_log.out"))
        assert cluster.wait_for_end(job, folder) == "COMPLETED"
        first, second = starts(folder)
        assert first[:3] == (0, 0, "killed")
        assert "its node was lost" in first[3]
        assert second[2] == "finished"
        assert before - second[1] <= STEPS_PER_EPOCH
        assert [line["step"] for line in lines(folder / "metrics.jsonl")] == list(range(1, LAST + 1))
    finally:
        assert dev_cluster("up", "--nodes", "2").returncode == 0
