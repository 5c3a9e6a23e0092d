"""The host never waits for the GPU in a mined step, nor in what is measured beside it; it waits once a log line."""

import pytest
import torch

from tests.gpu.device_runs import UNWAITING, no_waiting, unwaiting_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: make gpu runs it")
GPU = torch.device("cuda")


@pytest.mark.parametrize("name", UNWAITING)
def test_a_mined_step_and_its_measures_do_not_wait(name: str) -> None:
    assert unwaiting_step(GPU, **UNWAITING[name])["loss"] > 0


def test_the_check_sees_waiting() -> None:
    there = torch.ones(3, device=GPU)
    for waits in (lambda: there.sum().item(), lambda: there[there > 0], lambda: torch.as_tensor(1.0, device=GPU)):
        with pytest.raises(RuntimeError), no_waiting(GPU):
            waits()
    assert torch.cuda.get_sync_debug_mode() == 0
