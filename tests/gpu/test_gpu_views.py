"""A batch of views on the GPU has the bits of a loader worker's, without waiting, and in a CUDA graph."""

import numpy as np
import pytest
import torch

from tests.data.views import raw_views
from tests.gpu.device_runs import no_waiting
from tracekin.data.photometry import Parameters, Pixels, apply_photometry, apply_to_one

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU: make gpu runs it")
GPU = torch.device("cuda")


def on_gpu(pixels: Pixels, parameters: Parameters) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(pixels).to(GPU), torch.from_numpy(parameters).to(GPU)


def by_a_worker(pixels: Pixels, parameters: Parameters) -> torch.Tensor:
    return torch.from_numpy(np.stack([apply_to_one(*one) for one in zip(pixels, parameters, strict=True)]))


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (1, "F"), (3, "RGB"), (3, "F")])
@pytest.mark.parametrize("size", [31, 224])
def test_views_have_the_bits_of_a_workers(size: int, channels: int, mode: str) -> None:
    raw = raw_views(size=size, channels=channels, mode=mode, count=16)
    there = on_gpu(*raw)
    with no_waiting(GPU):
        views = apply_photometry(*there)
    assert torch.equal(views.cpu(), by_a_worker(*raw))


def test_views_in_a_cuda_graph() -> None:
    first, second = raw_views(size=64, count=8), raw_views(size=64, count=8, first=8)
    pixels, parameters = on_gpu(*first)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        apply_photometry(pixels, parameters)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        views = apply_photometry(pixels, parameters)
    for raw in (first, second):
        for there, new in zip((pixels, parameters), on_gpu(*raw), strict=True):
            there.copy_(new)
        graph.replay()
        assert torch.equal(views.cpu(), by_a_worker(*raw))
