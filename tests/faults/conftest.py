"""The table of ``make faults``: fault, tries, survived, steps lost, identical after resume."""

import json
import os
from pathlib import Path

import pytest

from tests.faults.trial import RESULTS, Lab


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("faults"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not RESULTS:
        return
    rows = []
    for name, results in RESULTS.items():
        good = sum(not result.wrong for result in results)
        lost = [result.lost for result in results]
        rows.append((name, str(len(results)), str(good), f"{min(lost)} to {max(lost)}", f"{good} of {len(results)}"))
    header = ("fault", "tries", "survived", "steps lost", "identical")
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    terminalreporter.section("faults")
    for row in [header, tuple("-" * width for width in widths), *rows]:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        terminalreporter.write_line("| " + " | ".join(cells) + " |")
    if path := os.environ.get("FAULTS_JSON"):
        found = {name: [vars(result) for result in results] for name, results in RESULTS.items()}
        Path(path).write_text(json.dumps(found, indent=1) + "\n")
