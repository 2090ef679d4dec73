"""The largest difference that every check has seen, per family and recipe, beside the bound it has to keep.

A test asks for the fixture `figure` and says what it measured; one above its bound fails the test. `pytest --figures`
prints the table of all that were measured in the run, `pytest --figures=FILE` writes it between the two markers of a
page. Figures travel in the reports of tests, so that processes of a parallel run add to one table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

BEGIN, END = "<!-- begin figures -->", "<!-- end figures -->"
ROUNDING = 1e-12  # of float64, where sums of another order are the only difference
# check -> its bound; those of `test_vlm*.py`, in the order of the table
BOUNDS = {
    "keeping all = unpatched": 0.0,
    "taken off = unpatched": 0.0,
    "fewer rows = language model on shortened rows": 1e-5,
    "dropped rows = slow reference": 1e-5,
    "batch = each alone": 1e-5,
    "batch = each alone, float64": ROUNDING,
    "batch = each alone, videos, float64": ROUNDING,
    "cached steps = layers without a cache": 1e-5,
    "beams of a batch = each alone, tokens": 0.0,
    "prompt lookup = greedy, tokens": 0.0,
    "second turn = its steps by hand, tokens": 0.0,
    "second turn on a cache = one prompt, float64": ROUNDING,
    "deepcopy": 0.0,
    "pickle": 0.0,
    "loss = oracle": 1e-5,
    "gradients = oracle, float64": 1e-10,
    "checkpointed gradients": 0.0,
    "eager = sdpa": 1e-5,
    "flash convention = sdpa": 1e-5,
    "prompts taken for packed": 0.0,
    "scores = eager maps": 1e-6,
}
Figure = Callable[[str, str, str, float], None]


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference of two tensors of one shape; not a number where one of them holds such."""
    assert a.shape == b.shape, (tuple(a.shape), tuple(b.shape))
    return float((a - b).abs().max()) if a.numel() else 0.0


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Figure:
    """(check, family, recipe, value): notes a figure, and fails above the check's bound."""

    def note(check: str, family: str, recipe: str, value: float) -> None:
        request.node.user_properties.append(("figure", [check, family, recipe, float(value)]))
        assert value <= BOUNDS[check], f"{check}: {value:.1e} in {family} with {recipe}, at most {BOUNDS[check]:.0e}"

    return note


def collected(reports: Iterable[pytest.TestReport]) -> dict[tuple[str, str], dict[str, float]]:
    """(check, recipe) -> family -> largest figure."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for report in reports:
        for key, each in report.user_properties if report.when == "call" else ():
            if key == "figure":
                check, family, recipe, value = each
                row = found.setdefault((check, recipe), {})
                row[family] = max(row.get(family, 0.0), math.inf if math.isnan(value) else value)
    return found


def table(found: dict[tuple[str, str], dict[str, float]]) -> str:
    """Markdown: a line per check and recipe, a column per family; "-" where a check was not run."""
    families = sorted({name for row in found.values() for name in row})
    recipes = list(dict.fromkeys(recipe for _, recipe in found))
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    lines = [f"{libraries}, {torch.get_num_threads()} thread(s), CPU; {sum(map(len, found.values()))} figures", ""]
    lines += [f"| check | at most | recipe | {' | '.join(families)} |"]
    lines += ["| " + " | ".join(["---"] * (3 + len(families))) + " |"]
    for check, bound in BOUNDS.items():
        for recipe in recipes:
            row = found.get((check, recipe))
            if row is not None:
                cells = [_short(row[name]) if name in row else "-" for name in families]
                lines.append("| " + " | ".join([check, _short(bound), recipe, *cells]) + " |")
    return "\n".join(lines)


def _short(value: float) -> str:
    return f"{value:.0e}" if value else "0"


def tell(terminalreporter: pytest.TerminalReporter, where: str | None) -> None:
    """Prints the table ("-"), or writes it into a page.

    Raises:
        ValueError: a page without the markers.
    """
    reports = [r for kind in ("passed", "failed") for r in terminalreporter.stats.get(kind, [])]
    found = collected(reports)
    if where is None or not found:
        return
    if where == "-":
        terminalreporter.section("largest differences")
        terminalreporter.write_line(table(found))
        return
    page = Path(where)
    text = page.read_text()
    if BEGIN not in text or END not in text:
        raise ValueError(f"--figures={where}: the page has no lines {BEGIN} and {END}, between which the table goes")
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    page.write_text(f"{head}{BEGIN}\n{table(found)}\n{END}{tail}")
