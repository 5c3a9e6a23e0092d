import itertools

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from tests.train.tiny_run import networks
from tracekin.config import Config, DataConfig, ModelConfig
from tracekin.model.backbone import build_backbone
from tracekin.model.networks import tau_at
from tracekin.objective import build_online
from tracekin.objective.byol import byol_loss


def test_loss_is_the_papers() -> None:
    p, t = torch.randn(5, 2, 7), torch.randn(5, 2, 7)
    expected = sum((F.normalize(p[:, u], dim=1) - F.normalize(t[:, u], dim=1)).square().sum(1) for u in range(2))
    assert torch.allclose(byol_loss(p, t), expected, atol=1e-6)
    several = torch.stack((t, p), 1)  # k positives of each image
    assert torch.allclose(byol_loss(p[:, None], several), torch.stack((expected, torch.zeros(5)), 1), atol=1e-6)


@given(num_steps=st.integers(1, 1000), base=st.floats(0, 1))
def test_tau_rises_from_base_to_one(num_steps: int, base: float) -> None:
    taus = [tau_at(step, num_steps, base) for step in range(num_steps + 1)]
    assert abs(taus[0] - base) < 1e-12
    assert abs(taus[-1] - 1) < 1e-12
    assert all(a <= b + 1e-12 for a, b in itertools.pairwise(taus))


def test_target_follows_by_ema_and_takes_no_gradient() -> None:
    online, objective = networks(torch.float64)
    target = objective.kept["target"]
    before = [p.clone() for p in target.parameters()]
    theirs = [*online.backbone.parameters(), *online.projector.parameters()]
    objective.follow(online, 0.9)
    for now, was, other in zip(target.parameters(), before, theirs, strict=True):
        assert torch.allclose(now, 0.9 * was + 0.1 * other)
    assert not any(p.requires_grad for p in target.parameters())
    assert not target(torch.randn(2, 4, 3, 12, 12, dtype=torch.float64)).requires_grad


def test_each_view_has_batch_statistics_of_its_own() -> None:
    """A view's prediction does not depend on the other view of the batch."""
    online, _ = networks(torch.float64)
    views = torch.randn(2, 6, 3, 12, 12, dtype=torch.float64)
    other = views.clone()
    other[1] *= 5
    assert torch.allclose(online(views).output[:, 0], online(other).output[:, 0])
    assert not torch.allclose(online(views).output[:, 1], online(other).output[:, 1])


def test_last_layer_is_fp32_under_autocast() -> None:
    torch.manual_seed(0)
    model = ModelConfig(projector_hidden=32, projection=16, predictor_hidden=32)
    online = build_online(Config(model=model, data=DataConfig(channels=1)))
    hidden, prediction, _ = online(torch.randn(2, 4, 1, 32, 32))
    assert hidden.dtype == prediction.dtype == torch.float32
    assert not torch.equal(hidden, hidden.bfloat16().float())  # not bf16 numbers in wider clothes
    weight, bias = online.predictor_last.weight, online.predictor_last.bias
    assert torch.allclose(prediction, hidden @ weight.T + bias, rtol=1e-5, atol=1e-6)


def test_backbones_take_one_or_three_channels_and_both_stems() -> None:
    for channels in (1, 3):
        for small_stem in (False, True):
            net = build_backbone(ModelConfig(small_stem=small_stem), channels).eval()
            assert net(torch.randn(2, channels, 32, 32)).shape == (2, net.num_features) == (2, 512)
