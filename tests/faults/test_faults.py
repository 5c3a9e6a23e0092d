"""No failure loses more than the declared interval, none corrupts a run, none hangs it; a resumed run is the same.

``make test`` makes a few tries, ``make faults`` (pytest --faults) all of them and prints a table.
"""

import random

import pytest

from tests.faults.faults import FAULTS, Fault, lacking
from tests.faults.trial import RESULTS, Lab


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
