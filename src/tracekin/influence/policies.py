"""Policies: what makes another image a good positive. One small function and one line of ``POLICIES`` each.

A policy prepares what it can once and returns the chunk-wise score that ``mine`` streams over.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from tracekin.config import UserError
from tracekin.influence.gradients import Factors, normalised
from tracekin.influence.mining import Mined, Score, mine
from tracekin.influence.similarity import pairwise_feature, pairwise_random, pairwise_tracin, shares_label


class Candidates(NamedTuple):
    """What is known of one side, the rows (my images) or the columns (all images). V views, B images, L labels."""

    factors: Factors | None
    """Gradient factors; may be None for the policies that are not in USES_FACTORS, and then need no gathering."""
    target: Tensor
    """[V, B, D] target projections."""
    ids: Tensor
    """[B] int64, one a sample of the dataset."""
    groups: Tensor
    """[B] int64, one a patient or lesion."""
    labels: Tensor
    """[B, L] multi-hot; L = 0 if the dataset has none."""


class Pool(NamedTuple):
    """Both sides, and what the random draws hang on."""

    rows: Candidates
    columns: Candidates
    seed: int
    step: int


def tracin(pool: Pool) -> Score:
    """Inner product of per-sample gradients."""
    return _tracin(*_factors(pool))


def tracin_cosine(pool: Pool) -> Score:
    """Cosine of per-sample gradients: large norms have no advantage."""
    rows, columns = _factors(pool)
    return _tracin(normalised(rows), normalised(columns))


def feature(pool: Pool) -> Score:
    """Cosine of target projections, summed over the pairs of views."""
    return lambda part: pairwise_feature(pool.rows.target, pool.columns.target[:, part])


def random(pool: Pool) -> Score:
    """Any eligible image, drawn uniformly."""
    return lambda part: pairwise_random(pool.rows.ids, pool.columns.ids[part], pool.seed, pool.step)


def oracle(pool: Pool) -> Score:
    """An eligible image of the same label, drawn uniformly: an upper bound, as it sees the labels."""
    if pool.rows.labels.shape[1] == 0:
        raise UserError("mining.policy=oracle needs labels, and this dataset has none; choose another mining.policy.")
    draw = random(pool)
    return lambda part: draw(part) * shares_label(pool.rows.labels, pool.columns.labels[part])


POLICIES: dict[str, Callable[[Pool], Score]] = {
    "tracin": tracin,
    "tracin_cosine": tracin_cosine,
    "feature": feature,
    "random": random,
    "oracle": oracle,
}
USES_FACTORS = frozenset({"tracin", "tracin_cosine"})


def choose(
    policy: str,
    rows: Candidates,
    columns: Candidates,
    *,
    seed: int,
    step: int,
    exclude_group: bool,
    k: int = 1,
    chunk: int = 4096,
) -> Mined:
    """Mine k positives a row by the named policy; every policy goes through the same ``mine``.

    Args:
        policy: a key of ``POLICIES``.
        rows: my images.
        columns: all images, in the order of the global batch.
        seed: of the random draws.
        step: of the random draws.
        exclude_group: never choose an image of the row's own group.
        k: positives a row.
        chunk: columns scored at a time.

    Raises:
        UserError: oracle without labels; fewer columns than k.
    """
    score = POLICIES[policy](Pool(rows, columns, seed, step))
    groups = (rows.groups, columns.groups) if exclude_group else (None, None)
    return mine(score, rows.ids, columns.ids, *groups, k=k, chunk=chunk)


def _factors(pool: Pool) -> tuple[Factors, Factors]:
    assert pool.rows.factors is not None
    assert pool.columns.factors is not None
    return pool.rows.factors, pool.columns.factors


def _tracin(rows: Factors, columns: Factors) -> Score:
    return lambda part: pairwise_tracin(rows, Factors(columns.hidden[:, part], columns.delta[:, part]))
