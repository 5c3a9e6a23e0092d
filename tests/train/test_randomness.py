"""Every rank's generators go on where a checkpoint left them: torch's, Python's and numpy's, and half-drawn pairs."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.data.tiny import make_dataset
from tests.ranks import run_ranks
from tests.train.same import differing
from tests.train.test_run import stop_after, tiny_config
from tests.train.tiny_run import tiny_backbone
from tracekin import checkpoint
from tracekin.config import Config
from tracekin.train.randomness import gather_random_state, restore_random_state

CPU = torch.device("cpu")


def seed(number: int) -> None:
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)


def draw() -> list[float]:
    """From all generators; one Gaussian each, of which Python and numpy draw two and keep the second."""
    uniform = [torch.rand(()).item(), random.random(), float(np.random.random())]
    return [*uniform, torch.randn(()).item(), random.gauss(0, 1), float(np.random.standard_normal())]


def gathered(rank: int, folder: Path) -> list[list[list[float]]]:
    """What a rank draws after its state was saved, and once that was restored; after no, one and two pairs' halves."""
    return [_gathered(rank, draws, folder) for draws in (0, 1, 2)]


def _gathered(rank: int, draws: int, folder: Path) -> list[list[float]]:
    seed(100 + rank)
    for _ in range(draws):
        draw()
    waiting = [random.getstate()[2] is not None, bool(np.random.get_state()[3])]
    assert waiting == [draws % 2 == 1] * 2  # the second Gaussian of a pair
    states = gather_random_state(CPU)
    if rank == 0:  # through a file, as in a run
        saved = checkpoint.save(folder, draws, {"ranks": states, "model": {}, "optimiser": {}}, {})
        states = checkpoint.load_part(saved, "ranks")
    first = [number for _ in range(3) for number in draw()]
    seed(0)
    draw()
    restore_random_state(states, CPU)
    return [first, [number for _ in range(3) for number in draw()]]


@pytest.mark.parametrize("world_size", [1, 2])
def test_each_rank_goes_on_where_it_was(world_size: int, tmp_path: Path) -> None:
    found = [case for rank in run_ranks(gathered, world_size, tmp_path) for case in rank]
    assert all(again == first for first, again in found)
    assert len({tuple(first) for first, _ in found}) == 3 * world_size  # each its own


def gathered_alone(rank: int) -> dict[str, Tensor]:
    seed(rank)
    return gather_random_state(CPU)


def restored(rank: int, states: dict[str, Tensor]) -> list[list[float]]:
    """What a rank draws as it was seeded, and as it was seeded and given the state of another world."""
    seed(200 + rank)
    first = draw()
    seed(200 + rank)
    restore_random_state(states, CPU)
    return [first, draw()]


@pytest.mark.parametrize(("saved", "resumed"), [(1, 2), (2, 1)])
def test_another_world_leaves_the_generators_as_seeded(saved: int, resumed: int) -> None:
    states = run_ranks(gathered_alone, saved)[0]
    assert all(again == first for first, again in run_ranks(restored, resumed, states))


def test_a_state_of_another_kind_of_device_is_left() -> None:
    states = run_ranks(gathered_alone, 1)[0]
    on_cuda = states | {"cuda": states["torch"]}
    assert all(again == first for first, again in run_ranks(restored, 1, on_cuda))


def run_drawing(rank: int, config: Config, number: int) -> dict[int, list[float]]:
    """A run whose process was seeded with a number of its own, and what each of its steps draws."""
    from tracekin.train import loop

    drawn: dict[int, list[float]] = {}
    original = loop.train_step

    def drawing(*args: Any, **context: Any) -> Any:
        drawn[context["step"]] = draw()
        return original(*args, **context)

    loop.train_step = drawing
    seed(number + rank)
    with tiny_backbone():
        loop.pretrain(config)
    return drawn


def test_the_steps_of_a_resumed_run_draw_what_those_of_an_unbroken_one_draw(tmp_path: Path) -> None:
    """Stopped in the middle of an epoch, after an odd number of draws; the loader is made anew, and draws elsewhere."""
    make_dataset(tmp_path / "data", train=50, val=4, test=4)
    overrides = ("train.save_every=5", "train.zero_stage=1", "mining.queue=32", "mining.warmup=0")
    whole = tiny_config(tmp_path, *overrides)
    unbroken = run_ranks(run_drawing, 2, whole, 1000)
    resumed = stop_after(whole, 5, tmp_path / "resumed")
    again = run_ranks(run_drawing, 2, resumed, 2000)
    assert [sorted(drawn) for drawn in again] == [[*range(5, 12)]] * 2
    assert again == [{step: drawn[step] for step in range(5, 12)} for drawn in unbroken]
    assert unbroken[0] != unbroken[1]
    assert differing(*(config.run_folder / "checkpoints" / "step-00000012" for config in (whole, resumed))) == []
