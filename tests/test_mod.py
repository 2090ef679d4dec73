"""Mixture-of-Depths against the block in full length: skipped patches are no keys, and only the weight reaches them."""

from __future__ import annotations

import pytest
import torch
from cases import build, images
from tokenzoo.schedules import decayed_keep_rates

import tokenzoo


@torch.no_grad()
def by_hand(model, x, weights, layers, rate):
    """Logits of a pre-norm ViT in full length: attention masked to the tokens that run."""
    h, p = model._pos_embed(model.patch_embed(x)), model.num_prefix_tokens
    for index, block in enumerate(model.blocks):
        batch, n, _ = h.shape
        weight, runs = torch.ones(batch, n), torch.ones(batch, n, dtype=torch.bool)
        if index in layers:
            weight[:, p:] = 1 + 0.2 * torch.tanh(h[:, p:] @ weights[index][0] + weights[index][1])
            for image in range(batch):
                order = sorted(range(p, n), key=lambda j: -float(weight[image, j]))
                runs[image, order[max(1, int(rate * (n - p))) :]] = False
        qkv = block.attn.qkv(block.norm1(h)).unflatten(2, (3, block.attn.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        logits = (q @ k.transpose(2, 3) * block.attn.scale).masked_fill(~runs[:, None, None], float("-inf"))
        out = block.ls1(block.attn.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2)))
        attended = h + out
        full = attended + weight[..., None] * block.ls2(block.mlp(block.norm2(attended)))
        h = torch.where(runs[..., None], full, weight[..., None] * h)
    return model.forward_head(model.norm(h))


@pytest.mark.parametrize("backbone", ["deit", "registers"])
@pytest.mark.parametrize("training", [False, True])
def test_short_form_is_the_full_one(backbone, training):
    model = build(backbone)
    x = images(model)
    tokenzoo.patch_model(model, "mod", layers=(0, 2), keep_rate=0.4)
    torch.manual_seed(0)
    weights = {}
    for index in (0, 2):
        router = model.blocks[index].tokenzoo_0_mod.router
        torch.nn.init.normal_(router.weight, std=0.3)
        router.bias.data.fill_(0.1)
        weights[index] = router.weight.detach()[0], float(router.bias.detach())
    model.train(training)
    found = model(x)
    torch.testing.assert_close(found, by_hand(model, x, weights, (0, 2), 0.4), atol=1e-5, rtol=1e-5)
    found.square().mean().backward()
    assert all(model.blocks[i].tokenzoo_0_mod.router.weight.grad.abs().max() > 0 for i in (0, 2))


def test_counts_and_schedule():
    model = build("deit")
    tokenzoo.patch_model(model, "mod", layers=(0, 1), keep_rate=(0.5, 0.25))
    report = tokenzoo.report(model)
    assert report.tokens_out == 17 and report.ratio < 1
    assert decayed_keep_rates(4) == pytest.approx((1.0, 0.75, 0.25, 0.15))
    with pytest.raises(ValueError, match="form='square'"):
        decayed_keep_rates(4, "square")
