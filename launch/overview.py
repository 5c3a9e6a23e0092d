"""How far each run is: its newest job's state joined with what lies in its folder."""

import itertools
import math
import statistics
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from launch import jobs, runs
from launch.jobs import Submitted, is_alive, last_end, starts_of
from launch.slurm import Info

PATIENCE = 120.0
"""Seconds without a line of metrics after which a running run may be called stalled."""
NUM_USUAL = 20
"""Newest lines of metrics that tell what is usual."""
_ENDED = {"TIMEOUT": "timeout", "OUT_OF_MEMORY": "no memory", "NODE_FAIL": "node lost", "CANCELLED": "cancelled"}


class Row(NamedTuple):
    """A run as the table shows it; None where nothing is known."""

    folder: Path
    job: str
    state: str
    """finished, running, stalled, pending, requeued, unknown, ended (neither failed nor finished), cancelled, ..."""
    reason: str
    """What a failed run died of, or why a pending one waits."""
    step: int
    total: int | None
    loss: float | None
    hit_rate: float | None
    images_per_second: float | None
    restarts: int
    age: float | None
    """Seconds since the last line of metrics."""
    eta: float | None
    """Seconds to the last step."""
    evaluation: str
    alive: bool
    """Whether a job of the run, evaluation included, is still to run or running."""


class Other(NamedTuple):
    """The newest jobs of a stage that belong to no single run: a sweep's table, a packing."""

    folder: Path
    stage: str
    job: str
    counts: dict[str, int]


class Newest(NamedTuple):
    """The newest job of each stage of one folder; of an array that works on one folder, all of it."""

    folder: Path
    stages: dict[str, list[Submitted]]
    time: str

    @property
    def is_run(self) -> bool:
        return not self.stages or bool(self.stages.keys() & {"pretrain", "evaluate"})


def newest(folder: Path) -> Newest:
    """What to ask about a folder."""
    stages: dict[str, list[Submitted]] = {}
    lines = jobs.submitted([folder])
    for line in lines:
        held = stages.get(line.stage)
        if held and held[0].job.partition("_")[0] == line.job.partition("_")[0] and line not in held:
            held.append(line)
        else:
            stages[line.stage] = [line]
    return Newest(folder, stages, lines[-1].time if lines else "")


def row(asked: Newest, known: dict[Submitted, Info], brief: bool = False) -> Row:
    """A run's row, from the states of its jobs and its files; ``brief`` spares the metrics of what is over."""
    folder, now = asked.folder, time.time()
    submitted = _last(asked, "pretrain")
    info = known.get(submitted) if submitted else None
    lines = [] if brief and not is_alive(info) else runs.metrics(folder, NUM_USUAL)
    last: dict[str, Any] = lines[-1] if lines else {}
    total = runs.num_steps(folder)
    finished = runs.is_finished(folder)
    step = total if finished and total else max(int(last.get("step", 0)), runs.last_step(folder))
    age = _age(folder, last, now)
    state, reason = _state(submitted, info, finished)
    if state == "running" and info and submitted and _is_stalled(lines, age, info, submitted, now):
        state = "stalled"
    evaluated = _last(asked, "evaluate")
    return Row(
        folder=folder,
        job=submitted.job if submitted else "-",
        state=state,
        reason=reason,
        step=step,
        total=total,
        loss=last.get("loss"),
        hit_rate=last.get("hit_rate"),
        images_per_second=last.get("images_per_second"),
        restarts=_restarts(submitted, info),
        age=age,
        eta=_seconds_a_step(lines) * (total - step) if state == "running" and total and lines else None,
        evaluation=_evaluation(folder, evaluated, known),
        alive=is_alive(info) or (evaluated is not None and is_alive(known.get(evaluated))),
    )


def others(asked: Newest, known: dict[Submitted, Info]) -> list[Other]:
    """The stages of a folder that is no run."""
    found = []
    for stage, submitted in asked.stages.items():
        if stage not in ("pretrain", "evaluate"):
            counts: dict[str, int] = {}
            for job in submitted:
                state = known[job].state.lower() if job in known else "unknown"
                counts[state] = counts.get(state, 0) + 1
            name = submitted[0].job if len(submitted) == 1 else submitted[0].job.partition("_")[0]
            found.append(Other(asked.folder, stage, name, counts))
    return found


def seconds(elapsed: str) -> float:
    """Slurm's ``[DAYS-][HH:]MM:SS`` in seconds; infinite where it says nothing."""
    days, _, clock = elapsed.rpartition("-")
    try:
        total = 86400.0 * int(days or 0)
        for place, part in enumerate(reversed(clock.split(":"))):
            total += int(part) * 60.0**place
    except ValueError:
        return math.inf
    return total


def _last(asked: Newest, stage: str) -> Submitted | None:
    held = asked.stages.get(stage)
    return held[-1] if held else None


def _state(submitted: Submitted | None, info: Info | None, finished: bool) -> tuple[str, str]:
    """One word, and what is to be said with it."""
    if finished and not is_alive(info):
        return "finished", ""
    if submitted is None:
        return "-", ""
    if info is None:
        return "unknown", ""
    if info.state == "PENDING":
        return ("requeued" if info.restarts else "pending"), info.reason
    if is_alive(info):
        return ("running" if info.state in ("RUNNING", "COMPLETING") else info.state.lower()), ""
    cause = str(last_end(submitted).get("cause", ""))
    if info.state == "COMPLETED":
        return "ended", cause or "the job ended well, but the run is not finished"
    if info.state == "FAILED":
        code, _, number = info.exit_code.partition(":")
        code = f"killed by signal {number}" if number not in ("", "0") else f"exit code {code}" if code else ""
        return "failed", cause or code
    if info.state == "ENDED":
        return "failed", cause or "killed, or it never started"
    return _ENDED.get(info.state, info.state.lower()), "" if info.state == "CANCELLED" else cause


def _age(folder: Path, last: dict[str, Any], now: float) -> float | None:
    if not last:
        return None
    try:
        written = float(last.get("time") or (folder / "metrics.jsonl").stat().st_mtime)
    except (OSError, TypeError, ValueError):
        return None
    return max(0.0, now - written)


def _is_stalled(
    lines: Sequence[dict[str, Any]], age: float | None, info: Info, submitted: Submitted, now: float
) -> bool:
    """Whether it said nothing for far longer than usual; a start makes the clock begin anew."""
    begun = seconds(info.elapsed)
    if math.isinf(begun):  # nobody counts for a local job
        times = [line["time"] for line in starts_of(submitted) if line.get("event") == "start"] or [submitted.time]
        begun = now - datetime.fromisoformat(times[-1]).timestamp()
    quiet = begun if age is None else min(age, begun)
    return quiet > max(PATIENCE, 10 * _interval(lines))


def _interval(lines: Sequence[dict[str, Any]]) -> float:
    """Seconds between two lines of metrics as they usually are; 0 where nothing is known."""
    gaps = [(b.get("step", 0) - a.get("step", 0)) for a, b in itertools.pairwise(lines)]
    if not gaps:
        gaps = [lines[0].get("step", 0)] if lines else [0]
    return float(statistics.median(gaps)) * _seconds_a_step(lines)


def _seconds_a_step(lines: Sequence[dict[str, Any]]) -> float:
    known = [line["step_seconds"] for line in lines if line.get("step_seconds")]
    return float(statistics.median(known)) if known else 0.0


def _restarts(submitted: Submitted | None, info: Info | None) -> int:
    """By whoever knows more: Slurm forgets, and a start that died early wrote nothing."""
    if submitted is None:
        return 0
    written = [int(line.get("restart", 0)) for line in starts_of(submitted)]
    return max([*written, info.restarts if info else 0])


def _evaluation(folder: Path, submitted: Submitted | None, known: dict[Submitted, Info]) -> str:
    info = known.get(submitted) if submitted else None
    if info is not None and is_alive(info):
        return "queued" if info.state == "PENDING" else "running"
    scored = any((folder / "evaluations").glob("*.json"))
    if info is None or info.state == "ENDED":  # only its files can tell
        return "done" if scored else "unknown" if submitted else "-"
    if info.state == "CANCELLED" and info.reason.startswith("Dependency"):
        return "-"  # of a run that never finished
    return {"COMPLETED": "done", "CANCELLED": "cancelled"}.get(info.state, "failed")
