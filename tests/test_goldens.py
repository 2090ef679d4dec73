"""No recorded number is left unread, and what is not read is said."""

import importlib
from pathlib import Path

import goldens
import pytest


@pytest.mark.golden
def test_every_case_is_read_by_some_test():
    for path in Path(__file__).parent.glob("test_golden_*.py"):
        importlib.import_module(path.stem)
    importlib.import_module("test_visualize")
    there = {(f, name) for method in goldens.LANDED for f in goldens.files(method) for name in goldens.case_names(f)}
    assert there, f"no recorded numbers below {goldens.ROOT}"
    unread = sorted(there - goldens.READ)
    assert not unread, f"read by no test: {unread}"


@pytest.mark.golden
@pytest.mark.parametrize("file", goldens.left_alone())
def test_file_that_is_not_understood(file: str):
    pytest.skip(goldens.left_alone()[file])
