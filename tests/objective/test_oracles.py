"""Losses, gradients and closed forms against lightly's losses and the papers' formulas, in float64.

lightly has no MoCo v3: its algorithm 1 is written out in ``oracles``. lightly's W-MSE runs in float64 once it keeps no
running statistics.
"""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.objective.oracles import CASES, MEMORY, OWN_GRADIENT, Drawn, each, relative

EXACT = 1e-10
CLOSED_FORM = 1e-9
WEIGHTS = {
    "simclr": ("temperature",),
    "moco2": ("temperature",),
    "moco3": ("temperature",),
    "barlow_twins": ("redundancy",),
    "vicreg": ("invariance", "variance", "covariance"),
}
"""Options that weigh a loss."""


@st.composite
def drawn(draw: st.DrawFn, case: str) -> Drawn:
    width = draw(st.integers(2, 6))
    options: dict[str, Any] = {key: draw(st.floats(0.05, 3)) for key in WEIGHTS.get(case, ())}
    size = draw(st.integers(2, 12))
    if case == "wmse":  # lightly whitens twice as many images as dimensions, and more
        options["sub_batch"] = draw(st.integers(2 * width, 2 * width + 3))
        size = options["sub_batch"] * draw(st.integers(1, 3))
    seen = draw(st.integers(0, 2 * MEMORY))
    return Drawn(case, draw(st.integers(0, 2**32)), size, width, remembered=seen, **options)


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=12)
@given(data=st.data())
def test_loss_and_gradient_are_the_oracles(case: str, data: st.DataObject) -> None:
    found = data.draw(drawn(case))
    loss, expected = found.compare().loss().loss, found.truth()
    assert loss.dtype == torch.float64
    assert abs(loss - expected) <= EXACT * abs(expected)
    gradient, truth = found.gradient(loss), found.gradient(expected)
    assert torch.linalg.vector_norm(gradient - truth) <= EXACT * torch.linalg.vector_norm(truth)


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=12)
@given(data=st.data())
def test_delta_is_the_gradient_of_the_batchs_sum(case: str, data: st.DataObject) -> None:
    found = data.draw(drawn(case))
    compared = found.compare()
    delta, truth = compared.delta(), found.gradient(found.size * found.truth())
    assert not delta.requires_grad
    assert torch.linalg.vector_norm(delta - truth) <= CLOSED_FORM * torch.linalg.vector_norm(truth)


@pytest.mark.parametrize("case", OWN_GRADIENT)
def test_delta_is_the_gradient_of_each_images_own_loss(case: str) -> None:
    found = Drawn(case, seed=3)
    delta_BVD = found.compare().delta()
    loss_B = each(found.objective, found.output_BVD, found.projection_BVD, found.ids_B)
    for i in range(found.size):
        (gradient_BVD,) = torch.autograd.grad(loss_B[i], found.output_BVD, retain_graph=True)
        assert relative(delta_BVD[i], gradient_BVD[i]) <= CLOSED_FORM
        assert not gradient_BVD[torch.arange(found.size) != i].any()


@pytest.mark.parametrize("case", ["barlow_twins", "vicreg"])
def test_parts_are_what_the_loss_weighs(case: str) -> None:
    weights = {"redundancy": 0.3} if case == "barlow_twins" else {"invariance": 3.0, "variance": 5.0, "covariance": 7.0}
    loss, parts = Drawn(case, seed=1, **weights).compare().loss()
    assert torch.allclose(loss, sum(weights.get(key, 1.0) * part for key, part in parts.items()), rtol=1e-12)  # type: ignore[arg-type]
    only = dict.fromkeys(weights, 0.0)
    for key, part in parts.items():
        if key in weights:
            alone = Drawn(case, seed=1, **only | {key: 1.0}).truth()
            rest = Drawn(case, seed=1, **only).truth()  # what has no weight of its own
            assert torch.allclose(part, alone - rest, rtol=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_further_views_are_the_miners_alone(case: str) -> None:
    """Support views change neither loss nor delta, and are shown to the miner behind the two."""
    found = Drawn(case, seed=4)
    two = found.compare()
    found.projection_BVD = torch.cat((found.projection_BVD, found.numbers(found.size, 1, found.width)), 1)
    three = found.compare()
    assert torch.equal(three.loss().loss, two.loss().loss)
    assert torch.equal(three.delta(), two.delta())
    assert three.seen_BVD.shape == (found.size, 3, found.width)
    assert torch.equal(three.seen_BVD[:, :2], two.seen_BVD)
    assert not three.seen_BVD.requires_grad


@pytest.mark.parametrize("case", ["simclr", "moco2", "moco3"])
@settings(max_examples=12)
@given(data=st.data())
def test_avoided_images_leave_the_denominators(case: str, data: st.DataObject) -> None:
    """Of both views of the anchor: simclr's both views, moco's queue entries or keys of the same id."""
    found = data.draw(drawn(case))
    known = range(-1, 3 * found.size)
    others = [st.sampled_from([other for other in known if other != own]) for own in found.ids_B.tolist()]
    avoid_Bk = torch.tensor([data.draw(st.lists(other, min_size=2, max_size=2)) for other in others])
    compared = found.compare()
    loss, expected = compared.loss(avoid_Bk).loss, found.truth(avoid_Bk)
    assert abs(loss - expected) <= EXACT * abs(expected)
    gradient, truth = found.gradient(loss), found.gradient(expected)
    assert torch.linalg.vector_norm(gradient - truth) <= EXACT * torch.linalg.vector_norm(truth)


@pytest.mark.parametrize("case", ["simclr", "moco2", "moco3"])
def test_nothing_to_avoid_changes_nothing(case: str) -> None:
    found = Drawn(case, seed=5)
    nobody = torch.full((found.size, 2), -1)
    mate = torch.where(torch.arange(found.size)[:, None] == 0, found.ids_B[1], nobody)
    if case == "moco2":
        mate[0] = found.objective.kept["memory"].ids_N[0]  # type: ignore[index]
    plain = found.compare().loss().loss
    assert torch.equal(found.compare().loss(nobody).loss, plain)
    assert found.compare().loss(mate).loss < plain


def test_the_oldest_keys_leave_the_queue_first() -> None:
    """Keys of a batch that went by take their place in turn; a batch later than the queue is long, none is left."""
    found = Drawn("moco2", seed=6, remembered=0)
    memory = found.objective.kept["memory"]
    batches = [(found.numbers(found.size, 2, found.width), found.size * n + torch.arange(found.size)) for n in range(5)]
    for keys_BVD, ids_B in batches:
        found.objective.remember(keys_BVD, ids_B)
    assert memory.ids_N.tolist() == [*range(24, 40), *range(16, 24)]  # type: ignore[union-attr, operator]
    newest = torch.nn.functional.normalize(batches[4][0], dim=-1)
    assert torch.equal(memory.keys_NVD[8:16], newest)  # type: ignore[index]
