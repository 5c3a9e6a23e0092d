"""Heads are those of the papers at ResNet-50's width, and what influence is made of is fp32 under bf16 autocast."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from lightly.models.modules import heads as lightlys
from torch import nn

from tests.objective.oracles import CASES, STEP
from tests.objective.test_factors import last
from tests.train.tiny_run import BATCH, global_batch, tiny_backbone, tiny_config
from tracekin.config import Config, ModelConfig, ObjectiveConfig, TrainConfig
from tracekin.objective import OBJECTIVES, build_objective, build_online

FEATURES = 2048
Spec = list[tuple[Any, ...]]


def mlp(*widths: int) -> Spec:
    """A fully connected network with batch norm and ReLU but at its end."""
    *hidden, end = pairwise(widths)
    blocks = [[("Linear", *block), ("BatchNorm", block[1], True), ("ReLU",)] for block in hidden]
    return [*(layer for block in blocks for layer in block), ("Linear", *end)]


def spec(modules: Iterable[nn.Module | None]) -> Spec:
    """Kinds and widths, in order. Biases are left out: before a batch norm they do nothing."""
    return list(_spec(modules))


def _spec(modules: Iterable[nn.Module | None]) -> Iterator[tuple[Any, ...]]:
    for module in modules:
        if isinstance(module, nn.Linear):
            yield "Linear", module.in_features, module.out_features
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            yield "BatchNorm", module.num_features, module.affine
        elif isinstance(module, nn.ReLU):
            yield ("ReLU",)
        elif module is not None:
            assert isinstance(module, nn.Sequential)
            yield from _spec(module)


def theirs(*heads: lightlys.ProjectionHead) -> Spec:
    return spec(head.layers for head in heads)


EXPECTED: dict[str, Callable[[], Spec]] = {
    "byol": lambda: theirs(lightlys.BYOLProjectionHead(), lightlys.BYOLPredictionHead()),
    "simsiam": lambda: theirs(lightlys.SimSiamProjectionHead(), lightlys.SimSiamPredictionHead()),
    # Without their last batch norm, which the paper does not name: a Linear layer stands before the loss.
    "simclr": lambda: theirs(lightlys.SimCLRProjectionHead())[:-1],
    "moco2": lambda: theirs(lightlys.MoCoProjectionHead()),
    # The authors' ResNet: two layers of projector, whose last batch norm has no weights, and BYOL's predictor.
    "moco3": lambda: [*mlp(FEATURES, 4096, 256), ("BatchNorm", 256, False), *mlp(256, 4096, 256)],
    "barlow_twins": lambda: theirs(lightlys.BarlowTwinsProjectionHead()),
    # Section 4.2: "three fully-connected layers of size 8192", batch norm and ReLU behind the first two.
    "vicreg": lambda: mlp(FEATURES, 8192, 8192, 8192),
    # Section 4: "one hidden layer of 1024 units with BN and ReLU", an embedding of 64.
    "wmse": lambda: mlp(FEATURES, 1024, 64),
}


@pytest.mark.parametrize("case", CASES)
def test_heads_are_the_papers(case: str) -> None:
    config = Config(
        model=ModelConfig(backbone="resnet50"),
        objective=ObjectiveConfig(**CASES[case]),
        train=TrainConfig(global_batch=2048),  # of which the widest heads ask
    )
    with torch.device("meta"):
        assert spec(OBJECTIVES[config.objective.name].heads(config.model, FEATURES)) == EXPECTED[case]()


@pytest.mark.parametrize("case", CASES)
def test_what_influence_is_made_of_is_fp32_under_autocast(case: str) -> None:
    torch.manual_seed(0)
    config = replace(tiny_config(**CASES[case]), train=TrainConfig(global_batch=BATCH, precision="bf16"))
    with tiny_backbone():
        online = build_online(config)
    batch = global_batch(torch.float32)
    outputs = online(batch.views)
    projection_BVD = build_objective(config, online).project(batch.views, outputs, STEP)
    for tensor in (*outputs, projection_BVD):
        assert tensor.dtype == torch.float32
        assert not torch.equal(tensor, tensor.bfloat16().float())  # not bf16 numbers in wider clothes
    layer = last(online)
    by_hand = outputs.hidden @ layer.weight.T + layer.bias
    torch.testing.assert_close(outputs.output, by_hand, rtol=1e-5, atol=1e-6)
    online.autocast = False
    assert not torch.allclose(outputs.output, online(batch.views).output, rtol=1e-4)  # the rest was bf16
