import os
from pathlib import Path

# Before anybody imports torch: test processes, and the ranks they start, share few cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# This suite is the CPU's on every machine: its forked ranks could not use CUDA. `make gpu` runs tests/gpu without it.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["DS_ACCELERATOR"] = "cpu"

import pytest
from hypothesis import HealthCheck, settings

# The same examples in every run, and no deadline: a slow machine is no failure.
settings.register_profile(
    "tracekin", deadline=None, derandomize=True, max_examples=25, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("tracekin")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--data", metavar="DIR", help="folder of real image archives; tests that need it are skipped without"
    )
    parser.addoption("--faults", action="store_true", help="every try of tests/faults and every pair of worlds")


@pytest.fixture(scope="session")
def data_folder(request: pytest.FixtureRequest) -> Path:
    """The folder of real images given by --data."""
    given = request.config.getoption("--data")
    if given is None:
        pytest.skip("needs real images: give their folder with --data DIR")
    folder = Path(given)
    if not folder.is_dir():
        pytest.skip(f"needs real images: --data {given} is no folder")
    return folder
