"""Grouped attention: in groups and as a mask of the full map the same, and full attention where one group holds all."""

from __future__ import annotations

import pytest
import torch
from cases import build, images

import tokenzoo
from tokenzoo.methods.catanet import CATANet
from tokenzoo.ops.grouped import attend_in_groups, looked_at, windows


def test_groups_of_a_sorted_sequence():
    """One query at a time."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 10, 4) for _ in range(3))
    bias = torch.randn(2, 3, 10, 10)
    found = attend_in_groups(q, k, v, 4, bias=bias, mirror=False)
    seen = looked_at(torch.tensor([10, 10]), 10, 4)
    for i in range(10):
        start = i // 4 * 4
        keys = list(range(start, min(10, start + 8)))
        assert seen[0, i].nonzero().flatten().tolist() == keys
        logits = (q[:, :, i : i + 1] @ k[:, :, keys].transpose(2, 3)) / 2 + bias[:, :, i : i + 1, keys]
        torch.testing.assert_close(found[:, :, i : i + 1], logits.softmax(-1) @ v[:, :, keys])
    short = looked_at(torch.tensor([10, 5]), 10, 4)[1]
    assert short[3].nonzero().flatten().tolist() == [0, 1, 2, 3, 4] and short[4].nonzero().flatten().tolist() == [4]
    asking, looked = windows(10, 4)
    assert asking[-1].tolist() == [8, 9, 9, 8] and looked[-1].tolist() == [8, 9, 9, 8, 7, 6, 5, 4]


@pytest.mark.parametrize("backbone", ["deit", "gap", "registers", "dinov3", "beit", "relpos_bias"])
@torch.no_grad()
def test_in_groups_and_masked(backbone, monkeypatch):
    model = build(backbone)
    x = images(model)
    plain = model(x)
    tokenzoo.patch_model(model, "catanet", group_size=3, centres=5)
    for block in model.blocks:
        torch.nn.init.normal_(block.tokenzoo_0_catanet.to_v.weight, std=0.2)
    found = model(x)
    assert (found - plain).abs().max() > 1e-3
    monkeypatch.setattr(CATANet, "_grouped", lambda self, heads, bias, order, prefix: full(self, heads, bias, order))

    def full(self, heads, bias, order):
        from tokenzoo.ops.attention import attend

        return attend(heads, self._joined(model.forward_shape, bias, order))

    class Shape:
        """As much of the tokens as the mask needs."""

        layout = type("Layout", (), {"num_prefix": model.num_prefix_tokens})
        num_patches, seen_patches = 16, None

    object.__setattr__(model, "forward_shape", Shape)
    torch.testing.assert_close(model(x), found, atol=2e-5, rtol=1e-4)


def test_costs_less_where_groups_are_small():
    model = build("deit")
    with tokenzoo.patched(model, "catanet", group_size=2, centres=1):
        small = tokenzoo.report(model)
    assert small.tokens_out == 17 and small.total != small.unpatched
