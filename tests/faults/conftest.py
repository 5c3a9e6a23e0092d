"""The table of ``make faults``: fault, tries, survived, steps lost, identical after resume."""

import json
import os
from pathlib import Path

import pytest

from tests.faults.table import table
from tests.faults.trial import RESULTS, Lab


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("faults"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not RESULTS:
        return
    terminalreporter.section("faults")
    for line in table(RESULTS):
        terminalreporter.write_line(line)
    if path := os.environ.get("FAULTS_JSON"):
        found = {name: [result.facts() for result in results] for name, results in RESULTS.items()}
        Path(path).write_text(json.dumps(found, indent=1) + "\n")
