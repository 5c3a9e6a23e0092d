"""Why a score picks what it picks: the parts of per-sample gradients, taken away one by one, on dense [P, P] matrices.

A study's functions and no hot path: everything is float64 and quadratic in the pool. Influence is a sum over views of
products of two Gram matrices, M_ij = sum over u, v of H_iujv D_iujv, so that taking a norm or a mean direction from
either factor is arithmetic on its Gram matrix alone.

Shape suffixes: P images of the pool, V views.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tracekin.influence.gradients import Factors


class Grams(NamedTuple):
    """Inner products of the two factors between all views of all images, float64."""

    hidden: Tensor
    """[P, V, P, V], h . h + 1: the activations with the constant input that the bias sees."""
    delta: Tensor
    """[P, V, P, V]."""


def gram_matrices(factors: Factors) -> Grams:
    hidden, delta = (factor.double() for factor in factors)
    return Grams(torch.einsum("iuh,jvh->iujv", hidden, hidden) + 1, torch.einsum("iud,jvd->iujv", delta, delta))


def influence(hidden: Tensor, delta: Tensor) -> Tensor:
    """[P, P] scores from the factors' Gram matrices."""
    return (hidden * delta).sum((1, 3))


def lengths(gram: Tensor) -> Tensor:
    """Lengths of the vectors behind a Gram matrix [P, P] or [P, V, P, V]: [P] or [P, V]."""
    size = gram.shape[: gram.dim() // 2]
    return gram.reshape(size.numel(), -1).diagonal().clamp_min(0).sqrt().view(size)


def rescaled(gram: Tensor, scale: Tensor) -> Tensor:
    """The Gram matrix after each vector is multiplied by its number in ``scale``."""
    flat = scale.flatten()
    return gram * torch.outer(flat, flat).view(gram.shape)


def at_unit_length(gram: Tensor) -> Tensor:
    """The Gram matrix of the same vectors at length 1: cosines; vectors of no length stay 0."""
    return rescaled(gram, inverse(lengths(gram)))


def centred(gram: Tensor) -> Tensor:
    """The Gram matrix after the mean of all vectors is subtracted from each."""
    flat = gram.reshape(gram.shape[: gram.dim() // 2].numel(), -1)
    return (flat - flat.mean(0) - flat.mean(1, keepdim=True) + flat.mean()).view(gram.shape)


def inverse(values: Tensor) -> Tensor:
    return torch.where(values > 0, 1 / values, 0)


def eliminations(grams: Grams, prediction: Tensor) -> dict[str, Tensor]:
    """Scores [P, P] that each lack one suspect of raw TracIn; the hit rate that rises names the culprit.

    Along the way from p to the gradient, |delta| = 2 sin(p, t) / |p|, so that norm has two suspects of its own.

    Args:
        grams: of the pool's factors.
        prediction: [P, V, D].
    """
    hidden, delta = grams
    p_PV = torch.linalg.vector_norm(prediction.double(), dim=-1)
    sine_PV = lengths(delta) * p_PV / 2
    score = influence(hidden, delta)
    return {
        "tracin": score,
        "|g| only": lengths(score).expand_as(score),  # of the column: the same ranking for every row
        "no |h|": influence(at_unit_length(hidden), delta),
        "no |delta|": influence(hidden, at_unit_length(delta)),
        "no 1/|p|": influence(hidden, rescaled(delta, p_PV)),
        "no sine": influence(hidden, rescaled(delta, inverse(sine_PV))),
        "neither norm": influence(at_unit_length(hidden), at_unit_length(delta)),
        "no |g|": at_unit_length(score),  # tracin_cosine
        "no mean h": influence(centred(hidden), delta),
        "no mean delta": influence(hidden, centred(delta)),
        "no mean g": centred(score),
        "no mean, |g|": at_unit_length(centred(score)),
        "h alone": at_unit_length(hidden).sum((1, 3)),
        "delta alone": at_unit_length(delta).sum((1, 3)),
    }


def causes(
    grams: Grams, prediction: Tensor, allowed: Tensor, degree_raw: Tensor, degree_cosine: Tensor
) -> dict[str, float]:
    """Norms, hubs and cancellation of one pool.

    Returns:
        ``cv``: standard deviation over mean, ``tail``: 99th percentile over median, of the norms of images' gradients g
        and of their views' h, delta, p and sine of the angle between p and t; ``share``: of the variance of
        log |h||delta|, by its three parts; ``rank``: rank correlation of a column's |g| with how often it is chosen;
        ``positive``: share of eligible scores above 0; ``signed sum``: |sum| over sum of absolute scores of a row, 0 if
        they cancel; ``cos to mean``: of each gradient to the pool's mean, about P^-1/2 if they have nothing in common.

    Args:
        grams: of the pool's factors.
        prediction: [P, V, D].
        allowed: [P, P] bool, the columns a row may choose.
        degree_raw: [P] how often raw TracIn chose each column.
        degree_cosine: [P] how often its cosine did.
    """
    p_PV = torch.linalg.vector_norm(prediction.double(), dim=-1)
    h_PV, d_PV = lengths(grams.hidden), lengths(grams.delta)
    score = influence(*grams)
    g_P = lengths(score)
    found = {}
    for name, size in (("|g|", g_P), ("|h|", h_PV), ("|delta|", d_PV), ("|p|", p_PV), ("sine", d_PV * p_PV)):
        found[f"cv {name}"] = float(size.std() / size.mean())
        found[f"tail {name}"] = float(size.quantile(0.99) / size.median())
    # log |h||delta| = log |h| - log |p| + log sin + constant: covariances with the whole are shares of its variance.
    logs = torch.stack([h_PV, 1 / p_PV, d_PV * p_PV]).clamp_min(1e-30).log().flatten(1)
    covariance = torch.cov(torch.cat([logs.sum(0, keepdim=True), logs]))[0]
    for name, part in zip(("|h|", "1/|p|", "sine"), covariance[1:], strict=True):
        found[f"share {name}"] = float(part / covariance[0])
    found["mean sine"] = float((d_PV * p_PV / 2).mean())
    found["rank |g| degree"] = spearman(g_P, degree_raw)
    found["rank, cosine"] = spearman(g_P, degree_cosine)
    inside = score.where(allowed, 0)
    found["positive"] = float(((score > 0) & allowed).sum() / allowed.sum())
    found["signed sum"] = float((inside.sum(1).abs() / inside.abs().sum(1)).nanmean())
    found["cos to mean"] = float((score.mean(1) * inverse(g_P * score.mean().clamp_min(0).sqrt())).mean())
    return found


def spearman(x: Tensor, y: Tensor) -> float:
    """Rank correlation of two vectors; ties share their mean rank, and a constant vector gives 0."""
    first, second = (_ranks(values.cpu().numpy()) for values in (x, y))
    return float(np.corrcoef(first, second)[0, 1]) if first.std() * second.std() > 0 else 0.0


def _ranks(values: NDArray[np.generic]) -> NDArray[np.float64]:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    mean: NDArray[np.float64] = (np.cumsum(counts) - (counts - 1) / 2)[place]
    return mean
