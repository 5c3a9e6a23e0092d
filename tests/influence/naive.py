"""Float64 loops that say what each policy means, and drawn candidates to hold them against."""

import torch
from torch import Tensor
from torch.nn import functional as F

from tracekin.influence import Candidates, Factors, gradient_factors


def candidates(
    images: int, *, views: int = 2, hidden: int = 16, out: int = 6, classes: int = 3, seed: int = 0
) -> Candidates:
    """Random images of ids 100, 101, ..., groups of about three, multi-label with some empty rows."""
    generator = torch.Generator().manual_seed(seed)
    h_VBH = torch.randn(views, images, hidden, generator=generator).relu()
    p_VBD, t_VBD = torch.randn(2, views, images, out, generator=generator)
    groups = torch.randint(1 + images // 3, (images,), generator=generator)
    labels = (torch.rand(images, classes, generator=generator) < 0.4).to(torch.uint8)
    return Candidates(gradient_factors(h_VBH, p_VBD, t_VBD), t_VBD, 100 + torch.arange(images), groups, labels)


def some(side: Candidates, part: slice) -> Candidates:
    """The images of ``part``, as one rank holds them."""
    assert side.factors is not None
    factors = Factors(side.factors.hidden[:, part].clone(), side.factors.delta[:, part].clone())
    return Candidates(factors, side.target[:, part].clone(), side.ids[part], side.groups[part], side.labels[part])


def tracin(rows: Factors, columns: Factors) -> Tensor:
    """Inner products of materialised gradients, each a weight matrix and a bias."""
    return gradients(rows) @ gradients(columns).T


def tracin_cosine(rows: Factors, columns: Factors) -> Tensor:
    return F.normalize(gradients(rows), dim=1) @ F.normalize(gradients(columns), dim=1).T


def gradients(factors: Factors) -> Tensor:
    hidden, delta = (factor.double() for factor in factors)
    weight = sum(torch.einsum("bd,bh->bdh", d, h) for d, h in zip(delta, hidden, strict=True))
    return torch.cat([torch.as_tensor(weight).flatten(1), delta.sum(0)], 1)


def feature(rows: Tensor, columns: Tensor) -> Tensor:
    score = torch.zeros(rows.shape[1], columns.shape[1], dtype=torch.float64)
    for row_view in rows.double():
        for column_view in columns.double():
            score += F.cosine_similarity(row_view[:, None], column_view[None], dim=-1)
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


def oracle(rows: Candidates, columns: Candidates, seed: int, step: int) -> Tensor:
    same = [[float(same_label(row, column)) for column in columns.labels] for row in rows.labels]
    return random(rows.ids, columns.ids, seed, step) * torch.tensor(same, dtype=torch.float64)


def is_eligible(rows: Candidates, i: int, columns: Candidates, j: int, exclude_group: bool) -> bool:
    if rows.ids[i] == columns.ids[j]:
        return False
    return not (exclude_group and rows.groups[i] == columns.groups[j])
