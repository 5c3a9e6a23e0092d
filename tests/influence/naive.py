"""Float64 loops that say what each policy means, and drawn candidates to hold them against."""

from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from tracekin.influence import POLICIES, Candidates, Factors, Pool, gradient_factors, normalised

WIDTHS = ((16, 6), (5, 9), (11, 3))
"""Input and output of each layer: the first is the predictor's last."""


def candidates(
    images: int, *, views: int = 2, layers: int = 1, supports: int = 0, classes: int = 3, seed: int = 0
) -> Candidates:
    """Images in clusters, so that some resemble each other, of groups of about three, multi-label with some empty rows.

    The last fifth are the first fifth's ids and groups once more, as a queue remembers them.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    number = torch.arange(images) % (images - images // 5)
    factors = [gradient_factors(normal(images, views, WIDTHS[0][0]).relu(), *normal(2, images, views, WIDTHS[0][1]))]
    for hidden, out in WIDTHS[1:layers]:
        factors.append(Factors(normal(images, views, hidden).relu(), normal(images, views, out)))
    centres = normal(2, WIDTHS[0][1])[torch.randint(2, (images,), generator=generator)][:, None]
    target, support = (centres + 0.5 * normal(images, count, WIDTHS[0][1]) for count in (views, supports))
    groups = torch.randint(1 + images // 3, (images,), generator=generator)[number]
    labels = (torch.rand(images, classes, generator=generator) < 0.4).to(torch.uint8)
    return Candidates(
        tuple(factors[:layers]),
        target,
        100 + number,
        groups,
        labels,
        support=torch.cat((target, support), 1) if supports else None,
    )


def whole_numbers(images: int, *, layers: int = 1, seed: int = 0) -> Candidates:
    """As ``candidates``, of vectors of zeros and +-1 whose length is 1 or 2: any score of sums, products and cosines is
    exact in fp32, and there are many ties.
    """
    generator = torch.Generator().manual_seed(seed)

    def signs(width: int) -> Tensor:
        order = torch.rand(images, 2, width, generator=generator).argsort(-1)
        ones = (order < (4 if width >= 4 else 1)).float()
        return ones * (torch.randint(0, 2, ones.shape, generator=generator) * 2 - 1)

    factors = tuple(Factors(signs(hidden), signs(out)) for hidden, out in WIDTHS[:layers])
    axes = torch.eye(4)[torch.randint(4, (images, 2), generator=generator)]
    return candidates(images, seed=seed)._replace(factors=factors, target=axes)


def of_policy(policy: str, images: int, seed: int) -> Candidates:
    """Candidates with the gradients that the policy asks for, not normalised, and with views that may vote."""
    layers = {"none": 0, "last": 1, "layers": 3, "checkpoints": 2}[POLICIES[policy].gradients]
    return candidates(images, layers=layers, supports=2, seed=seed)


def as_asked(policy: str, side: Candidates) -> Candidates:
    """Gradients as ``choose`` wants them."""
    return side._replace(factors=normalised(*side.factors)) if POLICIES[policy].normalise else side


def score(policy: str, pool: Pool) -> Tensor:
    """The policy's definition times the columns' weights, [R, C] float64, from gradients that are not normalised."""
    found, weight = DEFINITIONS[policy](pool), pool.columns.weight
    return found if weight is None else found * weight.double()


def influence(pool: Pool, normalise: bool = False) -> Tensor:
    """Inner products, or cosines, of the whole gradients."""
    sides = [torch.cat([materialised(layer) for layer in side.factors], 1) for side in (pool.rows, pool.columns)]
    return cosine(*sides) if normalise else sides[0] @ sides[1].T


def materialised(factors: Factors) -> Tensor:
    """Each image's whole gradient of one layer, a weight matrix and a bias, in one row."""
    hidden_BVH, delta_BVD = (factor.double() for factor in factors)
    weight_BDH = torch.stack(
        [
            sum((torch.outer(d, h) for d, h in zip(*i, strict=True)), torch.zeros(1))
            for i in zip(delta_BVD, hidden_BVH, strict=True)
        ]
    )
    return torch.cat([weight_BDH.flatten(1), delta_BVD.sum(1)], 1)


def cosine(rows: Tensor, columns: Tensor) -> Tensor:
    return F.normalize(rows, dim=1) @ F.normalize(columns, dim=1).T


def feature(rows: Tensor, columns: Tensor) -> Tensor:
    score = torch.zeros(len(rows), len(columns), dtype=torch.float64)
    for u, v in product(range(rows.shape[1]), range(columns.shape[1])):
        score += cosine(rows[:, u].double(), columns[:, v].double())
    return score


def agreement(pool: Pool) -> Tensor:
    look = feature(pool.rows.target, pool.columns.target)
    return influence(pool, normalise=True).clamp(min=0) * look.clamp(min=0)


def votes(support: Tensor, columns: Tensor) -> Tensor:
    """Support views above 0.7, and a tie-break below a vote that grows with their mean cosine."""
    score = torch.zeros(len(support), len(columns), dtype=torch.float64)
    for i, j in product(range(len(support)), range(len(columns))):
        nearest = cosine(support[i].double(), columns[j].double()).amax(1).tolist()
        count = sum(value > 0.7 for value in nearest)
        score[i, j] = count and count + (sum(nearest) / len(nearest) + 1) / 4
    return score


def random(row_ids: Tensor, column_ids: Tensor, seed: int, step: int) -> Tensor:
    """The published SplitMix64 step in Python's unbounded integers."""

    def mix(value: int) -> int:
        value = (value + 0x9E3779B97F4A7C15) % 2**64
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
        return value ^ (value >> 31)

    def number(row: int, column: int) -> float:
        key = mix(mix(mix(row % 2**64) ^ (seed % 2**64)) ^ (step % 2**64))
        return ((mix(key ^ mix(column % 2**64)) >> 40) + 1) / 2**24

    rows = [[number(row, column) for column in column_ids.tolist()] for row in row_ids.tolist()]
    return torch.tensor(rows, dtype=torch.float64)


def same_label(row: Tensor, column: Tensor) -> bool:
    mine, other = set(row.nonzero().flatten().tolist()), set(column.nonzero().flatten().tolist())
    return bool(mine & other) or not (mine or other)


def is_eligible(rows: Candidates, i: int, columns: Candidates, j: int, exclude_group: bool) -> bool:
    if rows.ids[i] == columns.ids[j]:
        return False
    return not (exclude_group and rows.groups[i] == columns.groups[j])


def draws(pool: Pool) -> Tensor:
    return random(pool.rows.ids, pool.columns.ids, pool.seed, pool.step)


def same_group(pool: Pool) -> Tensor:
    """Drawn among those of the group."""
    return draws(pool) * torch.tensor([[float(i == j) for j in pool.columns.groups] for i in pool.rows.groups])


def label_shared(pool: Pool) -> Tensor:
    """Drawn among those that share a label."""
    return draws(pool) * torch.tensor(
        [[float(same_label(i, j)) for j in pool.columns.labels] for i in pool.rows.labels]
    )


DEFINITIONS: dict[str, Callable[[Pool], Tensor]] = {
    **dict.fromkeys(("tracin", "tracin_cp", "ghost"), influence),
    **dict.fromkeys(("tracin_cosine", "tracin_cp_cosine", "ghost_cosine"), partial(influence, normalise=True)),
    "agreement": agreement,
    "feature": lambda pool: feature(pool.rows.target, pool.columns.target),
    "fnc": lambda pool: votes(
        pool.rows.target if pool.rows.support is None else pool.rows.support, pool.columns.target
    ),
    "group": same_group,
    "random": draws,
    "oracle": label_shared,
}
"""What each policy is; a new one has a line here."""
