"""No failure loses more than the declared interval, none corrupts a run, none hangs it; a resumed run is the same.

``make test`` makes a few tries, ``make faults`` (pytest --faults) all of them and prints a table.
"""

import random
from pathlib import Path

import pytest

from tests.faults.faults import FAULTS, Fault, lacking
from tests.faults.trial import RESULTS, Lab, Result
from tests.train.test_elastic import STEPS, run_pairs


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "fault" in metafunc.fixturenames:
        every = metafunc.config.getoption("--faults")
        pairs = [(fault, n) for fault in FAULTS for n in range(fault.tries if every else fault.quick)]
        metafunc.parametrize(("fault", "number"), pairs, ids=[f"{fault.name}-{n}" for fault, n in pairs])


def test_a_fault_is_survived(lab: Lab, fault: Fault, number: int) -> None:
    if lack := lacking(fault):
        pytest.skip(f"{fault.name} needs {lack}")
    result = fault.attempt(lab, random.Random(f"{fault.name}-{number}"))
    if result.lost > fault.most_lost:
        result.wrong.append(f"{result.lost} steps lost, more than {fault.most_lost}")
    RESULTS[fault.name].append(result)
    assert not result.wrong, "\n".join(result.wrong)


def test_every_pair_of_worlds(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Nine of them are in tests/train/test_elastic.py."""
    if not request.config.getoption("--faults"):
        pytest.skip("81 pairs of runs: make faults")
    forms = [(ranks, stage) for ranks in (1, 2, 4) for stage in (0, 1, 2)]
    found = run_pairs(tmp_path, [(first, second) for first in forms for second in forms])
    for (first, second), wrong in found.items():
        name = "resumed in the same world" if first == second else "resumed in another world (losses to 1e-4)"
        RESULTS[name].append(Result(STEPS, 0, [0], [wrong] if wrong else []))
    assert not any(found.values()), {pair: wrong for pair, wrong in found.items() if wrong}
