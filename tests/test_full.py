"""The table of what the default run leaves out is up to date, and leaves no method out of a whole test."""

from __future__ import annotations

from pathlib import Path

from full import TAKEN, left_out

TESTS = Path(__file__).parent


def test_every_row_names_a_test():
    for name in TAKEN:
        file, test = name.split("::")
        assert f"def {test}(" in (TESTS / file).read_text(encoding="utf-8"), name


class Item:
    def __init__(self, nodeid: str) -> None:
        self.nodeid = nodeid


def test_cases_are_spread_evenly():
    name = "test_compile.py::test_one_graph"
    items = [Item(f"tests/{name}[{i}]") for i in range(48)]
    gone = left_out(items)
    taken = [i for i in range(48) if f"tests/{name}[{i}]" not in gone]
    assert taken == [12, 36] and len(taken) == TAKEN[name]
    assert left_out([Item("tests/test_tome.py::test_other[1]")]) == set()
    few = [Item(f"tests/{name}[{i}]") for i in range(2)]
    assert left_out(few) == set()  # fewer than the default run takes


def test_every_parameter_of_a_product_stays():
    name, methods, models = "test_matrix.py::test_reduction", range(20), range(40)
    items = [Item(f"tests/{name}[m{a}-b{b}]") for a in methods for b in models]
    gone = left_out(items)
    stay = [item.nodeid for item in items if item.nodeid not in gone]
    assert {case.split("[")[1].split("-")[0] for case in stay} == {f"m{a}" for a in methods}
    assert {case.split("-")[1] for case in stay} == {f"b{b}]" for b in models}
    assert TAKEN[name] <= len(stay) <= TAKEN[name] + 60
