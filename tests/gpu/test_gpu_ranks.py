"""W ranks = one process on the GPU: two ranks share it over gloo, without DeepSpeed in float64 and with it in fp32.

NCCL takes one rank a GPU, so NCCL across GPUs is not tested here.
"""

from typing import Any

import pytest
import torch

from benchmarks.ranks import run_ranks
from tests.gpu.device_runs import POLICIES, STAGES, rank_steps, relative

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: make gpu runs it")
Worlds = dict[int, dict[str, Any]]


@pytest.fixture(scope="module")
def worlds() -> Worlds:
    return {size: run_ranks(rank_steps, size, "cuda", timeout=100)[0] for size in (1, 2)}


@pytest.mark.parametrize("policy", POLICIES)
def test_two_ranks_equal_one_process_in_float64(worlds: Worlds, policy: str, record_property: Any) -> None:
    one, two = worlds[1][policy], worlds[2][policy]
    assert torch.equal(two["index"], one["index"])
    assert relative(two["loss"], one["loss"]) <= 1e-10
    error = relative(two["gradient"], one["gradient"])
    record_property("gradient_error", error)
    assert error <= 1e-10


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("policy", POLICIES)
def test_two_ranks_equal_one_process_through_deepspeed(
    worlds: Worlds, policy: str, stage: int, record_property: Any
) -> None:
    one, two = worlds[1][f"{policy}/0"], worlds[2][f"{policy}/{stage}"]
    assert torch.equal(two["index"], one["index"])
    assert relative(two["loss"], one["loss"]) <= 1e-5
    error = relative(two["gradient"], one["gradient"])
    record_property("gradient_error", error)
    assert error <= 1e-4
    assert relative(two["updated"], one["updated"]) <= 1e-4
    assert relative(two["gradient"], worlds[1][policy]["gradient"]) <= 1e-3  # and of the float64 gradient
