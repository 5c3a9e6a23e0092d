"""Gradient factors of each objective at the last Linear layer of a real network, against autograd.

Shape suffixes: B images, V views, H width of the layer's input, D of its output.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.objective.oracles import CASES, OWN_GRADIENT, STEP, each, relative
from tests.train.tiny_run import BATCH, global_batch, networks
from tracekin.influence import Factors
from tracekin.model.networks import Online
from tracekin.objective import Objective
from tracekin.objective.objective import Comparison

OPTIONS: dict[str, dict[str, Any]] = {
    **CASES,
    "moco_shuffled": CASES["moco2"] | {"norm": "shuffled", "norm_groups": 4},
}
BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-4}


class Passed:
    """A batch that went through a tiny network and its objective, with keys of another batch in moco's queue."""

    def __init__(self, case: str, dtype: torch.dtype) -> None:
        self.online, self.objective = built(case, dtype)
        older, self.batch = global_batch(dtype, seed=2), global_batch(dtype)
        self.objective.remember(self.objective.project(older.views, self.online(older.views), STEP - 1), older.index)
        self.outputs = self.online(self.batch.views)
        self.projection_BVD = self.objective.project(self.batch.views, self.outputs, STEP)

    def compare(self) -> Comparison:
        return self.objective.compare(self.outputs.output, self.projection_BVD, self.batch.index, STEP)

    def factors(self) -> Factors:
        return Factors(self.outputs.hidden, self.compare().delta())


def built(case: str, dtype: torch.dtype) -> tuple[Online, Objective]:
    options = dict(OPTIONS[case])
    return networks(dtype, **options)


def last(online: Online) -> nn.Linear:
    layer = online.predictor_last or online.projector[-1]
    assert isinstance(layer, nn.Linear)
    return layer


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("case", OPTIONS)
def test_factors_make_the_last_layers_gradient(case: str, dtype: torch.dtype) -> None:
    passed = Passed(case, dtype)
    hidden_BVH, delta_BVD = passed.factors()
    assert hidden_BVH.dtype == delta_BVD.dtype == dtype
    layer = last(passed.online)
    loss = passed.compare().loss().loss
    weight_DH, bias_D = torch.autograd.grad(loss, (layer.weight, layer.bias))
    assert weight_DH.abs().max() > 0
    found_DH = torch.einsum("bvd,bvh->dh", delta_BVD, hidden_BVH) / BATCH
    assert torch.linalg.vector_norm(found_DH - weight_DH) <= BOUNDS[dtype] * torch.linalg.vector_norm(weight_DH)
    # The losses of statistics do not depend on the bias: the images' parts of its gradient cancel.
    parts = torch.linalg.vector_norm(delta_BVD.abs().sum((0, 1)) / BATCH)
    assert torch.linalg.vector_norm(delta_BVD.sum((0, 1)) / BATCH - bias_D) <= BOUNDS[dtype] * parts


@pytest.mark.parametrize("case", OWN_GRADIENT)
def test_factors_make_each_images_gradient(case: str) -> None:
    passed = Passed(case, torch.float64)
    hidden_BVH, delta_BVD = passed.factors()
    layer = last(passed.online)
    loss_B: Tensor = each(passed.objective, passed.outputs.output, passed.projection_BVD, passed.batch.index)
    for loss, hidden_VH, delta_VD in zip(loss_B, hidden_BVH, delta_BVD, strict=True):
        weight_DH, bias_D = torch.autograd.grad(loss, (layer.weight, layer.bias), retain_graph=True)
        assert relative(delta_VD.T @ hidden_VH, weight_DH) <= 1e-9
        assert relative(delta_VD.sum(0), bias_D) <= 1e-9
