"""The helper that every distributed test stands on: values by rank, the first failure's traceback, no hanging."""

import os
import sys
import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks import PRELOAD, RankFailedError, end_ranks, run_ranks


def summed(rank: int, offset: torch.Tensor) -> tuple[int, str, torch.Tensor]:
    assert set(PRELOAD) <= sys.modules.keys()  # else every rank of every test pays for it
    total = offset + rank + torch.ones(256, 256) @ torch.zeros(256, 1)  # a product: threads must work after the fork
    dist.all_reduce(total)
    return dist.get_world_size(), os.environ["RANK"], total[0]


def only_rank_one_fails(rank: int) -> None:
    if rank == 1:
        raise KeyError("the cause")
    dist.barrier()


def dies(rank: int) -> None:
    if rank == 1:
        os._exit(3)
    dist.barrier()


def rank_one_hangs(rank: int) -> int:
    if rank == 1:
        time.sleep(600)
    return rank


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_values_by_rank(world_size: int) -> None:
    returned = run_ranks(summed, world_size, torch.full((1, 2), 10.0))
    expected = torch.full((2,), 10.0 * world_size + sum(range(world_size)))
    for rank, (size, variable, total) in enumerate(returned):
        assert size == world_size
        assert variable == str(rank)
        assert torch.equal(total, expected)


def test_the_failing_ranks_traceback_is_raised_while_the_other_waits() -> None:
    with pytest.raises(RankFailedError, match=r"(?s)rank 1 of 2 failed.*only_rank_one_fails.*KeyError: 'the cause'"):
        run_ranks(only_rank_one_fails, 2)


def test_a_rank_that_dies_is_a_failure() -> None:
    with pytest.raises(RankFailedError, match="rank 1 of 2 failed:\nit died"):
        run_ranks(dies, 2)


def ends_otherwise(rank: int) -> None:
    if rank == 0:
        raise KeyError("the cause")
    if rank == 1:
        os._exit(3)
    time.sleep(600)


def test_how_each_rank_ended() -> None:
    ended = end_ranks(ends_otherwise, 3, silent=[2])
    assert [rank.code for rank in ended] == [1, 3, None]
    assert "KeyError: 'the cause'" in ended[0].said


def test_a_rank_that_hangs_is_named_and_killed() -> None:
    with pytest.raises(TimeoutError, match=r"ranks \[1\] of 2"):
        run_ranks(rank_one_hangs, 2, timeout=3)
