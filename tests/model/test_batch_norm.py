"""Batch norm over all ranks equals torch's over the whole batch, and over groups torch's over each of them.

Forward, backward and running statistics.
"""

import copy

import torch
from torch import nn
from torch.nn import functional as F

from tests.ranks import run_ranks
from tracekin.distributed import collectives
from tracekin.model.batch_norm import CrossRankBatchNorm, GroupBatchNorm, convert_batch_norms


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


def compare_groups(rank: int, world_size: int) -> dict[str, float]:
    """A group batch norm with torch's own, which sees one group of 2 images after the other."""
    torch.manual_seed(0)
    images, groups = 8, 4
    x = torch.randn(images, 6, 4, 4, dtype=torch.float64) * torch.linspace(1, 8, images)[:, None, None, None] + 1000
    weight = torch.randn(images, 6, 4, 4, dtype=torch.float64)
    plain = nn.BatchNorm2d(6, momentum=0.3).double()
    with torch.no_grad():
        plain.weight.uniform_(0.5, 2)
        plain.bias.uniform_(-1, 1)
    grouped = convert_batch_norms(nn.Sequential(copy.deepcopy(plain)), groups)
    assert isinstance(grouped[0], GroupBatchNorm)
    assert grouped.state_dict().keys() == nn.Sequential(plain).state_dict().keys()
    each = images // world_size
    mine = slice(rank * each, (rank + 1) * each)
    parts, statistics = [], []
    whole = x.clone().requires_grad_()
    for part in whole.split(images // groups):
        alone = copy.deepcopy(plain)  # each group moves the statistics from where they were
        parts.append(F.batch_norm(part, None, None, plain.weight, plain.bias, training=True))
        alone(part)
        statistics.append(torch.stack((alone.running_mean, alone.running_var)))
    expected, moved = torch.cat(parts), torch.stack(statistics).mean(0).detach()
    (expected.square() * weight).mean().backward()
    own = x[mine].clone().requires_grad_()
    actual = grouped(own)
    (actual.square() * weight[mine]).mean().backward()
    gradient = collectives.total(torch.stack((grouped[0].weight.grad, grouped[0].bias.grad))) / world_size
    truth = torch.stack((plain.weight.grad, plain.bias.grad))
    buffers = torch.stack((grouped[0].running_mean, grouped[0].running_var))
    with torch.no_grad():
        plain.running_mean, plain.running_var = moved
        evaluated = grouped.eval()(x[mine]) - plain.eval()(x[mine])
    return {
        "forward": float((actual - expected[mine]).detach().abs().max()),
        "gradient": float((gradient - truth).norm() / truth.norm()),
        "gradient of the images": float((own.grad / world_size - whole.grad[mine]).norm() / whole.grad[mine].norm()),
        "buffers": float((buffers - moved).abs().max()),
        "steps": abs(int(grouped[0].num_batches_tracked) - 1),
        "evaluated": float(evaluated.abs().max()),
    }


def both(rank: int, world_size: int) -> tuple[dict[str, float], dict[str, float]]:
    return compare(rank, world_size), compare_groups(rank, world_size)


def test_ranks_equal_the_whole_batch_and_its_groups() -> None:
    for found in run_ranks(both, 2, 2):
        for errors in found:
            assert max(errors.values()) <= 1e-9, errors


def test_one_process_holds_all_groups() -> None:
    errors = compare_groups(0, 1)
    assert max(errors.values()) <= 1e-9, errors
