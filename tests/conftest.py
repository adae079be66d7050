import os
import sys
from pathlib import Path

import pytest

# The tests compute small things; further threads, of this process and those it starts, would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run what takes many minutes, and nothing else")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes many minutes; run with --slow")


def pytest_collection_modifyitems(config, items):
    wanted = config.getoption("--slow")
    skip = pytest.mark.skip(reason="slow: run with --slow" if not wanted else "only the slow ones were asked for")
    for item in items:
        if ("slow" in item.keywords) != wanted:
            item.add_marker(skip)
