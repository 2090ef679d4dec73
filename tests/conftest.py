import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))

from figures import figure, tell  # noqa: E402, F401 (the folder of the tests has to be found first)
from full import left_out  # noqa: E402

torch.set_num_threads(1)
settings.register_profile("seeded", derandomize=True, deadline=None)
settings.load_profile("seeded")


def _seed():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def seeded_module():
    """What fixtures of a module draw does not depend on the tests before."""
    _seed()


@pytest.fixture(autouse=True)
def seeded(seeded_module):
    """What a test draws without a generator of its own depends on nothing but the test."""
    _seed()


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="every case of every test, see tests/full.py")
    parser.addoption("--figures", nargs="?", const="-", help="a table of what checks measured, see tests/figures.py")


def pytest_collection_modifyitems(config, items):
    """Marks what the default run leaves out, and deselects it unless --full or a node id asks for it."""
    named = any("::" in arg for arg in config.args)
    gone = left_out(items)
    for item in items:
        if item.nodeid in gone:
            item.add_marker(pytest.mark.full)
    if not (config.getoption("--full") or named or "full" in (config.getoption("-m") or "")):
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in gone])
        items[:] = [item for item in items if item.nodeid not in gone]


def pytest_terminal_summary(terminalreporter):
    """Recorded numbers that no test reads are named, however quiet the run is; and what checks measured, if asked."""
    tell(terminalreporter, terminalreporter.config.getoption("--figures"))
    reasons = {str(report.longrepr[2]) for report in terminalreporter.stats.get("skipped", [])}
    named = sorted(reason.removeprefix("Skipped: ") for reason in reasons if " is not understood: " in reason)
    if named:
        terminalreporter.section("recorded numbers that were not compared")
    for reason in named:
        terminalreporter.line(reason)
