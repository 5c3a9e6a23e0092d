"""How good choices of positives are, over several batches of one pool size, with errors that respect the batches.

Shape suffixes: N batches, P images of a pool, L classes.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tracekin.data.batch import Batch
from tracekin.influence.diagnostics import agreement, score_gap
from tracekin.influence.mining import Mined, eligible, mine
from tracekin.influence.selection import keep_above, keep_mutual
from tracekin.influence.similarity import shares_label

CONTROLS = frozenset({"random", "oracle", "group"})
"""Never preferred: blind, or in need of more than images."""


class Images(NamedTuple):
    """The study's images, drawn once, and who may choose whom."""

    batches: list[Batch]
    exclude_group: bool
    allowed: Tensor
    """[N, P, P] bool: the columns that a row may choose."""
    sharing: Tensor
    """[N, P, P] bool: a label in common, or neither has one."""
    classes: Tensor
    """[N, P, L] 0 or 1; the last is 1 for images without a label."""


class Chosen(NamedTuple):
    """One score's choices on all batches, [N, P] each; NaN where nothing was chosen."""

    column: Tensor
    """int64, -1 where nothing was chosen."""
    score: Tensor
    gap: Tensor
    """(first - second) / first."""
    hit: Tensor
    """1 if the chosen column shares the anchor's label, else 0."""


class Visit(NamedTuple):
    """What was chosen under one checkpoint's networks."""

    epoch: float
    mined: dict[str, list[Mined]]
    """By policy and batch, two columns a row."""
    policies: dict[str, Chosen]
    without: dict[str, Chosen]
    """Raw TracIn with one suspect removed."""
    causes: dict[str, float]
    """Means over batches."""


def compare_images(batches: list[Batch], exclude_group: bool) -> Images:
    allowed, sharing = [], []
    for batch in batches:
        groups = batch.group if exclude_group else None
        allowed.append(eligible(batch.index, batch.index, groups, groups, slice(0, len(batch.index))))
        sharing.append(shares_label(batch.label, batch.label))
    label_NPL = torch.stack([batch.label for batch in batches])
    classes = torch.cat([label_NPL, (label_NPL.sum(-1, keepdim=True) == 0).float()], -1)
    return Images(batches, exclude_group, torch.stack(allowed), torch.stack(sharing), classes)


def mine_matrix(score_PP: Tensor, batch: Batch, exclude_group: bool) -> Mined:
    """The two best columns of each image by any scores; of their unit mining's fp32 need not know."""
    score_PP = score_PP / score_PP.abs().max().clamp_min(1e-300)
    groups = batch.group if exclude_group else None
    return mine(lambda part: score_PP[:, part], batch.index, batch.index, groups, groups, k=2)


def in_degrees(mined: Mined) -> Tensor:
    """[P] how often each column is some row's best."""
    return torch.bincount(mined.index[:, 0] + 1, minlength=len(mined.index) + 1)[1:]


def judge(mined: Sequence[Mined], images: Images) -> Chosen:
    """The best column of each anchor, two mined a row, and whether it shares the label."""
    column, score = (torch.stack([one[part][:, 0] for one in mined]) for part in (0, 1))
    gap = torch.stack([score_gap(one.score) for one in mined])
    hit = images.sharing.gather(2, column.clamp_min(0)[..., None])[..., 0].float()
    return Chosen(column, *(part.where(column >= 0, torch.nan) for part in (score, gap, hit)))


def chance(images: Images) -> Tensor:
    """[N, P] share of each anchor's eligible columns that share its label; NaN where none is eligible."""
    return (images.allowed & images.sharing).sum(2) / images.allowed.sum(2)


def micro(value_NP: Tensor) -> float:
    """Mean over anchors; NaN ones do not count."""
    return float(value_NP.nanmean())


def macro(value_NP: Tensor, classes_NPL: Tensor) -> float:
    """Mean over classes of the mean over a class's anchors; NaN anchors and classes without any do not count."""
    weight_NPL = classes_NPL * ~value_NP.isnan()[..., None]
    count_L = weight_NPL.sum((0, 1))
    mean_L = (weight_NPL * value_NP.nan_to_num()[..., None]).sum((0, 1)) / count_L
    return float(mean_L[count_L > 0].mean())


def jackknife(statistic: Callable[[Tensor], Any], num: int) -> tuple[Any, Any]:
    """A statistic of all batches, and its standard error by leaving one batch out at a time; NaN from a single batch.

    Images of a batch compete for the same columns, so that batches are independent and anchors are not.

    Args:
        statistic: number or array from the batches' numbers, [N or N - 1] int64.
        num: batches.
    """
    every = torch.arange(num)
    whole = statistic(every)
    if num == 1:
        return whole, whole * np.nan
    left = np.array([statistic(every[every != n]) for n in range(num)])
    return whole, np.sqrt((num - 1) * left.var(0))


def hubs(chosen: Chosen) -> dict[str, float]:
    """Means over batches of what the most chosen columns take.

    Returns:
        ``degree``: anchors of the most chosen column; ``hub``: share of the anchors that the most chosen 1 % of columns
        hold, and ``hub_hit``: their hit rate (micro); ``distinct``: different columns over anchors.
    """
    pool = chosen.column.shape[1]
    found: dict[str, list[float]] = {"degree": [], "hub": [], "distinct": []}
    hits = []
    for column_P, hit_P in zip(chosen.column, chosen.hit, strict=True):
        degree_P, columns_P = torch.bincount(column_P[column_P >= 0], minlength=pool).sort(descending=True, stable=True)
        top_P = torch.isin(column_P, columns_P[: -(-pool // 100)])
        anchors = max(int(degree_P.sum()), 1)
        for key, value in zip(found, (degree_P[0], top_P.sum() / anchors, (degree_P > 0).sum() / anchors), strict=True):
            found[key].append(float(value))
        hits.append(hit_P[top_P])
    return {**{key: float(np.mean(values)) for key, values in found.items()}, "hub_hit": micro(torch.cat(hits))}


def measure(chosen: Chosen, images: Images) -> dict[str, float]:
    """Everything that a line of the study's table says of one score at one checkpoint."""
    num, pool = chosen.column.shape
    chance_NP = chance(images).where(chosen.column >= 0, torch.nan)
    hit, hit_se = jackknife(lambda keep: micro(chosen.hit[keep]), num)
    mean, mean_se = jackknife(lambda keep: macro(chosen.hit[keep], images.classes[keep]), num)
    top_NK = chosen.score.nan_to_num(-torch.inf).topk(-(-pool // 10)).indices
    return {
        "hit": hit,
        "hit_se": hit_se,
        "chance": micro(chance_NP),
        "macro": mean,
        "macro_se": mean_se,
        "macro_chance": macro(chance_NP, images.classes),
        "top": micro(chosen.hit.gather(1, top_NK)),
        "top_chance": micro(chance_NP.gather(1, top_NK)),
        "masked": float((chosen.column < 0).float().mean()),
        "gap": float(chosen.gap.nanmedian()),
        **hubs(chosen),
    }


def slope(visits: list[Visit], name: str, part: str) -> tuple[float, float]:
    """Least-squares change of a score's hit rate in 10 epochs, and its standard error: below 0 it falls."""
    if len(visits) < 2:
        return np.nan, np.nan
    epochs = [one.epoch for one in visits]
    hits = [getattr(one, part)[name].hit for one in visits]
    return jackknife(lambda keep: 10 * np.polyfit(epochs, [micro(hit[keep]) for hit in hits], 1)[0], len(hits[0]))


def late_hits(visits: list[Visit], images: Images) -> Callable[[Tensor], Any]:
    """Statistic [policies, 2]: micro and macro hit, mean over the last half of the checkpoints."""
    half = [one.policies.values() for one in visits[len(visits) // 2 :]]

    def statistic(keep: Tensor) -> Any:
        classes = images.classes[keep]
        return np.mean([[(micro(c.hit[keep]), macro(c.hit[keep], classes)) for c in one] for one in half], 0)

    return statistic


def prefer(visits: list[Visit], images: Images) -> dict[str, Any]:
    """The preferred policy, its lead over each other on the same anchors, and those it leads by under two errors."""
    names, statistic, num = list(visits[-1].policies), late_hits(visits, images), len(images.batches)
    value = statistic(torch.arange(num))
    blind = macro(chance(images), images.classes)
    choices = [n for n, name in enumerate(names) if name not in CONTROLS] or [*range(len(names))]
    best = max(choices, key=lambda n: value[n, 1])
    lead, error = jackknife(lambda keep: (found := statistic(keep))[best] - found, num)
    keys = ("hit", "macro", "hit_lead", "macro_lead", "hit_lead_se", "macro_lead_se")
    rows = np.concatenate([value, lead, error], 1).tolist()
    late_half = {name: dict(zip(keys, row, strict=True)) for name, row in zip(names, rows, strict=True)}
    tied = [names[n] for n in choices if n != best and not lead[n, 1] >= 2 * error[n, 1]]
    ratio = value[best, 1] / blind
    return {"late_half": late_half, "preferred": names[best], "tied": tied, "macro_chance": blind, "ratio": ratio}


def selections(last: Visit, images: Images) -> dict[str, dict[str, dict[str, float]]]:
    """Each policy's measures if only mutual choices stay, or only those whose score is above the median."""
    pick: dict[str, Callable[[Mined], Mined]] = {
        "mutual": lambda one: keep_mutual(one, one.index[:, :1], 0),
        "above median": lambda one: keep_above(one, one.score[:, :1], 0.5),
    }
    return {
        name: {how: measure(judge([*map(keep, mined)], images), images) for how, keep in pick.items()}
        for name, mined in last.mined.items()
    }


def agreements(last: Visit) -> dict[str, list[float]]:
    """Share of anchors for which two policies chose the same column, in the order of the policies."""

    def share(one: list[Mined], other: list[Mined]) -> float:
        return micro(torch.stack([agreement(*pair) for pair in zip(one, other, strict=True)]))

    return {name: [share(one, other) for other in last.mined.values()] for name, one in last.mined.items()}
