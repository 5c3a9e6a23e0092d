"""What is left to do for each run of a sweep, and the submissions that do it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from launch import runs
from launch.cluster import Profile
from launch.job import Job
from launch.jobs import Submitted, is_alive, states, submitted
from tracekin.config import EvaluateConfig, UserError
from tracekin.evaluate.summary import find_evaluation

Submit = Callable[[str, Sequence[Job], Profile, str], list[str]]
"""(name, jobs, profile, dependency) -> their ids."""


class Run(NamedTuple):
    """One element of a sweep."""

    folder: Path
    config: str
    """Path of its resolved config, which its job reads."""
    steps: int
    manifest: str
    """Of the data it trains on."""


@dataclass
class Todo:
    """The runs of a sweep by what they lack. A run in none of the lists is trained and evaluated, or on its way."""

    train: list[Run] = field(default_factory=list)
    """Neither finished nor in Slurm: missing, failed or cancelled."""
    evaluate_now: list[Run] = field(default_factory=list)
    """Finished."""
    evaluate_after: dict[str, list[Run]] = field(default_factory=dict)
    """In Slurm, without a job to evaluate them, by the id of the training's job."""
    alive: list[str] = field(default_factory=list)
    """Ids of jobs of these runs that wait or run."""
    finished: int = 0

    @property
    def is_empty(self) -> bool:
        return not (self.train or self.evaluate_now or self.evaluate_after)


def find_todo(every: Sequence[Run], evaluation: EvaluateConfig) -> Todo:
    """Compare the runs' folders and Slurm with what a finished sweep has.

    Args:
        every: the sweep's runs.
        evaluation: the settings with which they are to be scored; a score with others does not count.

    Raises:
        UserError: Slurm does not answer.
    """
    todo = Todo()
    lately = {run: _newest_by_stage(submitted([run.folder])) for run in every}
    known, complaints = states([job for jobs in lately.values() for job in jobs.values()])
    if complaints:
        raise UserError(complaints[0])
    for run in every:
        alive = {stage: job.job for stage, job in lately[run].items() if is_alive(known.get(job))}
        todo.alive += alive.values()
        trained = runs.last_step(run.folder) >= run.steps
        if trained and is_evaluated(run, evaluation):
            todo.finished += 1
        elif not trained and "pretrain" not in alive:
            todo.train.append(run)
        elif "evaluate" not in alive:
            if trained:
                todo.evaluate_now.append(run)
            else:
                todo.evaluate_after.setdefault(alive["pretrain"], []).append(run)
    return todo


def is_evaluated(run: Run, evaluation: EvaluateConfig) -> bool:
    """Whether the run's last checkpoint has been scored with these settings."""
    found = find_evaluation(run.folder, evaluation, run.manifest)
    return found is not None and found["step"] >= run.steps


def submit_runs(
    todo: Todo, profile: Profile, evaluate: Sequence[str], longest: int, submit: Submit
) -> Iterator[tuple[str, Run, str]]:
    """Submit what is left: arrays of trainings, and of evaluations that wait for theirs element by element.

    Args:
        todo: of ``find_todo``.
        profile: of a training.
        evaluate: ``key=value`` of the evaluations.
        longest: elements that Slurm takes in one array.
        submit: does it.

    Yields:
        (stage, run, job) for each job, right after it was submitted.
    """

    def evaluations(those: Sequence[Run], dependency: str) -> Iterator[tuple[str, Run, str]]:
        jobs = [Job("tracekin.cli", ("evaluate", str(run.folder), *evaluate)) for run in those]
        ids = submit("evaluate", jobs, profile.of_one_task(), dependency)
        yield from (("evaluate", run, job) for run, job in zip(those, ids, strict=True))

    for part in _parts(todo.train, longest):
        ids = submit("pretrain", [Job("tracekin.cli", ("pretrain", run.config)) for run in part], profile, "")
        yield from (("pretrain", run, job) for run, job in zip(part, ids, strict=True))
        master, element, _ = ids[0].partition("_")
        # Element n waits for element n alone. afterok would wait for the whole array; a lone job is no array.
        yield from evaluations(part, f"{'aftercorr' if element else 'afterok'}:{master}")
    for job, those in todo.evaluate_after.items():
        yield from evaluations(those, f"afterok:{job}")
    for part in _parts(todo.evaluate_now, longest):
        yield from evaluations(part, "")


def _parts(those: Sequence[Run], longest: int) -> Iterator[Sequence[Run]]:
    return (those[start : start + longest] for start in range(0, len(those), longest))


def _newest_by_stage(jobs: Sequence[Submitted]) -> dict[str, Submitted]:
    return {job.stage: job for job in jobs}
