"""Policies: what makes another image a good positive. One file each; ``config.Policy`` registers their names."""

from collections.abc import Iterable
from importlib import import_module
from typing import get_args

from tracekin.config import Policy as PolicyName
from tracekin.influence.candidates import Block, Candidates, Pool
from tracekin.influence.mining import Best, Mined, Score
from tracekin.influence.policies.policy import Policy

POLICIES: dict[str, Policy] = {
    name: import_module(f"{__name__}.{name}").POLICY for name in get_args(PolicyName) if name != "none"
}


def choose(
    policy: str,
    rows: Candidates,
    blocks: Iterable[Block],
    *,
    seed: int,
    step: int,
    exclude_group: bool,
    k: int = 1,
    chunk: int = 4096,
) -> Mined:
    """Mine k positives a row by the named policy; every policy goes through the same ``mining.Best``.

    Args:
        policy: a key of ``POLICIES``. Where it normalises, the factors of both sides are already ``normalised``.
        rows: my images.
        blocks: all images, in any order; a column's number says where it stands in the pool.
        seed: of the random draws.
        step: of the random draws.
        exclude_group: never choose an image of the row's own group (but by a policy that asks for it).
        k: positives a row.
        chunk: columns scored at a time.

    Raises:
        UserError: oracle without labels; fewer columns than k.
    """
    found = POLICIES[policy]
    exclude = exclude_group and not found.same_group
    best = Best(rows.ids, rows.groups if exclude else None, k=k, chunk=chunk)
    for start, columns in blocks:
        score = weighted(found.score(Pool(rows, columns, seed, step)), columns)
        best.add(score, columns.ids, columns.groups if exclude else None, start)
    return best.mined()


def weighted(score: Score, columns: Candidates) -> Score:
    """The score times the columns' weights."""
    weight = columns.weight
    return score if weight is None else lambda part: score(part) * weight[part]
