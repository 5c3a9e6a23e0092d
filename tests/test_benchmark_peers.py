"""The comparison with peers on tiny shapes: what it measures is what it says, and every part of the claim can fail."""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import harness
from benchmarks import influence_vs_peers as peers

TINY = ["--images=6", "--hidden=32", "--out=8", "--pairs=2", "--slow-pairs=2"]
GOOD = {
    "differences": {"captum": 1e-6, "torch_func": 1e-5},
    "against_products": {"ratio": 0.9},
    "against_captum_without_forward": {"ratio": 0.5},
    "against_captum": {"ratio": 1.3},
    "against_torch_func": {"ratio": 40.0},
    "peak_bytes": {"ours": 10, "captum": 5, "torch_func": 1000},
}


@given(images=st.integers(2, 6), views=st.integers(1, 3), width=st.integers(2, 9), seed=st.integers(0, 9))
def test_every_candidate_gives_the_same_scores(images: int, views: int, width: int, seed: int) -> None:
    case = peers.draw(images, views, 2 * width, width, seed)
    scores, no_bias = peers.ours(case), peers.ours_without_bias(case)
    assert scores.shape == (images, images)
    for chunk in (None, 2):
        assert peers.difference(scores, peers.torch_func(case, chunk)) <= peers.TOLERANCE
    for forward in (True, False):
        assert peers.difference(no_bias, peers.captum(case, forward=forward)()) <= peers.TOLERANCE


def test_other_scores_are_seen() -> None:
    case = peers.draw(6, 2, 32, 8)
    swapped = case._replace(target=case.target.flip(1))
    assert peers.difference(peers.ours(swapped), peers.torch_func(case)) > 100 * peers.TOLERANCE
    assert peers.difference(peers.ours(case), peers.captum(case)()) > 100 * peers.TOLERANCE, "the bias"


def test_peak_bytes_counts_what_is_held_at_once() -> None:
    size = 4 * 100 * 100

    def one_after_another() -> None:
        for _ in range(3):
            torch.ones(100, 100)

    def together() -> list[torch.Tensor]:
        return [torch.ones(100, 100) for _ in range(3)]

    before = torch.ones(100, 100)
    assert harness.peak_bytes(before.relu_) == 0
    assert harness.peak_bytes(one_after_another) == size
    assert harness.peak_bytes(together) == 3 * size


def test_torch_func_holds_every_gradient_and_ours_none() -> None:
    case = peers.draw(16, 2, 512, 32)
    assert case.gradients_bytes == 16 * (512 * 32 + 32) * 4
    assert case.gradients_bytes <= harness.peak_bytes(lambda: peers.torch_func(case)) <= 1.2 * case.gradients_bytes
    assert harness.peak_bytes(lambda: peers.ours(case)) < 0.1 * case.gradients_bytes


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("against_captum", "ratio"), 1.299),
        (("against_torch_func", "ratio"), 39.9),
        (("peak_bytes", "torch_func"), 999),
        (("differences", "captum"), 1.1e-5),
        (("differences", "torch_func"), float("nan")),
    ],
)
def test_the_claim_can_fail(path: tuple[str, str], value: float) -> None:
    assert peers.summarise(GOOD)["holds"]
    found: dict[str, Any] = copy.deepcopy(GOOD)
    found[path[0]][path[1]] = value
    assert not peers.summarise(found)["holds"]


@pytest.mark.parametrize(("bounds", "code"), [({}, 0), ({"torch_func_memory": 1e9}, 1)])
def test_the_command_prints_saves_and_says_whether_it_holds(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    bounds: dict[str, float],
    code: int,
) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr(peers, "BOUNDS", bounds)
    monkeypatch.setattr(sys, "argv", ["influence_vs_peers", *TINY, "--threads=1", "--save"])
    with pytest.raises(SystemExit) as exit_:
        peers.main()
    assert exit_.value.code == code
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(record)[-1] == "ratio"
    assert record["agrees"]
    assert record["environment"]["threads"] == 1
    assert record["against_torch_func"]["pair_ratio"]["count"] == 2
    assert record == json.loads((tmp_path / "influence_vs_peers.json").read_text(encoding="utf-8"))
