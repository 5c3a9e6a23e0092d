import subprocess
import sys

import numpy as np
import pytest
from scipy import stats

from tracekin.evaluate.seeds import Estimate, Result, Score, groups_of, over_seeds, paired, t_975


def result(
    policy: str,
    seed: int,
    knn: float,
    *,
    baselines: dict[str, float] | None = None,
    hit: float | None = None,
    **more: object,
) -> Result:
    extra = {key.replace("__", "."): value for key, value in more.items()}
    return Result(
        {"mining.policy": policy, **extra},
        seed,
        "phantom",
        {"knn": Score(knn, 0.02), "linear": Score(knn + 0.1, 0.02)},
        {name: {"knn": Score(value, 0.01)} for name, value in (baselines or {}).items()},
        {"hit_rate": hit},
    )


def test_means_errors_and_intervals_are_those_of_a_t_test() -> None:
    values = [0.51, 0.55, 0.49, 0.6, 0.58]
    found = over_seeds([Score(value, 9.0) for value in values])
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert found.mean == pytest.approx(np.mean(values))
    assert found.error == pytest.approx(stats.sem(values))
    assert found.interval == pytest.approx((expected.low, expected.high), abs=1e-4)
    assert found.num_seeds == 5


def test_one_seed_has_its_bootstrap_error_and_no_interval() -> None:
    assert over_seeds([Score(0.5, 0.02)]) == Estimate(0.5, 0.02, None, 1)
    assert paired({0: Score(0.6, 0.1)}, {0: Score(0.5, 0.1)}) == Estimate(pytest.approx(0.1), None, None, 1)
    assert not Estimate(0.1, None, None, 1).excludes_zero


@pytest.mark.parametrize("degrees", [1, 2, 9, 10, 11, 15, 30, 100, 1000])
def test_quantiles_of_t(degrees: int) -> None:
    assert t_975(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), abs=5e-4)


def test_differences_are_paired_by_seed_over_the_seeds_in_both() -> None:
    """Scores that vary much from seed to seed, and a difference that does not."""
    plain = [0.3, 0.5, 0.4, 0.7]
    results = [result("none", seed, value) for seed, value in enumerate(plain)]
    results += [result("tracin", seed, plain[seed] + 0.1 + 0.01 * (seed % 2)) for seed in (3, 1, 0)]
    results += [result("tracin", 9, 0.0)]  # no control has this seed
    none, tracin = groups_of(results)
    difference = tracin.differences["knn"]
    test = stats.ttest_rel([0.4, 0.61, 0.81], [0.3, 0.5, 0.7])
    assert difference.num_seeds == 3
    assert difference.mean == pytest.approx(np.mean([0.1, 0.11, 0.11]))
    assert difference.interval == pytest.approx(tuple(test.confidence_interval(0.95)), abs=1e-4)
    assert difference.excludes_zero
    unpaired = stats.ttest_ind([0.4, 0.61, 0.81], [0.3, 0.5, 0.7]).confidence_interval(0.95)
    assert unpaired.low < 0  # what pairing is for
    assert not none.differences
    assert (none.num_seeds, tracin.num_seeds) == (4, 4)


def test_a_difference_around_zero_is_not_said_to_exclude_it() -> None:
    results = [result("none", s, 0.5) for s in range(3)]
    results += [result("random", s, 0.5 + d) for s, d in enumerate((-0.1, 0.1, 0.05))]
    assert not groups_of(results)[1].differences["knn"].excludes_zero
    below = results[:3] + [result("random", s, 0.4 + 0.001 * s) for s in range(3)]
    assert groups_of(below)[1].differences["knn"].excludes_zero


def test_the_control_has_the_same_other_values_but_mining_keys_do_nothing_without_a_policy() -> None:
    results = [result("none", 0, 0.5, mining__k=1, optimiser__lr=0.1), result("none", 0, 0.7, optimiser__lr=0.2)]
    results += [result("tracin", 0, 0.6, mining__k=4, optimiser__lr=0.1)]
    results += [result("tracin", 0, 0.6, mining__k=4, optimiser__lr=0.3)]
    groups = groups_of(results)
    assert groups[2].differences["knn"].mean == pytest.approx(0.1)
    assert not groups[3].differences


def test_seeds_of_one_assignment_are_one_group_in_the_order_met() -> None:
    results = [result("b", 0, 0.1, hit=0.2), result("a", 0, 0.2), result("b", 1, 0.3, hit=0.4)]
    groups = groups_of(results)
    assert [group.assignment["mining.policy"] for group in groups] == ["b", "a"]
    assert groups[0].rates == {"hit_rate": pytest.approx(0.3)}
    assert groups[1].rates == {"hit_rate": None}
    assert groups[0].estimates["linear"].mean == pytest.approx(0.3)


def test_baselines_stand_once_the_untrained_encoder_over_its_seeds() -> None:
    results = [
        result(policy, seed, 0.5, baselines={"pixels": 0.25, "untrained": 0.3 + 0.1 * seed}, model__backbone=backbone)
        for backbone in ("resnet18", "resnet50")
        for policy in ("none", "tracin")
        for seed in (0, 1)
    ]
    pixels, small, large, *_ = groups_of(results)
    assert (pixels.baseline, pixels.num_seeds, pixels.estimates["knn"]) == ("pixels", 1, (0.25, 0.01, None, 1))
    assert (small.baseline, small.assignment) == ("untrained", {"model.backbone": "resnet18"})
    assert large.assignment == {"model.backbone": "resnet50"}
    assert (small.num_seeds, small.estimates["knn"].mean) == (2, pytest.approx(0.35))
    assert small.estimates["knn"].error == pytest.approx(0.05)


def test_scores_of_different_datasets_are_never_put_together() -> None:
    other = Result({}, 0, "another", {}, {})
    with pytest.raises(AssertionError):
        groups_of([result("none", 0, 0.5), other])


def test_torch_is_not_imported() -> None:
    code = "import sys, tracekin.evaluate.seeds; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
