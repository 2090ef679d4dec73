"""Keeping what holds a share of the attention mass: a slow reference, batch mates, masks, budgets, refusals."""

from __future__ import annotations

import pytest
import torch
from cases import build
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenzoo
from tokenzoo.core.layout import Layout
from tokenzoo.core.selection import keep_mass
from tokenzoo.core.tokens import Tokens

METHODS = ("topk", "evit")
methods = pytest.mark.parametrize("method", METHODS)


def reference(scores: list[float], share: float) -> list[int]:
    """Patches of one image by falling score, until they hold the share."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    kept, held = [], 0.0
    for i in order:
        if kept and (held >= share * sum(scores) or scores[i] == 0):
            break
        kept.append(i)
        held += scores[i]
    return kept


@given(seed=st.integers(0, 10_000), patches=st.integers(2, 12), share=st.floats(0.05, 0.999), most=st.integers(1, 12),
       hide=st.booleans(), pad=st.booleans())  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_against_a_slow_reference(seed, patches, share, most, hide, pad):
    g = torch.Generator().manual_seed(seed)
    scores = torch.rand(3, 1 + patches, generator=g) ** 3 + 1e-3
    visible = torch.rand(3, 1 + patches, generator=g) < 0.6 if hide else None
    valid = torch.arange(1 + patches) < torch.randint(2, patches + 2, (3, 1), generator=g) if pad else None
    if hide and pad:
        visible = visible & valid
    tokens = Tokens(torch.zeros(3, 1 + patches, 4), Layout(1, True, (1, patches)), valid=valid, visible=visible)
    for budget in (None, most):
        keep = keep_mass(scores, tokens, share, budget)
        for image in range(3):
            own = scores[image, 1:].double()
            for real in (visible, valid):
                own = own if real is None else own * real[image, 1:]
            wanted = reference(own.tolist(), share)[: budget or patches]
            rows = keep.idx[image, 1:] if keep.valid is None else keep.idx[image, 1:][keep.valid[image, 1:]]
            found = rows.sub(1).tolist()
            if own.sum() > 0:
                assert found == wanted
            assert 1 <= len(found) and (valid is None or valid[image, 1:][found].all())


@methods
@pytest.mark.parametrize("name", ["deit", "registers", "gap", "dinov3"])
def test_batch_mates_have_no_influence(method, name):
    model = tokenzoo.patch_model(build(name).double(), method, mass=0.6, layers=(1, 2))
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64) * torch.tensor([0.1, 1, 3, 10]).view(-1, 1, 1, 1)
    with torch.no_grad():
        together, alone = model(images), torch.cat([model(image.unsqueeze(0)) for image in images])
        assert torch.allclose(together, alone, atol=1e-10)
        assert model.forward_tokens(images).length < model.patch_embed.num_patches + model.num_prefix_tokens


@methods
def test_all_of_the_mass_changes_nothing(method):
    model, images = build("deit"), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        plain = model(images)
        assert torch.equal(tokenzoo.patch_model(model, method, mass=1.0)(images), plain)


@methods
def test_a_budget_makes_shapes_static(method):
    """One graph, an exported program, and the answer of the open form where no image meets the budget."""
    images = torch.randn(3, 3, 32, 32)
    model = tokenzoo.patch_model(build("deit"), method, mass=0.8, tokens=9, layers=(2,))
    with torch.no_grad():
        fixed = model(images)
        fused = method == "evit"
        assert model.forward_tokens(images).length == 1 + 9 + fused == tokenzoo.report(model).tokens_out
        assert torch.allclose(torch.compile(model, fullgraph=True, backend="aot_eager")(images), fixed, atol=1e-5)
        batch = {0: torch.export.Dim("batch")}
        program = torch.export.export(model, (images,), dynamic_shapes=(batch,))
        assert torch.allclose(program.module()(images[:2]), fixed[:2], atol=1e-5)
        tokenzoo.unpatch_model(model)
        tokenzoo.patch_model(model, method, mass=0.3, tokens=15, layers=(2,))
        loose = model(images)
        tokenzoo.unpatch_model(model)
        tokenzoo.patch_model(model, method, mass=0.3, layers=(2,))
        assert model.forward_tokens(images).length < 16
        assert torch.allclose(model(images), loose, atol=1e-5)


@methods
def test_flops_solves_for_the_budget(method):
    model = tokenzoo.patch_model(build("deit"), method, flops=0.8, mass=0.9)
    recipe = tokenzoo.recipe(model)
    assert recipe["mass"] == 0.9 and 1 <= recipe["tokens"] < 16
    assert tokenzoo.report(model).ratio == pytest.approx(0.8, abs=0.06)


@methods
def test_refusals(method):
    with pytest.raises(ValueError, match="mass=0.9 and keep_rate=0.5 both say what to keep"):
        tokenzoo.create_method(method, mass=0.9, keep_rate=0.5)
    for value in (0, 1.5, -0.1):
        with pytest.raises(ValueError, match=f"{method}: mass={value}.*such as 0.9"):
            tokenzoo.create_method(method, mass=value)
    with pytest.raises(TypeError, match="mass='most'"):
        tokenzoo.create_method(method, mass="most")
    model = tokenzoo.patch_model(build("deit"), method, mass=0.5)
    with pytest.raises(ValueError, match="set a fixed budget, such as tokens=128"):
        torch.jit.trace(model, torch.randn(1, 3, 32, 32))
