import importlib
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# The tests compute small things; more threads, here or in processes started, would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes started: torch here has read it already
torch.set_num_threads(1)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

# `python -m pytest` alone runs these files in a second process beside the others, half of the time each; with
# any argument everything runs in one.
SECOND_HALF = ("test_cli.py", "test_denoise.py", "test_distributed.py", "test_eval.py", "test_faults.py",
               "test_hinas.py", "test_judge.py", "test_latency.py", "test_reproduce.py")


@pytest.fixture(autouse=True)
def seeds():
    """Every test begins with the same random state, whatever ran before it."""
    import numpy as np
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def in_this_process(monkeypatch):
    """The commands of reproduce.py and judge.py run without a process of their own, which takes seconds."""
    import run

    def run_here(line):
        importlib.import_module(Path(line[1]).stem).main(line[2:])
        return 0

    monkeypatch.setattr(run, "run_script", run_here)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run what takes many minutes, and nothing else")
    parser.addoption("--half", choices=("0", "1"), help="only the files of one of the two processes")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes many minutes; run with --slow")
    config.addinivalue_line("markers", "cuda: needs a GPU; python -m pytest -m cuda runs these alone")
    config.second = None
    if not config.invocation_params.args and (os.cpu_count() or 1) > 1:
        config.option.half = "0"
        config.second = subprocess.Popen([sys.executable, "-m", "pytest", "--half", "1"], cwd=config.rootpath,
                                         text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def pytest_collection_modifyitems(config, items):
    half = config.getoption("--half")
    if half:
        items[:] = [item for item in items if (item.path.name in SECOND_HALF) == (half == "1")]
    wanted = config.getoption("--slow")
    reason = "only the slow ones were asked for" if wanted else "slow: run with --slow"
    for item in items:
        if ("slow" in item.keywords) != wanted:
            item.add_marker(pytest.mark.skip(reason=reason))
        if "cuda" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def pytest_sessionfinish(session, exitstatus):
    if session.config.second is not None:
        session.config.second_output, _ = session.config.second.communicate()
        if session.config.second.returncode != 0:
            session.exitstatus = exitstatus or session.config.second.returncode


def pytest_terminal_summary(terminalreporter, config):
    if config.second is not None:
        terminalreporter.section("the other process")
        terminalreporter.write(config.second_output)


def pytest_unconfigure(config):
    if getattr(config, "second", None) is not None and config.second.poll() is None:
        config.second.terminate()
