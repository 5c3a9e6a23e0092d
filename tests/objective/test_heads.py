"""What stands on the backbone is what each paper puts there."""

from collections.abc import Iterator
from typing import get_args

import pytest
import torch
from lightly.models.modules import heads as lightly
from torch import nn

from tests.train.tiny_run import global_batch, tiny_backbone, tiny_config
from tracekin.config import Config, ObjectiveName, load
from tracekin.objective import OBJECTIVES, build_online

NAMES = get_args(ObjectiveName)


def vicreg() -> nn.Module:
    """Section 4.2: three layers of 8192, batch norm and ReLU between them."""
    hidden = [(2048, 8192), (8192, 8192)]
    layers = [layer for sizes in hidden for layer in (nn.Linear(*sizes), nn.BatchNorm1d(8192), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(8192, 8192))


def wmse() -> nn.Module:
    """Section 4: a hidden layer of 1024 with batch norm, and 64 dimensions that are whitened."""
    return nn.Sequential(nn.Linear(2048, 1024), nn.BatchNorm1d(1024), nn.ReLU(), nn.Linear(1024, 64))


def simclr() -> nn.Module:
    """lightly's, without the batch norm behind the last layer, which the paper's z = W2 relu(W1 h) has not."""
    return lightly.SimCLRProjectionHead(2048, 2048, 128).layers[:-1]


PAPERS = {
    "byol": [lightly.BYOLProjectionHead(2048, 4096, 256), lightly.BYOLPredictionHead(256, 4096, 256)],
    "simsiam": [lightly.SimSiamProjectionHead(2048, 2048, 2048), lightly.SimSiamPredictionHead(2048, 512, 2048)],
    "simclr": [simclr()],
    "moco": [lightly.MoCoProjectionHead(2048, 2048, 128)],
    "moco v3": [lightly.BYOLProjectionHead(2048, 4096, 256), lightly.BYOLPredictionHead(256, 4096, 256)],
    "barlow_twins": [lightly.BarlowTwinsProjectionHead(2048, 8192, 8192)],
    "vicreg": [vicreg()],
    "wmse": [wmse()],
}


def described(modules: list[nn.Module]) -> Iterator[tuple[object, ...]]:
    """Kind and widths of each layer; biases before a batch norm move nothing and are left out."""
    for layer in (leaf for module in modules for leaf in module.modules() if not [*leaf.children()]):
        if isinstance(layer, nn.Linear):
            yield "linear", layer.in_features, layer.out_features
        elif isinstance(layer, nn.modules.batchnorm._BatchNorm):
            yield "norm", layer.num_features, layer.affine
        else:
            yield (type(layer).__name__.lower(),)


@pytest.mark.parametrize("name", PAPERS)
def test_heads_are_the_papers(name: str) -> None:
    kind, _, version = name.partition(" v")
    overrides = [f"objective.name={kind}", "model.backbone=resnet50", "train.global_batch=2048"]
    config = load(Config, None, [*overrides, *([f"objective.version={version}"] if version else [])])
    with torch.device("meta"):
        heads = OBJECTIVES[kind].heads(config.model, 2048)
    assert [*described([part for part in heads if part is not None])] == [*described(PAPERS[name])]


@pytest.mark.parametrize("name", [*NAMES, "moco v3"])
def test_what_influence_and_loss_read_is_fp32_under_autocast(name: str) -> None:
    kind, _, version = name.partition(" v")
    config = tiny_config(kind, **({"version": int(version)} if version else {}))
    with tiny_backbone():
        online = build_online(config)
    online.autocast = True
    outputs = online(global_batch(torch.float32).views)
    for tensor in outputs:
        assert tensor.dtype == torch.float32
        assert not torch.equal(tensor, tensor.bfloat16().float())  # not bf16 numbers in wider clothes
    assert not outputs.hidden.requires_grad
    assert not outputs.projection.requires_grad
    last = [module for module in online.modules() if isinstance(module, nn.Linear)][-1]
    assert torch.allclose(outputs.output, last(outputs.hidden), rtol=1e-5, atol=1e-6)
