"""Options that many methods share are described once, and in the docstring of every method that has them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest

import tokenzoo
from tokenzoo.core import registry
from tokenzoo.core.describing import SHARED, complete, described
from tokenzoo.core.keep_rate import KeepRate
from tokenzoo.core.schedule import Keep, Remove, Schedule


@pytest.fixture
def registered(monkeypatch):
    """`register` whose entries are gone afterwards."""
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    return tokenzoo.register


@pytest.mark.parametrize("name", tokenzoo.list_methods())
def test_every_option_is_described(name: str):
    cls = tokenzoo.method_class(name)
    assert described(cls.__doc__) == set(cls.options())
    before = cls.__doc__
    complete(cls)
    assert cls.__doc__ == before and max(map(len, before.splitlines())) <= 120


def test_shared_words_serve_some_method():
    """Words that no method takes would describe nothing."""
    docs = [" ".join(tokenzoo.method_class(name).__doc__.split()) for name in tokenzoo.list_methods()]
    for option, words in SHARED.items():
        assert any(f"{option}: {words}" in doc for doc in docs), option


def test_options_come_in_their_order_and_own_words_stay(registered):
    @registered
    @dataclass(frozen=True, kw_only=True)
    class Mine(KeepRate):
        """Keeps what it likes.

        Args:
            own: an option of its own, with
                two lines.
            tokens: never more than these.

        Source: this test.
        """

        own: int = 1
        silent: int = 2

        name = "mine"

    assert Mine.__doc__.split("\n\n") == [
        "Keeps what it likes.",
        "Args:\n"
        f"    keep_rate: {SHARED['keep_rate']}\n"
        "    tokens: never more than these.\n"
        "    own: an option of its own, with\n        two lines.\n"
        "    layers: blocks to act in; by default at one, two and three quarters of the depth (3, 6, 9 of 12).",
        "Source: this test.",
    ]


@pytest.mark.parametrize("schedule,words", [
    (Remove(), "all."), (Remove(layers=lambda depth: range(1, depth)), "1 to 11 of 12."),
    (Keep(layers=lambda depth: (depth // 2,)), "6 of 12."), (Schedule(layers=lambda depth: (2, 4)), "2, 4 of 12."),
])  # fmt: skip
def test_default_blocks_are_those_of_the_schedule(schedule: Schedule, words: str, registered):
    class Mine(tokenzoo.Method):
        """Does nothing.

        Source: this test.
        """

        name = "mine"

    Mine.schedule = schedule
    registered(Mine)
    assert Mine.__doc__.split("\n\n")[1] == f"Args:\n    layers: blocks to act in; by default {words}"
    assert Mine.__doc__.endswith("\n\nSource: this test.")


def test_a_method_without_a_docstring_registers(registered):
    class Bare(tokenzoo.Method):
        name = "bare"

    @dataclass(frozen=True, kw_only=True)
    class Written(tokenzoo.Method):
        own: int = 1

        name = "written"

    for cls in (Bare, Written):
        before = cls.__doc__
        assert registered(cls) is cls and cls.__doc__ == before
    assert [field.name for field in dataclasses.fields(Written)] == ["layers", "own"]
