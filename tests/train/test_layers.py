"""Gradients of several layers and of several checkpoints against autograd in float64, image by image.

Shape suffixes: B images, V views, D width of a layer's output.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.influence import naive
from tests.train.tiny_run import BATCH, context, global_batch, miner, networks
from tracekin.influence import POLICIES, Pool
from tracekin.model.networks import Online, Target
from tracekin.objective import Objective
from tracekin.objective.byol import byol_loss
from tracekin.train.miner import Miner
from tracekin.train.step import Found, loss_with_mined_positives

HEADS = ("projector.0.0", "projector.1", "predictor.0", "predictor_last")
"""The Linear layers of the heads."""
EXACT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-12}


def mined_by(found: Miner, online: Online, objective: Objective) -> Found:
    """What a step finds; ``rows`` are the images with their gradients."""
    losses = loss_with_mined_positives(online, objective, global_batch(torch.float64), found, **context())
    assert losses.found is not None
    return losses.found


def watched(layers: int) -> list[str]:
    """The layers whose gradients are compared, in the order of ``factors``: the last first."""
    return [HEADS[-1], *HEADS[-layers:-1]]


def scores(found: Found, policy: str) -> Tensor:
    pool = Pool(found.rows, found.rows, 0, 0)
    return POLICIES[policy].score(pool)(slice(0, BATCH))


def losses_of(online: Online, target: Target | None) -> Tensor:
    """BYOL's loss of each image, spelt out."""
    views = global_batch(torch.float64).views
    assert target is not None
    prediction_BVD, target_BVD = online(views).output, target(views)
    return byol_loss(prediction_BVD, target_BVD[:, [1, 0]])


def per_image(loss_B: Tensor, layer: nn.Linear) -> Tensor:
    """Each image's gradient of a layer's weight and bias, in one row."""
    rows = [torch.autograd.grad(loss, (layer.weight, layer.bias), retain_graph=True) for loss in loss_B]
    return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])


@pytest.mark.parametrize("policy", ["ghost", "ghost_cosine"])
@pytest.mark.parametrize("layers", [1, 2, 4])
def test_layers_hold_per_image_gradients_where_no_batch_norm_couples_images(policy: str, layers: int) -> None:
    """In evaluation mode each image's loss is its own, so that the ghost product is exact at every layer."""
    online, objective = networks(torch.float64)
    online(global_batch(torch.float64, seed=2).views)  # running statistics that are not 0 and 1
    online.eval()
    found = mined_by(miner(objective, policy, layers=layers), online, objective)
    loss_B = losses_of(online, objective.target)
    truth = [per_image(loss_B, online.get_submodule(name)) for name in watched(layers)]  # type: ignore[arg-type]
    if policy == "ghost":
        assert len(found.rows.factors) == layers
        for factors, expected in zip(found.rows.factors, truth, strict=True):
            torch.testing.assert_close(naive.materialised(factors), expected, **EXACT)
    whole = torch.cat(truth, 1)
    product = whole @ whole.T if policy == "ghost" else naive.cosine(whole, whole)
    torch.testing.assert_close(scores(found, policy), product, **EXACT)


def test_layers_before_a_batch_norm_hold_the_batch_losss_gradient_at_each_place() -> None:
    """In training mode batch norm couples the images: delta is what moves the sum of all losses, and is so for all."""
    online, objective = networks(torch.float64)
    found = mined_by(miner(objective, "ghost", layers=4), online, objective)
    moved: dict[str, list[Tensor]] = {name: [] for name in HEADS}

    def shift(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            moved[name].append(torch.zeros_like(output, requires_grad=True))
            return output + moved[name][-1]

        return hook

    handles = [online.get_submodule(name).register_forward_hook(shift(name)) for name in HEADS]
    loss_B = losses_of(online, objective.target)
    for handle in handles:
        handle.remove()
    for name, factors in zip(watched(4), found.rows.factors, strict=True):
        places = torch.autograd.grad(loss_B.sum(), moved[name], retain_graph=True)
        # The last layer sees all views at once, the others one after the other.
        delta_BVD = places[0] if name == HEADS[-1] else torch.stack(places, 1)
        torch.testing.assert_close(factors.delta, delta_BVD, **EXACT)
        each, held = per_image(loss_B, online.get_submodule(name)), naive.materialised(factors)  # type: ignore[arg-type]
        torch.testing.assert_close(held.sum(0), each.sum(0), **EXACT)
        # Exact at the last layer alone, which is why the policy's documentation calls it an approximation.
        assert torch.allclose(held, each, **EXACT) == (name == HEADS[-1])


def test_watching_leaves_nothing_behind() -> None:
    online, objective = networks(torch.float64)
    found = miner(objective, "ghost")
    with found.watching():
        assert any(layer._forward_hooks for layer in online.modules())
    assert not any(layer._forward_hooks for layer in online.modules())
    first, second = (mined_by(found, online, objective) for _ in range(2))
    for one, other in zip(first.rows.factors, second.rows.factors, strict=True):
        assert torch.equal(one.hidden, other.hidden)
        assert torch.equal(one.delta, other.delta)


@pytest.mark.parametrize("policy", ["tracin_cp", "tracin_cp_cosine"])
def test_checkpoints_are_summed_under_their_own_weights_and_learning_rates(policy: str) -> None:
    """The score is the sum over the last two checkpoints and the current weights of lr g g^T, g by autograd."""
    online, objective = networks(torch.float64)
    found = miner(objective, policy, checkpoints=2)
    assert found.history is not None
    now = context()["lr"]
    taken: list[tuple[Online, Target | None, Any]] = []
    for lr in (0.9, 0.4, 0.02):  # of three checkpoints the first is too old
        found.history.remember(online, objective.target, lr)
        taken.append((copy.deepcopy(online), copy.deepcopy(objective.target), lr))
        with torch.no_grad():  # training goes on in the same objects
            for parameter in (*online.parameters(), *objective.kept["target"].parameters()):
                parameter += 0.2 * torch.randn_like(parameter)
    taken.append((copy.deepcopy(online), copy.deepcopy(objective.target), now))
    best = mined_by(found, online, objective)
    gradients = [lr**0.5 * per_image(losses_of(net, slow), net.predictor_last) for net, slow, lr in taken[1:]]
    whole = torch.cat(gradients, 1)  # the inner product of these is the sum over checkpoints
    product = whole @ whole.T if policy == "tracin_cp" else naive.cosine(whole, whole)
    torch.testing.assert_close(scores(best, policy), product, **EXACT)
    strangers = product.masked_fill(best.rows.groups[:, None] == best.rows.groups, -torch.inf)
    torch.testing.assert_close(best.best.score[:, 0].double(), strangers.amax(1), rtol=1e-5, atol=1e-6)
