"""FlowCut: what it promises besides recorded numbers: order, goal, static shapes, batch mates, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from cases import build
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenzoo
from tokenzoo.ops.flow import evenness, flow_scores


@given(seed=st.integers(0, 10_000), patches=st.integers(2, 12), width=st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_scores_and_evenness_against_their_equations(seed, patches, width):
    g = torch.Generator().manual_seed(seed)
    c, e = torch.rand(2, 1, patches, generator=g, dtype=torch.float64) + 1e-3
    v = torch.randn(1, patches, width, generator=g, dtype=torch.float64)
    found, alone, even = flow_scores(c, e, v), flow_scores(c, None, v), evenness(c, patches)
    for i in range(patches):
        length = sum(abs(value) for value in v[0, i].tolist())
        share = c[0, i].item() / sum(c[0].tolist())
        assert found[0, i].item() == pytest.approx((share + e[0, i].item() / sum(e[0].tolist())) * length)
        assert alone[0, i].item() == pytest.approx(share * length)
    shares = [value / sum(c[0].tolist()) for value in c[0].tolist()]
    assert even.item() == pytest.approx(-sum(p * math.log(p) for p in shares) / math.log(patches))
    assert evenness(torch.ones(1, patches), patches).item() == pytest.approx(1)


@pytest.mark.parametrize("name", ["deit", "registers", "gap", "dinov3"])
@pytest.mark.parametrize("options", [{}, {"entropy": 0.3}, {"batch_rule": True}], ids=str)
@torch.no_grad()
def test_patches_keep_their_order_and_end_at_the_goal(name, options):
    model = tokenzoo.patch_model(build(name), "flowcut", tokens=5, layers=(0, 1, 3), **options)
    tokens = model.forward_tokens(torch.randn(3, 3, 32, 32) * torch.tensor([0.1, 1, 10]).view(3, 1, 1, 1), trace=True)
    prefix = tokens.layout.num_prefix
    assert tokens.length == prefix + 5
    for step in tokens.trace:
        kept = step.map.heads[:, prefix:]
        real = torch.ones_like(kept, dtype=torch.bool) if step.map.valid is None else step.map.valid[:, prefix:]
        assert (torch.where(real, kept, 10**6).diff(dim=1) >= 0).all()
    if "entropy" in options:
        counts = [row.tokens_out for row in tokenzoo.report(model).rows if row.block is not None]
        first = 16 - round((16 - 5) / math.sqrt(3) * (1 - 0.09))
        second = max(5, first - round((first - 5) / math.sqrt(2) * (1 - 0.09)))
        assert counts == [prefix + n for n in (first, second, second, 5)]


@torch.no_grad()
def test_the_released_rule_looks_at_batch_mates():
    images = torch.randn(4, 3, 32, 32) * torch.tensor([0.01, 1, 3, 30]).view(4, 1, 1, 1)
    lengths = {}
    for rule in (False, True):
        model = tokenzoo.patch_model(build("deit"), "flowcut", tokens=2, layers=(0, 3), batch_rule=rule)
        own = [model.forward_tokens(image.unsqueeze(0), trace=True).trace[0].map.n_out for image in images]
        maps = model.forward_tokens(images, trace=True).trace[0].map
        lengths[rule] = own, [maps.n_out] * 4 if maps.valid is None else maps.valid.sum(1).tolist()
    own, together = lengths[False]
    assert together == own and len(set(own)) > 1
    assert set(lengths[True][1]) == {min(own)}


def test_refusals():
    for options, message in (
        ({"keep_rate": 0}, "keep_rate=0 is outside .0, 1.; give the share of the patches to keep"),
        ({"tokens": 0}, "tokens=0 is below 1; give the number of patches"),
        ({"entropy": 1.2}, "entropy=1.2 is outside .0, 1.; 0.9 is spread fairly evenly"),
        ({"blend": 0}, "blend=0 is outside .0, 1.; 1 forgets"),
    ):
        with pytest.raises(ValueError, match=message):
            tokenzoo.create_method("flowcut", **options)
    with pytest.raises(TypeError, match="tokens=2.5"):
        tokenzoo.create_method("flowcut", tokens=2.5)
