"""Mined images through the step: pulled towards the anchor, or left out of its negatives; for every objective.

Shape suffixes: B images, V views, k mined an image, D projection width.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.objective.oracles import CASES, STEP, attracted, relative, truth
from tests.train.tiny_run import context, global_batch, miner, networks
from tracekin.influence.selection import positive_weights
from tracekin.train.step import Losses, loss_with_mined_positives

POLICIES: dict[str, dict[str, Any]] = {
    "group": {"policy": "group"},  # patients, from metadata
    "fnc": {"policy": "fnc", "support_views": 2},
    "tracin_cosine": {"policy": "tracin_cosine", "k": 2},
}
CONTRASTIVE = ("simclr", "moco2", "moco3")
WEIGHT = 0.25


class Stepped:
    """A step of images whose keys of an earlier epoch moco's queue holds, beside those of other images."""

    def __init__(self, case: str, policy: str, weight: float = WEIGHT, **mining: Any) -> None:
        self.online, self.objective = networks(torch.float64, **CASES[case])
        self.miner = miner(self.objective, **POLICIES[policy], **mining)
        for seed in (1, 4):
            earlier = self.step(seed, weight)
            self.objective.remember(earlier.projection_BVD, self.batch.index)
        self.losses = self.step(1, weight)
        assert self.losses.found is not None
        self.found = self.losses.found
        self.index_Bk = self.found.mined.index
        self.chosen_Bk = torch.where(self.index_Bk < 0, -1, self.found.columns.ids[self.index_Bk])

    def step(self, seed: int, weight: float) -> Losses:
        self.batch = global_batch(torch.float64, seed=seed, views=2 + self.miner.mining.support_views)
        now: dict[str, Any] = context(STEP) | {"weight": weight}
        return loss_with_mined_positives(self.online, self.objective, self.batch, self.miner, **now)

    def outputs(self) -> tuple[Any, Tensor, Tensor, Tensor]:
        """What the oracles take: the objective, and what the last step's views become once more."""
        outputs = self.online(self.batch.views[:2])
        return self.objective, outputs.output, self.objective.project(self.batch.views, outputs, STEP), self.batch.index

    def gradient(self, loss: Tensor) -> Tensor:
        parts = torch.autograd.grad(loss, [*self.online.parameters()])
        return torch.cat([part.flatten() for part in parts])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("case", CASES)
def test_attracts_what_was_mined(case: str, policy: str) -> None:
    stepped = Stepped(case, policy)
    losses, found = stepped.losses, stepped.found
    assert (stepped.chosen_Bk >= 0).any()
    assert not found.columns.target.requires_grad  # no gradient flows into positives
    outputs = stepped.outputs()
    mined = attracted(*outputs, found.columns.target[stepped.index_Bk], positive_weights(found.mined))
    expected = truth(*outputs) + WEIGHT * mined
    assert abs(losses.parts["mined"] - mined) <= 1e-10 * abs(mined)
    assert abs(losses.loss - expected) <= 1e-10 * abs(expected)
    assert relative(stepped.gradient(losses.loss), stepped.gradient(expected)) <= 1e-9


@pytest.mark.parametrize("policy", [*POLICIES, "remembered"])
@pytest.mark.parametrize("case", CONTRASTIVE)
def test_eliminates_exactly_what_was_mined(case: str, policy: str) -> None:
    mining: dict[str, Any] = {"queue": 32} if policy == "remembered" else {}
    stepped = Stepped(case, "tracin_cosine" if mining else policy, mode="eliminate", **mining)
    losses = stepped.losses
    outputs = stepped.outputs()
    expected, plain = truth(*outputs, stepped.chosen_Bk), truth(*outputs)
    assert losses.loss < plain
    assert abs(losses.loss - expected) <= 1e-10 * abs(expected)
    assert relative(stepped.gradient(losses.loss), stepped.gradient(expected)) <= 1e-9
    assert losses.parts["mined"] == 0
    assert torch.equal(losses.parts[stepped.objective.name], losses.loss)
    if policy == "group":
        assert torch.equal(stepped.chosen_Bk, stepped.batch.index.view(-1, 2).flip(1).view(-1, 1))  # pairs are groups
    if mining:  # images that only the queues hold
        assert set(stepped.chosen_Bk.flatten().tolist()) - {-1, *stepped.batch.index.tolist()}


@pytest.mark.parametrize("case", CONTRASTIVE)
def test_the_warm_up_eliminates_nothing(case: str) -> None:
    stepped = Stepped(case, "group", weight=0, mode="eliminate")
    plain = truth(*stepped.outputs())
    assert abs(stepped.losses.loss - plain) <= 1e-10 * abs(plain)
    assert (stepped.chosen_Bk >= 0).all()  # it was mined all the same
