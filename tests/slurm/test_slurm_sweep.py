"""A sweep on a real Slurm: an array with an element that fails, evaluations that wait for theirs, a table of all."""

import csv
from pathlib import Path

import yaml

from tests.slurm.cluster import Cluster, kill, lines, starts


def write_sweep(cluster: Cluster, **more: object) -> Path:
    path = cluster.folder / "grid.yaml"
    content = {
        "config": str(cluster.config),
        "overrides": ["train.epochs=2"],
        "grid": {"mining.policy": ["none", "tracin_cosine"], "optimiser.lr": [0.05, 1e30]},
        "exclude": [{"mining.policy": "tracin_cosine", "optimiser.lr": 1e30}],
        "evaluate": ["bootstrap=50", "knn_k=5", "workers=0", "linear_c=[0.1]"],
        **more,
    }
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def test_a_sweep_ends_with_its_table_and_starts_only_what_is_missing(cluster: Cluster) -> None:
    grid = {"mining.policy": ["none", "tracin_cosine"], "optimiser.lr": [0.05, 1e30]}
    sweep = str(write_sweep(cluster, grid=grid, exclude=[]))
    profile = ("--profile", str(cluster.profile), "--set", "nodes=1")
    assert "submitted 4 trainings, 4 evaluations and the table" in cluster.launch("sweep", sweep, *profile)
    folder = cluster.checkout / "runs" / "sweeps" / "grid"
    (killed,) = folder.glob("tracin_cosine-lr0.05-*")
    element = lines(killed / "submissions.jsonl")[0]["job"]
    cluster.wait_for_step(killed, 1)
    kill(cluster.ranks(element))  # it is started again, alone, and its evaluation waits
    cluster.wait_for_end(lines(folder / "submissions.jsonl")[-1]["job"])  # the table's
    runs = sorted(path for path in folder.iterdir() if (path / "submissions.jsonl").is_file())
    jobs = {line["job"] for run in runs for line in lines(run / "submissions.jsonl")}
    assert len(jobs) == 8
    assert len({job.partition("_")[0] for job in jobs}) == 2  # two arrays

    assert [start[0] for start in starts(killed)] == [0, 1]
    rows = list(csv.DictReader((folder / "table.csv").read_text().splitlines()))
    states = {(row["mining.policy"], float(row["optimiser.lr"])): row["state"] for row in rows}
    assert states[("none", 0.05)] == states[("tracin_cosine", 0.05)] == "done"
    assert states[("none", 1e30)] == states[("tracin_cosine", 1e30)] == "pretrain failed"
    assert "failed" in (folder / "table.md").read_text()
    assert "failed" in (folder / "table.html").read_text()
    facts = {job: cluster.facts(job) for job in jobs}
    cancelled = [job for job in jobs if facts[job]["JobState"] == "CANCELLED"]
    assert len(cancelled) == 2  # the evaluations of the failed elements, by --kill-on-invalid-dep
    failed = [facts[job] for job in jobs if facts[job]["JobState"] == "FAILED"]
    assert [(fact["ExitCode"], fact["Restarts"]) for fact in failed] == [("1:0", "0")] * 2  # not tried again
    shown = cluster.launch("status", str(folder))
    assert shown.count("failed: sweeps/grid/") == 2

    # Without the elements that fail everything is there, and the same runs keep their names.
    sound = str(write_sweep(cluster, grid={**grid, "optimiser.lr": [0.05]}, exclude=[]))
    said = cluster.launch("sweep", sound, *profile, "--wait")
    assert "submitted 0 trainings, 0 evaluations and the table" in said  # of the two
    said = cluster.launch("sweep", sound, *profile, "--wait")
    assert "2 of 2 runs are finished" in said
    assert "Nothing is submitted" in said
    # One more seed is one more run of each policy; what failed is started again; what is finished is not.
    more = str(write_sweep(cluster, grid={**grid, "seed": [0, 1]}, exclude=[{"optimiser.lr": 1e30, "seed": 1}]))
    shown = cluster.launch("sweep", more, *profile, "--dry-run")
    assert "# 6 runs, 2 finished; to submit: 4 trainings, 4 evaluations" in shown


def test_a_run_is_followed_and_evaluated(cluster: Cluster) -> None:
    folder, job = cluster.pretrain("scored", "train.epochs=1")
    words = ["knn_k=5", "bootstrap=20", "workers=0", "linear_c=[0.1]"]
    cluster.launch("evaluate", str(folder), *words, "--profile", str(cluster.profile))  # it waits for the training
    evaluation = lines(folder / "submissions.jsonl")[-1]["job"]
    text = cluster.launch("logs", job, "--follow")
    assert "step 4/4" in text
    assert "done in" in text
    assert "step 4/4" not in cluster.launch("logs", job, "--rank", "1")
    assert "there is 0 to 1" in cluster.launch("logs", job, "--rank", "7", code=2)
    assert cluster.wait_for_end(evaluation, folder) == "COMPLETED"
    assert list((folder / "evaluations").glob("step-00000004-*.json"))


def test_an_archive_is_packed_by_an_array_and_joined(cluster: Cluster) -> None:
    out = cluster.folder / "phantoms"
    words = ["--recipe", "phantom", "-o", "lesions=50", "--shard-samples", "8", "--out", str(out)]
    cluster.launch("pack", *words, "--slices", "3", "--profile", str(cluster.profile), "--set", "cpus=1")
    last = lines(cluster.folder / "phantoms.launch" / "submissions.jsonl")
    assert [line["stage"] for line in last] == ["pack"] * 3 + ["merge"]
    assert cluster.wait_for_end(last[-1]["job"]) == "COMPLETED"
    assert (out / "manifest.json").is_file()
