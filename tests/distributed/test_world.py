import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracekin.config import UserError
from tracekin.distributed.world import World, first_node, meeting_point, world_from_environment


@given(size=st.integers(1, 8192), each=st.integers(1, 64))
def test_shares_partition_the_batch(size: int, each: int) -> None:
    ranks = {0, size // 2, size - 1}
    for rank in ranks:
        assert World(rank, size).share(size * each) == slice(rank * each, (rank + 1) * each)
    assert World(size - 1, size).share(size * each).stop == size * each


def test_a_batch_that_ranks_do_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match="multiple of 3"):
        World(0, 3).share(10)


def test_launchers_are_understood() -> None:
    assert world_from_environment({}) == World(0, 1, 0, 1)
    torchrun = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert world_from_environment(torchrun) == World(5, 8, 1, 4)
    srun = {
        "SLURM_PROCID": "5",
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
        "SLURM_JOB_ID": "12345",
        "SLURM_STEP_NODELIST": "gpu[03-04]",
        "SLURM_STEP_NUM_NODES": "2",
    }
    assert world_from_environment(srun) == World(5, 8, 1, 4)
    assert meeting_point(srun) == ("gpu03", 22345)
    assert meeting_point(srun | {"SLURM_STEP_NUM_NODES": "1"}) == ("127.0.0.1", 22345)
    assert meeting_point(srun | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "7"}) == ("10.0.0.1", 7)
    with pytest.raises(UserError, match="LOCAL_RANK"):
        world_from_environment({"RANK": "1", "WORLD_SIZE": "2"})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a", "a"), ("a,b", "a"), ("gpu[03-07,9],login", "gpu03"), ("n[1,3]", "n1"), ("r1-n[2-3]-ib", "r1-n2-ib")],
)
def test_the_first_node_of_slurms_notation(nodes: str, first: str) -> None:
    assert first_node(nodes) == first
