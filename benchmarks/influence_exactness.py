"""The closed-form influence equals per-sample gradients: max|S - M| / max|M| <= 2e-6 in fp32, cosine <= 0.99.

    python -m benchmarks.influence_exactness

M holds the inner products of each image's gradient of its own BYOL loss at the predictor's last Linear layer, weight
and bias, both views, by float64 autograd from the same fp32 activations, predictions and targets. S is
`pairwise_tracin` in fp32. Every image stands at the cosine named: the nearer to 1, the more digits cancel.

The errors called `with_forward` let float64 compute the predictions again, p = W h + b, so they add what rounding the
fp32 forward pass did to p. That is no error of the influence, and it is large where a prediction happens to be short.
"""

import copy
import random

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness import arguments, finish
from tracekin.influence import gradient_factors, pairwise_tracin

BOUND = 2e-6
LIMIT = 0.99
COSINES = (0.0, 0.9, 0.99, 0.999, 0.9999, 0.99999, 0.999999)


def errors(views: int, images: int, hidden: int, out: int, cosine: float, seed: int) -> tuple[float, float]:
    """max|S - M| / max|M| for a predictor and targets drawn from ``seed``; predictions at ``cosine`` to targets.

    Returns:
        The error from the same fp32 predictions, and with the forward pass's rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    predictor = nn.Sequential(nn.Linear(out, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, out))
    with torch.no_grad():
        for parameter in predictor.parameters():
            parameter.normal_(std=out**-0.5, generator=generator)
        inputs = torch.randn(views, images, out, generator=generator)
        h_BVH = torch.stack([predictor[:3](view) for view in inputs], 1)
        p_BVD = predictor[3](h_BVH)
        t_BVD = target_at(p_BVD, cosine, generator)
        factors = gradient_factors(h_BVH, p_BVD, t_BVD)
        scores = pairwise_tracin(factors, factors)
    given = autograd_influence(predictor[3], h_BVH, t_BVD, p_BVD)
    recomputed = autograd_influence(predictor[3], h_BVH, t_BVD)
    same, forward = (float((scores - exact).abs().max() / exact.abs().max()) for exact in (given, recomputed))
    return same, forward


def target_at(prediction: Tensor, cosine: float, generator: torch.Generator) -> Tensor:
    """fp32 targets of random length and direction at this cosine to their predictions [B, V, D], D > 1."""
    p = F.normalize(prediction.double(), dim=-1)
    other = torch.randn(p.shape, generator=generator, dtype=torch.float64)
    other = F.normalize(other - (other * p).sum(-1, keepdim=True) * p, dim=-1)
    length = 0.5 + torch.rand(*p.shape[:2], 1, generator=generator, dtype=torch.float64)
    target: Tensor = length * (cosine * p + (1 - cosine**2) ** 0.5 * other)
    return target.float()


def autograd_influence(last: nn.Module, hidden: Tensor, target: Tensor, prediction: Tensor | None = None) -> Tensor:
    """[B, B] inner products of per-sample gradients, one backward pass an image, in float64.

    Args:
        last: the Linear layer.
        hidden: [B, V, H].
        target: [B, V, D].
        prediction: [B, V, D] values that the layer's output takes; None computes them in float64.
    """
    last, hidden, target = copy.deepcopy(last).double(), hidden.double(), target.double()
    gradients = []
    for image, (h_VH, t_VD) in enumerate(zip(hidden, target, strict=True)):
        p_VD = last(h_VH)
        if prediction is not None:
            p_VD = p_VD + (prediction[image] - p_VD).detach()
        loss = (2 - 2 * F.cosine_similarity(p_VD, t_VD, dim=-1)).sum()
        parts = torch.autograd.grad(loss, list(last.parameters()))
        gradients.append(torch.cat([part.flatten() for part in parts]))
    stacked = torch.stack(gradients)
    return stacked @ stacked.T


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--shapes", type=int, default=200, help="random shapes (default: %(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    draw = random.Random(0)
    shapes = [
        (draw.randint(1, 3), draw.randint(2, 24), 2 ** draw.randint(1, 9), 2 ** draw.randint(1, 8))
        for _ in range(options.shapes)
    ] + [(2, 64, 4096, 256)]
    found = {(shape, seed): errors(*shape, LIMIT, seed) for seed, shape in enumerate(shapes)}
    worst = max(found, key=lambda case: found[case][0])
    wide = [forward for ((*_, out), _), (_, forward) in found.items() if out >= 64]
    by_cosine = {f"{c:.8g}": errors(2, 32, 1024, 256, c, 0) for c in COSINES}
    result = {
        "shapes": len(shapes),
        "cosine": LIMIT,
        "error_by_cosine": {cosine: same for cosine, (same, _) in by_cosine.items()},
        "error_by_cosine_with_forward": {cosine: forward for cosine, (_, forward) in by_cosine.items()},
        "error_at_4096x256": found[shapes[-1], len(shapes) - 1][0],
        "worst_error_with_forward_out_64_and_more": max(wide),
        "worst_shape_views_images_hidden_out": list(worst[0]),
        "worst_error": found[worst][0],
        "bound": BOUND,
        "ratio_to_bound": found[worst][0] / BOUND,
    }
    finish("influence_exactness", result, save=options.save)


if __name__ == "__main__":
    main()
