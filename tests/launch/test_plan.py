"""What a sweep lacks, and what is submitted for it; neither Slurm nor a submission is real here."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from launch import jobs, runs, slurm
from launch.cluster import Profile
from launch.job import Job
from launch.plan import Run, Todo, find_todo, submit_runs
from launch.slurm import Info
from tracekin.config import EvaluateConfig, UserError

STEPS = 8
PROFILE = Profile(nodes=2, gpus=4, minutes=600, other_minutes=20)


def scores(step: int, k: int = 20) -> str:
    """What an evaluation with the default settings, or another k, leaves."""
    config = EvaluateConfig()
    probes = {"knn": {"k": k, "temperature": config.knn_temperature}, "linear": {"grid": list(config.linear_c)}}
    rows = [{"method": method, **probes} for method in ("pixels", "untrained", "none")]
    bootstrap = {"replicates": config.bootstrap, "seed": config.seed}
    facts = {"step": step, "manifest": "data/manifest.json", "split": "test", "rows": rows, "bootstrap": bootstrap}
    return json.dumps(facts)


def look(runs: Sequence[Run]) -> Todo:
    return find_todo(runs, EvaluateConfig())


class Sweep:
    """Run folders as trainings and evaluations leave them, and a Slurm that knows what it is told."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.states, self.sent = folder, dict[str, str](), list[tuple[str, list[Job], Profile, str]]()
        self.next_id = 100
        monkeypatch.setattr(slurm, "jobs", self._asked)

    def _asked(self, ids: Sequence[str], slurm_conf: str = "") -> dict[str, Info]:
        return {job: Info(job, self.states[job], "0:0", 0, "", "", "") for job in ids if job in self.states}

    def run(self, name: str, step: int = 0, evaluated: int = 0, **submitted: str) -> Run:
        """A run that has got to a step, and the (stage=job) that were submitted for it."""
        folder = self.folder / name
        if step:
            (folder / "checkpoints").mkdir(parents=True)
            (folder / "checkpoints" / "latest").write_text(f"step-{step:08d}\n")
        if evaluated:
            (folder / "evaluations").mkdir()
            (folder / "evaluations" / f"step-{evaluated:08d}-val.json").write_text(scores(evaluated))
        for stage, job in submitted.items():
            runs.record(folder, stage=stage, job=job, cluster="slurm", slurm_conf="", steps=STEPS)
        return Run(folder, f"{name}.yaml", STEPS, "data/manifest.json")

    def submit(self, stage: str, those: Sequence[Job], profile: Profile, dependency: str) -> list[str]:
        """As submitit does: one job is no array."""
        self.sent.append((stage, list(those), profile, dependency))
        self.next_id += 1
        count = len(those)
        return [str(self.next_id)] if count == 1 else [f"{self.next_id}_{n}" for n in range(count)]


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sweep:
    return Sweep(tmp_path, monkeypatch)


def submitted(sweep: Sweep, todo: Todo, longest: int = 1001) -> list[tuple[str, str, str]]:
    """(stage, name of the run, job) of everything that is submitted."""
    found = submit_runs(todo, PROFILE, ("knn_k=5",), longest, sweep.submit)
    return [(stage, run.folder.name, job) for stage, run, job in found]


def test_a_run_is_trained_unless_it_is_finished_or_in_slurm(sweep: Sweep) -> None:
    missing = sweep.run("missing")
    failed = sweep.run("failed", step=3, pretrain="1", evaluate="2")
    again = sweep.run("again", step=3, pretrain="3")
    runs.record(again.folder, stage="pretrain", job="4", cluster="slurm", slurm_conf="", steps=STEPS)
    forgotten = sweep.run("forgotten", step=3, pretrain="5")
    sweep.states = {"1": "FAILED", "2": "CANCELLED", "3": "CANCELLED", "4": "PENDING"}
    todo = look([missing, failed, again, forgotten])
    assert todo.train == [missing, failed, forgotten]
    assert todo.alive == ["4"]
    assert todo.evaluate_after == {"4": [again]}


def test_only_the_newest_job_of_a_run_counts(sweep: Sweep) -> None:
    run = sweep.run("run", step=3, pretrain="3")
    runs.record(run.folder, stage="pretrain", job="4", cluster="slurm", slurm_conf="", steps=STEPS)
    sweep.states = {"3": "COMPLETED", "4": "FAILED"}
    assert look([run]).train == [run]
    sweep.states = {"3": "FAILED", "4": "RUNNING"}
    assert look([run]).train == []


def test_a_finished_run_is_evaluated_once(sweep: Sweep) -> None:
    fresh = sweep.run("fresh", step=STEPS)
    stale = sweep.run("stale", step=STEPS, evaluated=4)  # an earlier checkpoint's
    failed = sweep.run("failed", step=STEPS, pretrain="1", evaluate="2")
    waits = sweep.run("waits", step=STEPS, pretrain="1", evaluate="3")
    done = sweep.run("done", step=STEPS, evaluated=STEPS, pretrain="1", evaluate="4")
    sweep.states = {"1": "COMPLETED", "2": "FAILED", "3": "PENDING", "4": "COMPLETED"}
    todo = look([fresh, stale, failed, waits, done])
    assert todo.evaluate_now == [fresh, stale, failed]
    assert (todo.train, todo.evaluate_after, todo.alive, todo.finished) == ([], {}, ["3"], 1)


def test_a_run_whose_jobs_are_on_their_way_lacks_nothing(sweep: Sweep) -> None:
    both = sweep.run("both", step=2, pretrain="7_0", evaluate="8_0")
    lone = sweep.run("lone", step=2, pretrain="7_1")
    sweep.states = {"7_0": "RUNNING", "7_1": "PENDING", "8_0": "PENDING"}
    todo = look([both, lone])
    assert todo.evaluate_after == {"7_1": [lone]}
    assert todo.alive == ["7_0", "8_0", "7_1"]
    assert submitted(sweep, todo) == [("evaluate", "lone", "101")]
    assert sweep.sent[0][3] == "afterok:7_1"


def test_a_training_that_failed_is_not_waited_for_by_what_waits_already(sweep: Sweep) -> None:
    """Its old evaluation was cancelled with it, or still waits: both trainings and evaluations get new jobs."""
    run = sweep.run("run", step=2, pretrain="7_0", evaluate="8_0")
    sweep.states = {"7_0": "FAILED", "8_0": "CANCELLED"}
    assert submitted(sweep, look([run])) == [("pretrain", "run", "101"), ("evaluate", "run", "102")]


def test_trainings_and_their_evaluations_are_arrays_element_by_element(sweep: Sweep) -> None:
    those = [sweep.run(name) for name in "abc"]
    assert submitted(sweep, look(those)) == [
        *(("pretrain", name, f"101_{n}") for n, name in enumerate("abc")),
        *(("evaluate", name, f"102_{n}") for n, name in enumerate("abc")),
    ]
    (_, train, profile, first), (_, evaluate, small, then) = sweep.sent
    assert [job.arguments for job in train] == [("pretrain", f"{name}.yaml") for name in "abc"]
    assert [job.arguments for job in evaluate] == [("evaluate", str(run.folder), "knn_k=5") for run in those]
    assert (first, then) == ("", "aftercorr:101")
    assert profile == PROFILE
    assert (small.num_tasks, small.minutes) == (1, 20)


def test_a_lone_training_is_no_array(sweep: Sweep) -> None:
    assert submitted(sweep, look([sweep.run("a")])) == [("pretrain", "a", "101"), ("evaluate", "a", "102")]
    assert [dependency for *_, dependency in sweep.sent] == ["", "afterok:101"]


def test_more_runs_than_slurm_takes_in_one_array_are_several(sweep: Sweep) -> None:
    todo = look([sweep.run(f"r{n}") for n in range(5)] + [sweep.run(f"f{n}", step=STEPS) for n in range(3)])
    found = submitted(sweep, todo, longest=2)
    assert [(stage, len(those), dependency) for stage, those, _, dependency in sweep.sent] == [
        ("pretrain", 2, ""),
        ("evaluate", 2, "aftercorr:101"),
        ("pretrain", 2, ""),
        ("evaluate", 2, "aftercorr:103"),
        ("pretrain", 1, ""),
        ("evaluate", 1, "afterok:105"),
        ("evaluate", 2, ""),
        ("evaluate", 1, ""),
    ]
    assert len({(stage, name) for stage, name, _ in found}) == len(found) == 5 + 5 + 3


def test_what_was_submitted_before_an_interruption_is_known(sweep: Sweep) -> None:
    """Each job is told right after its submission, so that it can be recorded."""
    todo = look([sweep.run(f"r{n}") for n in range(4)])
    found = submit_runs(todo, PROFILE, (), 2, sweep.submit)
    assert [next(found)[2], next(found)[2]] == ["101_0", "101_1"]
    assert len(sweep.sent) == 1


def test_the_same_sweep_again_submits_nothing(sweep: Sweep) -> None:
    done = sweep.run("done", step=STEPS, evaluated=STEPS)
    those = [sweep.run(name) for name in "ab"]
    for stage, run, job in submit_runs(look([*those, done]), PROFILE, (), 1001, sweep.submit):
        runs.record(run.folder, stage=stage, job=job, cluster="slurm", slurm_conf="", steps=STEPS)
        sweep.states[job] = "PENDING"
    again = look([*those, done])
    assert again.is_empty
    assert again.finished == 1
    assert sorted(again.alive) == ["101_0", "101_1", "102_0", "102_1"]
    assert submitted(sweep, again) == []


def test_nothing_is_planned_without_slurms_answer(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    run = sweep.run("run", step=2, pretrain="7")

    def silent(ids: Sequence[str], slurm_conf: str = "") -> dict[str, Info]:
        raise UserError("squeue: Slurm did not answer within 30 s; try again later.")

    monkeypatch.setattr(jobs.slurm, "jobs", silent)
    with pytest.raises(UserError, match="did not answer"):
        look([run])


def test_a_score_with_other_settings_does_not_count(sweep: Sweep) -> None:
    run = sweep.run("scored", step=STEPS, evaluated=STEPS)
    assert look([run]).is_empty
    next((run.folder / "evaluations").glob("*.json")).write_text(scores(STEPS, k=5))
    assert look([run]).evaluate_now == [run]
