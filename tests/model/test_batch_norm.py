"""Cross-rank batch norm equals torch's batch norm over the whole batch, forward, backward and running statistics."""

import copy

import torch
from torch import nn

from tests.ranks import run_ranks
from tracekin.distributed import collectives
from tracekin.model.batch_norm import CrossRankBatchNorm, convert_batch_norms


def compare(rank: int, world_size: int) -> dict[str, float]:
    torch.manual_seed(0)
    # A mean far from 0: sums of squares would cancel.
    x = torch.randn(8, 5, 4, 4, dtype=torch.float64) * 3 + 1000
    weight = torch.randn(8, 4, 1, 1, dtype=torch.float64)
    whole = nn.Sequential(
        nn.Conv2d(5, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 2),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.BatchNorm1d(4),
    ).double()
    with torch.no_grad():
        for norm in (whole[1], whole[4], whole[6]):
            norm.weight.uniform_(0.5, 2)
            norm.bias.uniform_(-1, 1)
    split = convert_batch_norms(copy.deepcopy(whole))
    assert isinstance(split[1], CrossRankBatchNorm)
    expected = whole(x)
    (expected.square() * weight[:, :, 0, 0]).mean().backward()
    each = 8 // world_size
    mine = slice(rank * each, (rank + 1) * each)
    actual = split(x[mine].contiguous(memory_format=torch.channels_last))
    (actual.square() * weight[mine, :, 0, 0]).mean().backward()
    gradient = collectives.total(torch.cat([p.grad.flatten() for p in split.parameters()])) / world_size
    truth = torch.cat([p.grad.flatten() for p in whole.parameters()])
    buffers = [(a - b).abs().max() for a, b in zip(split.buffers(), whole.buffers(), strict=True)]
    return {
        "forward": float((actual - expected[mine]).abs().max()),
        "gradient": float((gradient - truth).norm() / truth.norm()),
        "buffers": float(torch.stack([b.double() for b in buffers]).max()),
    }


def test_ranks_equal_the_whole_batch() -> None:
    for errors in run_ranks(compare, 2, 2):
        assert errors["forward"] <= 1e-9, errors
        assert errors["gradient"] <= 1e-9, errors
        assert errors["buffers"] <= 1e-9, errors
