"""Scores of many runs put together over training seeds: means with errors, and differences paired by seed.

Runs that differ in their seed alone are a group. The standard error over seeds covers the luck of training (weights,
order, augmentation) and holds the test images fixed; the bootstrap of one run covers the luck of the test images alone.
Everything here is plain numbers: nothing is read or written.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from tracekin.evaluate.metrics import PROBES
from tracekin.evaluate.summary import BASELINES, T_975

# What an untrained encoder and the image shrunk to pixels depend on, the seed apart.
ENCODER_KEYS = ("model.", "data.image_size", "data.channels")
PIXEL_KEYS = ENCODER_KEYS[1:]
Assignment = Mapping[str, Any]


class Score(NamedTuple):
    """One run's score and its bootstrap standard error over groups of test images."""

    value: float
    error: float


class Estimate(NamedTuple):
    """A mean over seeds, or a single run's value."""

    mean: float
    error: float | None
    """Standard error; None for a difference of one seed, which says nothing of the next."""
    interval: tuple[float, float] | None
    """Student's t, 95 %; None for one seed."""
    num_seeds: int

    @property
    def excludes_zero(self) -> bool:
        return self.interval is not None and (self.interval[0] > 0 or self.interval[1] < 0)


@dataclass(frozen=True)
class Result:
    """What one evaluated run showed."""

    assignment: Assignment
    """Grid key -> value, the seed left out."""
    seed: int
    scoring: str
    """Names the dataset and every setting of the evaluation: only scores of one scoring are compared."""
    scores: Mapping[str, Score]
    """By probe; a probe without a defined score is absent."""
    baselines: Mapping[str, Mapping[str, Score]] = field(default_factory=dict)
    """By baseline and probe."""
    rates: Mapping[str, float | None] = field(default_factory=dict)
    """Hit rate, chance rate, images a second."""


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone, or a baseline."""

    assignment: Assignment
    estimates: Mapping[str, Estimate]
    """By probe."""
    num_seeds: int
    baseline: str = ""
    rates: Mapping[str, float | None] = field(default_factory=dict)
    differences: Mapping[str, Estimate] = field(default_factory=dict)
    """By probe: this group minus its control, over the seeds that both have."""


def over_seeds(scores: Sequence[Score]) -> Estimate:
    """Mean over seeds with its standard error and interval; of one score, itself with its bootstrap error."""
    if len(scores) == 1:
        return Estimate(scores[0].value, scores[0].error, None, 1)
    return _mean([score.value for score in scores])


def paired(first: Mapping[int, Score], second: Mapping[int, Score]) -> Estimate | None:
    """First minus second over the seeds in both, each seed's difference being one observation; None without any."""
    differences = [first[seed].value - second[seed].value for seed in sorted(first.keys() & second.keys())]
    return _mean(differences) if differences else None


def t_975(degrees: int) -> float:
    """Student's t, 97.5 %: a table up to 9 degrees of freedom, above it Fisher and Cornish's expansion (to 0.0001)."""
    if degrees <= len(T_975):
        return T_975[degrees - 1]
    z = 1.959964
    return (
        z
        + (z**3 + z) / (4 * degrees)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3)
    )


def groups_of(results: Sequence[Result]) -> list[Group]:
    """Results of one scoring as groups: baselines first, then in the order in which they are met.

    The control of a group is the one with mining.policy=none and otherwise the same values, where there is one; keys of
    mining do nothing without a policy, so they may differ.
    """
    assert len({result.scoring for result in results}) <= 1
    by_group = _by_assignment(results)
    groups = []
    for members in by_group.values():
        assignment = members[0].assignment
        control = _control(assignment, by_group)
        found = {probe: paired(_of(members, probe), _of(control, probe)) for probe in PROBES} if control else {}
        differences = {probe: estimate for probe, estimate in found.items() if estimate}
        rates = {key: _mean_of([member.rates.get(key) for member in members]) for key in members[0].rates}
        groups.append(Group(assignment, _estimates(members), len(members), "", rates, differences))
    return [*_baselines(results), *groups]


def _mean(values: Sequence[float]) -> Estimate:
    count, mean = len(values), float(np.mean(values))
    if count == 1:
        return Estimate(mean, None, None, 1)
    error = float(np.std(values, ddof=1)) / math.sqrt(count)
    half = t_975(count - 1) * error
    return Estimate(mean, error, (mean - half, mean + half), count)


def _mean_of(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _by_assignment(results: Sequence[Result]) -> dict[str, list[Result]]:
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(_key(result.assignment), []).append(result)
    return found


def _key(assignment: Assignment) -> str:
    return repr(sorted(assignment.items()))


def _of(members: Sequence[Result], probe: str) -> dict[int, Score]:
    return {member.seed: member.scores[probe] for member in members if probe in member.scores}


def _estimates(members: Sequence[Result]) -> dict[str, Estimate]:
    scores = {probe: list(_of(members, probe).values()) for probe in PROBES}
    return {probe: over_seeds(found) for probe, found in scores.items() if found}


def _control(assignment: Assignment, by_group: Mapping[str, Sequence[Result]]) -> Sequence[Result]:
    """Results without mining beside an assignment of another policy; empty if there are none."""
    if assignment.get("mining.policy", "none") == "none":
        return []
    exact = by_group.get(_key({**assignment, "mining.policy": "none"}))
    if exact:
        return exact
    wanted = _key(_without_mining(assignment))
    return next(
        (
            members
            for members in by_group.values()
            if members[0].assignment.get("mining.policy") == "none"
            and _key(_without_mining(members[0].assignment)) == wanted
        ),
        [],
    )


def _without_mining(assignment: Assignment) -> Assignment:
    return {key: value for key, value in assignment.items() if not key.startswith("mining.")}


def _baselines(results: Sequence[Result]) -> list[Group]:
    """Each distinct baseline once, the untrained encoder as a mean over its seeds."""
    groups = []
    for name in BASELINES:
        prefixes = PIXEL_KEYS if name == "pixels" else ENCODER_KEYS
        scored: dict[tuple[str, int], Result] = {}
        for result in results:
            if name in result.baselines:
                kept = {key: value for key, value in result.assignment.items() if key.startswith(prefixes)}
                seed = 0 if name == "pixels" else result.seed
                baseline = Result(kept, seed, result.scoring, result.baselines[name])
                scored.setdefault((_key(kept), seed), baseline)  # a seed's runs of several policies score it alike
        for members in _by_assignment(list(scored.values())).values():
            groups.append(Group(members[0].assignment, _estimates(members), len(members), name))
    return groups
