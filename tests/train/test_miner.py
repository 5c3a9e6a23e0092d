"""What the miner adds to a policy: images of past steps count by their age, in the choice and in what is compared."""

import pytest
import torch
from torch import Tensor

from tests.influence import naive
from tests.train.tiny_run import BATCH, CPU, context, global_batch, miner, networks
from tracekin.influence import Candidates, Factors, Pool
from tracekin.monitor.metrics import Meter
from tracekin.train.record import measure
from tracekin.train.step import Found, loss_with_mined_positives

STEPS = (3, 4, 7)  # of other images each
HALF_LIFE = 30.0


def mined(policy: str, half_life: float) -> tuple[list[Found], dict[str, float]]:
    """What each step finds with a queue that holds them all, and the last step's sums with its own policy compared."""
    online, objective = networks(torch.float64)
    compared = policy if policy == "feature" else "none"
    found = miner(objective, policy, queue=len(STEPS) * BATCH, queue_half_life=half_life, compare=compared)
    history, meter = [], Meter(CPU)
    for step in STEPS:
        losses = loss_with_mined_positives(
            online, objective, global_batch(torch.float64, seed=step), found, **context(step)
        )
        assert losses.found is not None
        history.append(losses.found)
        meter = Meter(CPU)
        measure(meter, losses, found, step)
    return history, meter.flush()


def expected_ids(policy: str, history: list[Found], half_life: float) -> Tensor:
    """[B] ids that the last step's images should choose, by the policy's definition times each image's age."""
    rows, sides = history[-1].rows, [found.rows for found in history]
    layers = [
        Factors(*map(torch.cat, zip(*layer, strict=True))) for layer in zip(*(s.factors for s in sides), strict=True)
    ]
    small = [torch.cat(column) for column in zip(*(side[1:5] for side in sides), strict=True)]
    age = (STEPS[-1] - torch.tensor(STEPS)).repeat_interleave(BATCH)
    columns = Candidates(tuple(layers), *small, weight=0.5 ** (age / half_life) if half_life else None)
    score = naive.score(policy, Pool(rows, columns, 0, STEPS[-1]))
    return columns.ids[score.masked_fill(rows.groups[:, None] == columns.groups, -torch.inf).argmax(1)]


@pytest.mark.parametrize("policy", ["feature", "tracin_cosine"])
def test_older_images_count_less(policy: str) -> None:
    chosen: dict[float, Tensor] = {}
    for half_life in (0.0, HALF_LIFE):
        history, _ = mined(policy, half_life)
        last = history[-1]
        chosen[half_life] = last.columns.ids[last.mined.index[:, 0]]
        assert torch.equal(chosen[half_life], expected_ids(policy, history, half_life))
    assert not torch.equal(chosen[0.0], chosen[HALF_LIFE])
    assert set(chosen[HALF_LIFE].tolist()) - set(history[-1].rows.ids.tolist())  # and still some of them are chosen


def test_the_policy_beside_sees_the_same_ages() -> None:
    """A policy compared with itself agrees with itself wherever it chose anything."""
    _, sums = mined("feature", HALF_LIFE)
    assert sums["num_compared"] == sums["num_mined"] > 0
    assert sums["same"] == sums["num_compared"]
