"""No failure loses more than the declared interval, none corrupts a run, none hangs it; a resumed run is the same.

``make test`` makes a few tries, ``make faults`` (pytest --faults) all of them and prints a table.
"""

from pathlib import Path

import pytest

from tests.faults.faults import FAULTS, Fault, lacking
from tests.faults.table import table
from tests.faults.trial import RESULTS, Chance, Lab, Result, resumed_from
from tests.train.test_elastic import run_pairs

SAME_WORLD, OTHER_WORLD = "resumed in the same world", "resumed in another world"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "fault" in metafunc.fixturenames:
        every = metafunc.config.getoption("--faults")
        pairs = [(fault, n) for fault in FAULTS for n in range(fault.tries if every else fault.quick)]
        metafunc.parametrize(("fault", "number"), pairs, ids=[f"{fault.name}-{n}" for fault, n in pairs])


def test_a_fault_is_survived(lab: Lab, fault: Fault, number: int) -> None:
    if lack := lacking(fault):
        pytest.skip(f"{fault.name} needs {lack}")
    result = Result()  # of a try that raises: neither survived nor identical
    try:
        result = fault.attempt(lab, Chance(fault.name, number))
        result.must(result.lost is None or result.lost <= fault.most_lost, f"lost more than {fault.most_lost} steps")
    finally:
        RESULTS[fault.name].append(result)
    assert result.survived, result.described()
    assert result.identical, result.described()


@pytest.mark.timeout(1500)  # 99 runs: minutes, on a slow machine many
def test_every_pair_of_worlds(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Nine of them are in tests/train/test_elastic.py."""
    if not request.config.getoption("--faults"):
        pytest.skip("81 pairs of runs: make faults")
    forms = [(ranks, stage) for ranks in (1, 2, 4) for stage in (0, 1, 2)]
    pairs = [(first, second) for first in forms for second in forms]
    found: dict[tuple[tuple[int, int], tuple[int, int]], str] = {}
    try:
        found = run_pairs(tmp_path, pairs)
    finally:
        for pair in pairs:
            same, wrong = pair[0] == pair[1], found.get(pair, "it did not come so far")
            result = Result(finished=True, identical=not wrong if same else None)
            result.must(not wrong, wrong)
            RESULTS[SAME_WORLD if same else OTHER_WORLD].append(result)
    assert not any(found.values()), {pair: wrong for pair, wrong in found.items() if wrong}


def test_a_run_that_broke_after_its_last_checkpoint_lost_nothing(tmp_path: Path) -> None:
    (tmp_path / "starts.jsonl").write_text('{"event": "start", "step": 0}\n{"event": "start", "step": 8}\n')
    assert resumed_from(tmp_path, ["step 9/40", ""]) == 8
    assert resumed_from(tmp_path, [f"{tmp_path} is finished: 40 of 40 steps. Nothing to do.\n", ""]) == 40


def test_the_table_claims_what_was_seen_and_fits_a_terminal() -> None:
    good, raised = Result(lost=3, finished=True, identical=True), Result()
    differs, elsewhere = Result(lost=0, finished=True, identical=False), Result(finished=True, identical=None)
    late = Result(lost=9, finished=True, identical=True)
    late.must(False, "lost more than 8 steps")
    rows = [line.split("|") for line in table({"a": [good, raised], "b": [differs, late], "c": [elsewhere]})]
    cells = [[cell.strip() for cell in row[1:-1]] for row in rows if len(row) == 7]
    assert cells[2:] == [
        ["a", "2", "1", "3 to 3", "1 of 2"],
        ["b", "2", "1", "0 to 9", "1 of 2"],
        ["c", "1", "1", "-", "-"],
    ]
    names = [*(fault.name for fault in FAULTS), SAME_WORLD, OTHER_WORLD]
    assert max(map(len, table(dict.fromkeys(names, [good] * 99)))) <= 80
