"""Per-sample gradients at the last Linear layer, as factors and, for the BYOL loss, in closed form.

Shape suffixes: B images, V views, H width of the layer's input, D width of its output.

With p = W h + b and l_i = sum over u of [2 - 2 cos(p_i^u, t_i^u)], the gradient of image i is
dl_i/dW = sum over u of delta_i^u (h_i^u)^T and dl_i/db = sum over u of delta_i^u. It is exact there because the
predictor's batch norm lies before that layer; for earlier layers batch norm couples the samples.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tracekin.influence.precision import exact, widen

EPSILON = 1e-12
"""A vector shorter than this counts as zero: it has no direction."""


class Factors(NamedTuple):
    """The two factors of each image's gradient."""

    hidden: Tensor
    """[B, V, H] input of the layer; fp32, or float64 (what has travelled between ranks may be bf16)."""
    delta: Tensor
    """[B, V, D] gradient of the image's own loss at the layer's output; fp32, or float64 (or bf16, as above)."""


def unit(vectors: Tensor) -> Tensor:
    """``vectors`` at length 1 along the last dimension; zero vectors stay zero."""
    return vectors * _inverse_length(vectors)


def gradient_factors(hidden: Tensor, prediction: Tensor, target: Tensor) -> Factors:
    """Factors of the per-sample gradients of the BYOL loss: ``cosine_delta`` beside the layer's input.

    Args:
        hidden: [B, V, H] input of the predictor's last layer, any float dtype.
        prediction: [B, V, D] its output, before any normalisation.
        target: [B, V, D]; target[:, u] is the vector that prediction[:, u] is compared with, so the other view's.

    Returns:
        Factors in fp32 (float64 stays float64), detached. Zero predictions and zero targets give a delta of 0.
    """
    return Factors(widen(hidden.detach()), cosine_delta(prediction, target))


def cosine_delta(prediction: Tensor, target: Tensor) -> Tensor:
    """Gradient of 2 - 2 cos(p, t) at p: delta = -(2/|p|) (t^ - (p^ . t^) p^), with ^ for unit vectors.

    Args:
        prediction: [..., D] any float dtype.
        target: [..., D].

    Returns:
        [..., D] in fp32 (float64 stays float64), detached; 0 where either has no direction.
    """
    with exact(prediction.device):
        # In float64: t^ and its part along p^ cancel as the cosine goes to 1, and these are the small tensors.
        delta = through_unit(prediction.double(), -2 * unit(target.double()))
        return delta.to(torch.promote_types(prediction.dtype, torch.float32))


def through_unit(vectors: Tensor, gradient: Tensor) -> Tensor:
    """The gradient at ``vectors`` v of what has ``gradient`` g at their unit vectors: (g - (v^ . g) v^) / |v|."""
    inverse = _inverse_length(vectors)
    direction = vectors * inverse
    return inverse * (gradient - (direction * gradient).sum(-1, keepdim=True) * direction)


def self_influence(*layers: Factors) -> Tensor:
    """M_ii = |gradient of image i|^2, [B], summed over the layers (or checkpoints) given."""
    with exact(layers[0].hidden.device):
        wide = [[widen(factor) for factor in layer] for layer in layers]
        terms = [((h_BVH @ h_BVH.mT + 1) * (d_BVD @ d_BVD.mT)).sum((1, 2)) for h_BVH, d_BVD in wide]
        return torch.stack(terms).sum(0)


def normalised(*layers: Factors) -> tuple[Factors, ...]:
    """The same gradients at unit length over all layers together, so that their product is a cosine; no length gives 0.

    Only the deltas change, so that the hidden activations can travel before this is known.
    """
    with exact(layers[0].hidden.device):
        square = self_influence(*layers)
        scale = torch.where(square > 0, square.rsqrt(), 0)[:, None, None]
        return tuple(Factors(hidden, widen(delta) * scale) for hidden, delta in layers)


def _inverse_length(vectors: Tensor) -> Tensor:
    length = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return torch.where(length > EPSILON, 1 / length, 0)
