"""Counts that a strength comes to: compiled code depends on them alone, and other image sizes still follow the rule."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from cases import METHODS, VIT, given
from scan_cases import PLAIN, SCAN_METHODS, VIM, shaken
from scan_cases import given as scan_given
from torch import nn

import tokenzoo
from tokenzoo.adapters.classes import unwrapped
from tokenzoo.core.resolved import Resolved

LESS = 1e-6  # a change of a rate that no count of these few patches follows
VIT_TWO, SCAN_ONE = partial(VIT, depth=2), partial(VIM, depth=1)


def keeping(method: str, layer: int) -> tuple[dict[str, Any], dict[str, Any]]:
    return {"method": method, "layers": (layer,), "keep_rate": 0.7}, {"keep_rate": 0.7 - LESS}


# a model, the methods of a recipe, and options of each that come to the same counts
SAME: dict[str, tuple[Callable[[], nn.Module], list[tuple[dict[str, Any], dict[str, Any]]]]] = {
    "in front and around": (VIT_TWO, [
        ({"method": "cts", "shared": 0.4}, {"shared": 0.4 - LESS}),
        ({"method": "tomesd", "ratio": 0.3}, {"ratio": 0.3 + LESS}),
        ({"method": "evit", "layers": (0, 1), "keep_rate": (0.9, 0.7)}, {"keep_rate": (0.9, 0.7 - LESS)}),
        keeping("topk", 1),
    ]),
    "with scores": (VIT_TWO, [
        ({"method": "cluster", "layers": 0, "scale": 0.7}, {"scale": 0.7 + LESS}),
        ({"method": "evo", "layers": (1,), "keep_rate": 0.6}, {"keep_rate": 0.6 + LESS}),
    ]),
    "one by one": (VIT_TWO, [
        keeping("random", 0),
        keeping("uniform", 1),
        ({"method": "mctf", "layers": (1,), "r": 0.2, "min_tokens": 2}, {"r": 0.2 + LESS}),
        ({"method": "tome", "layers": (1,), "r": 40, "clip": True}, {"r": 50}),
    ]),
    "with padding": (VIT_TWO, [
        ({"method": "ats", "layers": (0,), "max_tokens": 14}, {"max_tokens": (14,)}),
        keeping("evit", 1),
        ({"method": "mctf", "layers": (1,), "r": 0.25, "min_tokens": 2, "one_step_ahead": 0}, {"r": 0.25 + LESS}),
    ]),
    "in a scan": (SCAN_ONE, [
        ({"method": "famba", "r": (2, 0.0)}, {"r": 2}),
        keeping("ssm_prune", 0),
        keeping("mtr", 0),
        ({"method": "rmeeto", "layers": (0,), "r": 30, "clip": True}, {"r": 40}),
    ]),
}  # fmt: skip


@pytest.fixture
def compiler() -> Iterator[torch._dynamo.testing.CompileCounter]:
    """Counts graphs."""
    torch._dynamo.reset()
    yield torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()


@pytest.mark.parametrize("name", SAME)
@torch.no_grad()
def test_counts_that_stay_compile_nothing(name, compiler):
    make, parts = SAME[name]
    model, x = make().eval(), torch.randn(2, 3, 32, 32)
    tokenzoo.patch_model(model, [part for part, _ in parts])
    compiled = torch.compile(model, backend=compiler, fullgraph=True, dynamic=False)
    counts = [row.tokens_out for row in tokenzoo.report(model).rows]
    compiled(x)
    for part, change in parts:
        tokenzoo.update_method(model, part["method"], **change)
        assert [row.tokens_out for row in tokenzoo.report(model).rows] == counts
        torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-4)
        assert compiler.frame_count == 1, part["method"]


@torch.no_grad()
def test_a_count_that_changes_is_compiled_once(compiler):
    model, x = VIT_TWO().eval(), torch.randn(2, 3, 32, 32)
    tokenzoo.patch_model(model, "evit", layers=(0, 1), keep_rate=0.9)
    compiled = torch.compile(model, backend=compiler, fullgraph=True, dynamic=False)
    for rate in (0.9, 0.899, 0.6, 0.599, 0.9, 0.6):
        tokenzoo.update_method(model, keep_rate=rate)
        torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-4)
    assert compiler.frame_count == 2


# ---- other image sizes

DYNAMIC = partial(VIT, dynamic_img_size=True)
PAIRS = [(DYNAMIC, given(method), method) for method in METHODS]
PAIRS += [(partial(VIM, dynamic_img_size=True), scan_given(m, "reduce"), f"{m} in vim") for m in SCAN_METHODS]
PAIRS += [(PLAIN, scan_given(m, "reduce"), f"{m} in plain_mamba") for m in SCAN_METHODS]
PAIRS += [(DYNAMIC, [p for p, _ in parts], name) for name, (make, parts) in SAME.items() if make is VIT_TWO]


def forgetting(model: nn.Module) -> None:
    """Takes the counts out of a patched model: its methods follow their rules."""
    for block in map(unwrapped, model.blocks):
        steps, outside = (
            [s._replace(known=None) for s in row] for row in (block.tokenzoo.steps, block.tokenzoo.outside)
        )
        block.tokenzoo = block.tokenzoo._replace(steps=tuple(steps), outside=tuple(outside))


@pytest.mark.parametrize("make,recipe", [pair[:2] for pair in PAIRS], ids=[pair[2] for pair in PAIRS])
@torch.no_grad()
def test_counts_are_those_of_the_rule_at_every_size(make, recipe):
    model = shaken(make().eval())
    tokenzoo.patch_model(model, recipe)
    sizes = ((32, 32), (48, 48), (32, 64), (64, 16))
    pictures = [torch.randn(2, 3, *size) for size in sizes]  # the last has as many patches in another grid
    found = [model.forward_tokens(x).x for x in pictures]
    forgetting(model)
    assert all(map(torch.equal, found, (model.forward_tokens(x).x for x in pictures)))
    lengths = [tokenzoo.report(model, size).tokens_out for size in sizes]
    if not tokenzoo.report(model).data_dependent:
        assert [x.shape[1] for x in found] == lengths


@torch.no_grad()
def test_an_update_reaches_other_sizes_too():
    """0.62 and 0.61 of 16 patches are both 10, of 64 patches they are 40 and 39 + 1."""
    model = DYNAMIC().eval()
    tokenzoo.patch_model(model, "topk", layers=(1,), keep_rate=0.62)
    small, large = torch.randn(1, 3, 32, 32), torch.randn(1, 3, 64, 64)
    assert [model.forward_tokens(x).length for x in (small, large)] == [11, 41]
    tokenzoo.update_method(model, keep_rate=0.605)
    assert [model.forward_tokens(x).length for x in (small, large)] == [11, 40]


@torch.no_grad()
def test_the_counts_are_read_but_not_by_an_exported_program(monkeypatch):
    """A program for all sizes must not hold the counts of one."""
    model = DYNAMIC().eval()
    tokenzoo.patch_model(model, "topk", layers=(1,), keep_rate=0.5)
    (step,), layout = model.blocks[1].tokenzoo.steps, model.blocks[1].tokenzoo.layout
    assert step.known == Resolved(17, (4, 4), 9, 8)
    other = step._replace(known=step.known._replace(count=3, n_out=4))
    assert (other.count(17, layout), other.tokens_out(17, layout)) == (3, 4)
    assert (other.count(16, layout), other.count(17, layout._replace(grid=(2, 8)))) == (8, 8)
    monkeypatch.setattr(tokenzoo.core.resolved, "_exporting", lambda: True)
    assert (other.count(17, layout), other.tokens_out(17, layout)) == (8, 9)
