"""Scores of predicted probabilities, and their uncertainty by a bootstrap over groups (patients, lesions).

Images of one group are not independent, so whole groups are drawn with replacement (cluster bootstrap). A replicate
is a vector of image weights; every score is computed for all replicates at once.

Shape suffixes: R replicates, N images, L classes.
"""

import warnings
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

PROBES = ("knn", "linear")
METRICS = ("accuracy", "balanced_accuracy", "macro_auc")
_CHUNK = 500_000  # weights a block of replicates; bounds the memory of the cumulative sums of the AUC


class Estimate(TypedDict):
    """A score with its bootstrap standard error and 95 % percentile interval."""

    value: float
    standard_error: float
    interval: list[float]


def point(probability_NL: NDArray[np.float32], label_NL: NDArray[np.bool_], *, multilabel: bool) -> dict[str, float]:
    """The scores themselves, by name; NaN where one is undefined. See ``scores``."""
    once = np.ones((1, len(label_NL)), np.float32)
    value = scores(probability_NL, label_NL, once, multilabel=multilabel)
    return {name: float(value_R[0]) for name, value_R in value.items()}


def estimates(
    probability_NL: NDArray[np.float32],
    label_NL: NDArray[np.bool_],
    group_N: NDArray[np.int64],
    *,
    multilabel: bool,
    replicates: int,
    seed: int,
) -> dict[str, Estimate | None]:
    """Every score with its uncertainty; None where it is undefined (no image with, or none without, any class)."""
    value = point(probability_NL, label_NL, multilabel=multilabel)
    drawn = _bootstrap(probability_NL, label_NL, group_N, multilabel, replicates, seed)
    return {name: _estimate(value[name], drawn[name]) if name in value else None for name in METRICS}


def paired_difference(
    first_NL: NDArray[np.float32],
    second_NL: NDArray[np.float32],
    label_NL: NDArray[np.bool_],
    group_N: NDArray[np.int64],
    *,
    metric: str,
    multilabel: bool,
    replicates: int,
    seed: int,
) -> Estimate | None:
    """First method minus second on the same images, both under the same replicates: shared luck cancels."""
    both = (first_NL, second_NL)
    value = [point(p, label_NL, multilabel=multilabel)[metric] for p in both]
    drawn = [_bootstrap(p, label_NL, group_N, multilabel, replicates, seed)[metric] for p in both]
    return _estimate(value[0] - value[1], drawn[0] - drawn[1])


def scores(
    probability_NL: NDArray[np.float32],
    label_NL: NDArray[np.bool_],
    weight_RN: NDArray[np.float32],
    *,
    multilabel: bool,
) -> dict[str, NDArray[np.float64]]:
    """Scores [R] of weighted images.

    ``accuracy``; ``balanced_accuracy``, the mean recall over the classes present (ISIC's balanced multi-class
    accuracy); ``macro_auc``, the mean over classes of one-versus-rest ROC AUC. Multi-label has the last alone, a
    prediction there being no choice of one class.
    """
    result = {"macro_auc": _macro_auc(probability_NL, label_NL, weight_RN)}
    if not multilabel:
        correct_N = probability_NL.argmax(1) == label_NL.argmax(1)
        total_RL = weight_RN.astype(np.float64) @ label_NL
        hit_RL = weight_RN.astype(np.float64) @ (label_NL & correct_N[:, None])
        result["accuracy"] = hit_RL.sum(1) / total_RL.sum(1)
        result["balanced_accuracy"] = _mean_of_defined(hit_RL, total_RL)
    return result


def group_weights(group_N: NDArray[np.int64], replicates: int, seed: int) -> NDArray[np.float32]:
    """How often each image is drawn in each replicate, [R, N]: as often as its group, of G draws out of G groups."""
    _, position_N = np.unique(group_N, return_inverse=True)
    num_groups = int(position_N.max()) + 1
    chance_G = np.full(num_groups, 1 / num_groups)
    counts_RG = np.random.default_rng(seed).multinomial(num_groups, chance_G, size=replicates)
    return counts_RG.astype(np.float32)[:, position_N]


def _bootstrap(
    probability_NL: NDArray[np.float32],
    label_NL: NDArray[np.bool_],
    group_N: NDArray[np.int64],
    multilabel: bool,
    replicates: int,
    seed: int,
) -> dict[str, NDArray[np.float64]]:
    weight_RN = group_weights(group_N, replicates, seed)
    blocks = np.array_split(weight_RN, max(1, weight_RN.size // _CHUNK))
    drawn = [scores(probability_NL, label_NL, block, multilabel=multilabel) for block in blocks]
    return {name: np.concatenate([block[name] for block in drawn]) for name in drawn[0]}


def _macro_auc(
    probability_NL: NDArray[np.float32], label_NL: NDArray[np.bool_], weight_RN: NDArray[np.float32]
) -> NDArray[np.float64]:
    """AUC = P(score of a positive > of a negative) + half of P(equal), from one sort a class and cumulative weights."""
    won, pairs = [], []
    for score_N, positive_N in zip(probability_NL.T, label_NL.T, strict=True):
        order = score_N.argsort(kind="stable")
        starts = np.flatnonzero(np.diff(score_N[order], prepend=-np.inf))  # first of each run of equal scores
        weight = weight_RN[:, order].astype(np.float64)
        positive = np.add.reduceat(weight * positive_N[order], starts, axis=1)
        negative = np.add.reduceat(weight * ~positive_N[order], starts, axis=1)
        won.append((positive * (negative.cumsum(1) - negative / 2)).sum(1))
        pairs.append(positive.sum(1) * negative.sum(1))
    return _mean_of_defined(np.stack(won, 1), np.stack(pairs, 1))


def _mean_of_defined(part_RL: NDArray[np.float64], whole_RL: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over classes of part / whole, leaving out classes that have no whole; NaN if none has."""
    with np.errstate(invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.asarray(np.nanmean(part_RL / whole_RL, axis=1))


def _estimate(value: float, drawn_R: NDArray[np.float64]) -> Estimate | None:
    drawn = drawn_R[~np.isnan(drawn_R)]
    if np.isnan(value) or len(drawn) == 0:
        return None
    error = float(drawn.std(ddof=1)) if len(drawn) > 1 else 0.0
    low, high = np.percentile(drawn, (2.5, 97.5))
    return Estimate(value=float(value), standard_error=error, interval=[float(low), float(high)])
