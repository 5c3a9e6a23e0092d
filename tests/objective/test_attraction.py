"""The loss towards mined positives: the objective's own pulling term with other images in the positive's place."""

import pytest
import torch
from torch import Tensor

from tests.objective.oracles import CASES, Drawn, attracted, relative


def pulling(case: str, found: Drawn) -> Tensor:
    """What of the plain loss pulls the views together."""
    loss, parts = found.compare().loss()
    match case:
        case "simsiam":
            return loss + 1  # distances, not cosines
        case "barlow_twins":
            return parts["invariance"]
        case "vicreg":
            return found.objective.weights[0] * parts["invariance"]  # type: ignore[attr-defined, no-any-return]
    return loss


@pytest.mark.parametrize("case", CASES)
def test_towards_the_own_other_view_it_is_the_objectives_pull(case: str) -> None:
    found = Drawn(case, seed=1)
    if case == "barlow_twins":  # so that what it adds to variances leaves them at 1 once standardised
        found.output_BVD = (1e5 * found.output_BVD.detach()).requires_grad_()
        found.projection_BVD = found.output_BVD.detach()
    compared = found.compare()
    compared.loss()
    own = compared.attraction(compared.seen_BVD[:, None, :2], torch.ones(found.size, 1))
    expected = pulling(case, found)
    assert abs(own - expected) <= 1e-12 * abs(expected)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", [2, 3])
def test_towards_others_it_is_the_formula(case: str, seed: int) -> None:
    """Value and gradient with two positives an image, of any weights, some of them 0; the divisor stays B."""
    found = Drawn(case, seed)
    compared = found.compare()
    compared.loss()
    seen_BVD = compared.seen_BVD
    index_Bk = torch.randint(found.size, (found.size, 2), generator=found.generator)
    weight_Bk = torch.rand(found.size, 2, generator=found.generator)
    weight_Bk[::3] = 0  # nothing was mined
    weight_Bk[1, 1] = 0
    loss = compared.attraction(seen_BVD[index_Bk], weight_Bk)
    expected = attracted(
        found.objective, found.output_BVD, found.projection_BVD, found.ids_B, seen_BVD[index_Bk], weight_Bk
    )
    assert abs(loss - expected) <= 1e-10 * abs(expected)
    assert relative(found.gradient(loss), found.gradient(expected)) <= 1e-9

    other = torch.where(weight_Bk > 0, index_Bk, (index_Bk + 1) % found.size)
    assert torch.equal(compared.attraction(seen_BVD[other], weight_Bk), loss)


@pytest.mark.parametrize("case", CASES)
def test_nothing_mined_adds_nothing(case: str) -> None:
    found = Drawn(case, seed=4)
    compared = found.compare()
    compared.loss()
    loss = compared.attraction(compared.seen_BVD[:, None], torch.zeros(found.size, 1))
    assert loss == 0
    assert not found.gradient(loss).any()
