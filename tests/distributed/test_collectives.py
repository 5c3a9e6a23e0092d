"""Collectives that carry gradients: what all ranks want of a tensor comes home, and its memory's order is no matter."""

import pytest
import torch
from torch import Tensor

from tests.ranks import run_ranks
from tracekin.distributed import collectives

SIZE = 3
"""Ranks; enough that a sum over all of them is no sum over two."""


def exchanged(rank: int) -> dict[str, Tensor]:
    """Values and gradients of this rank's [2, 2] tensor, where each rank wants something else of the whole."""
    local = torch.arange(4.0).view(2, 2) + 10 * rank
    found = {}
    for name in ("gather_with_gradient", "total_with_gradient"):
        mine = local.clone().requires_grad_()
        whole = getattr(collectives, name)(mine)
        wanted = (rank + 1) * (1 + torch.arange(whole.numel()).view_as(whole))
        (whole * wanted).sum().backward()
        assert mine.grad is not None
        found |= {name: whole.detach(), f"{name}'s gradient": mine.grad}
    transposed = local.T.contiguous().T if rank else local
    return found | {"total": collectives.total(transposed)}


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Tensor]]:
    return run_ranks(exchanged, SIZE)


@pytest.fixture(scope="module")
def own() -> list[Tensor]:
    """What each rank brought."""
    return [torch.arange(4.0).view(2, 2) + 10 * rank for rank in range(SIZE)]


def test_every_ranks_wish_comes_home(ranks: list[dict[str, Tensor]], own: list[Tensor]) -> None:
    wishes = sum(rank + 1 for rank in range(SIZE))
    for rank, found in enumerate(ranks):
        assert torch.equal(found["gather_with_gradient"], torch.cat(own))
        asked = wishes * (1.0 + torch.arange(4 * SIZE).view(2 * SIZE, 2))
        assert torch.equal(found["gather_with_gradient's gradient"], asked[2 * rank : 2 * rank + 2])
        assert torch.equal(found["total_with_gradient"], sum(own))
        assert torch.equal(found["total_with_gradient's gradient"], wishes * (1.0 + torch.arange(4).view(2, 2)))


def test_a_sum_takes_no_notice_of_how_a_tensor_lies_in_memory(
    ranks: list[dict[str, Tensor]], own: list[Tensor]
) -> None:
    """Gloo adds memory: ranks whose gradients lie differently would get sums of other elements, silently."""
    for found in ranks:
        assert torch.equal(found["total"], sum(own))
