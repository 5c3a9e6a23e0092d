"""The sketch: the same everywhere, right on average, and the better the wider."""

import pytest
import torch

from tracekin.influence import sketch, sketch_matrix, sketched

CPU = torch.device("cpu")
WIDTH = 200


def test_is_the_same_on_every_call_whatever_was_drawn_before() -> None:
    torch.manual_seed(1)
    first = sketch_matrix(WIDTH, 32, CPU)
    torch.rand(3)
    assert torch.equal(sketch_matrix(WIDTH, 32, CPU), first)
    assert first.dtype == torch.float32
    assert torch.equal(first.abs(), torch.full((WIDTH, 32), 32**-0.5))
    # So that ranks of other versions of the library draw the same.
    assert (first[0, :8] > 0).tolist() == [True, False, False, False, False, False, True, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_sketches_in_fp32_without_gradient(dtype: torch.dtype) -> None:
    hidden = torch.randn(3, 2, WIDTH).to(dtype).requires_grad_()
    found = sketched(hidden, sketch_matrix(WIDTH, 16, CPU))
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    assert found.shape == (3, 2, 16)
    assert not found.requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sketched(hidden, sketch_matrix(WIDTH, 16, CPU)), found)


def errors(dim: int, count: int, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """Error of one product of two fixed vectors of length 1 under ``count`` different sketches."""
    generator = torch.Generator().manual_seed(0)
    h, g = torch.nn.functional.normalize(torch.randn(2, WIDTH, generator=generator, dtype=torch.float64), dim=1)
    found = []
    for seed in range(count):
        monkeypatch.setattr(sketch, "SEED", seed)
        a, b = sketched(torch.stack((h, g)), sketch_matrix(WIDTH, dim, CPU))
        found.append(a @ b - h @ g)
    return torch.stack(found)


def test_products_are_unbiased(monkeypatch: pytest.MonkeyPatch) -> None:
    found = errors(16, 600, monkeypatch)
    assert found.mean().abs() < 4 * found.std() / 600**0.5
    assert found.std() > 0.1  # so that the bound means something


def test_the_error_falls_with_the_root_of_the_width(monkeypatch: pytest.MonkeyPatch) -> None:
    spread = {dim: float(errors(dim, 300, monkeypatch).std()) for dim in (16, 64, 256)}
    for dim, found in spread.items():
        assert 0.8 < found * dim**0.5 < 1.25, spread
