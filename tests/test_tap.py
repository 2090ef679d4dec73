"""Token-aware pooling against loops in float64, and what its parts must do whatever the numbers."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import build, images

import tokenzoo
from tokenzoo.core.learned import Teaching
from tokenzoo.layers.token_pooling import TokenAveragePooling
from tokenzoo.ops.diversification import attention_diversification
from tokenzoo.training.owed import losses_owed


def slow_pool(pool, x, grid, prefix):
    """Neighbours one by one."""
    out, (high, wide) = x.clone(), grid
    patches = x[:, prefix:].unflatten(1, grid)
    shares = pool.dilation_predictor(patches.permute(0, 3, 1, 2))
    for row in range(high):
        for column in range(wide):
            total = shares[:, 0, row, column, None] * patches[:, row, column]
            for scale in range(1, pool.num_scales):
                for dy in (-scale, 0, scale):
                    for dx in (-scale, 0, scale):
                        r, c = row + dy, column + dx
                        if 0 <= r < high and 0 <= c < wide:
                            total = total + shares[:, scale, row, column, None] * patches[:, r, c] / 9
            out[:, prefix + row * wide + column] = total
    return out


def slow_likeness(attention, threshold):
    """The loss of one layer, row by row."""
    rows = attention.mean(1)
    total, (batch, n, _) = 0.0, rows.shape
    for image in range(batch):
        mean = rows[image].mean(0)
        mean = torch.where(mean > threshold / n, mean, torch.zeros_like(mean))
        for row in rows[image]:
            row = torch.where(row > threshold / n, row, torch.zeros_like(row))
            total = total + (mean @ row) / max(float(mean.norm() * row.norm()), 1e-8) / (batch * n)
    return total


@torch.no_grad()
def test_pooling_is_the_slow_one():
    torch.manual_seed(0)
    pool = TokenAveragePooling(8, 3).double().eval()
    x = torch.randn(2, 1 + 5 * 4, 8, dtype=torch.float64)
    torch.testing.assert_close(pool(x, (5, 4), 1), slow_pool(pool, x, (5, 4), 1), atol=1e-12, rtol=1e-12)
    assert torch.equal(TokenAveragePooling(8, 1)(x.float(), (5, 4), 1), x.float())


def test_loss_is_the_slow_one():
    maps = [(3 * torch.randn(b, 2, 9, 9, dtype=torch.float64)).softmax(-1) for b in (1, 3)]
    expected = sum(slow_likeness(each, 1.2) for each in maps) / (2 + 1e-6)
    torch.testing.assert_close(attention_diversification(maps, 1.2), torch.as_tensor(expected), atol=1e-9, rtol=1e-9)
    alike = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    alike[..., 0] = 1
    assert attention_diversification([alike]) == pytest.approx(1 / (1 + 1e-6))
    assert attention_diversification([torch.full((2, 1, 5, 5), 0.2)]) == 0
    order = torch.randperm(9)
    moved = maps[1][:, :, order][:, :, :, order]
    torch.testing.assert_close(attention_diversification([moved], 1.2), attention_diversification([maps[1]], 1.2))


@pytest.mark.parametrize("backbone", ["deit", "registers"])
def test_a_block_is_the_recipe_written_out(backbone):
    model = build(backbone)
    x = images(model)
    tokenzoo.patch_model(model, "tap", num_scales=3, layers=(0,), threshold=1.0)
    pool, block = model.blocks[0].tokenzoo_0_tap, copy.deepcopy(model.blocks[0])
    grid, prefix = model.patch_embed.grid_size, model.num_prefix_tokens
    entered = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    seen = []
    handle = model.blocks[1].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    model(x)
    handle.remove()
    found = seen[0].x if hasattr(seen[0], "x") else seen[0]
    z = block.norm1(pool(entered, grid, prefix))
    q, k, v = block.attn.qkv(z).unflatten(2, (3, block.attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    attention = (block.attn.q_norm(q) @ block.attn.k_norm(k).transpose(2, 3) * block.attn.scale).softmax(-1)
    h = entered + block.ls1(block.attn.proj((attention @ v).transpose(1, 2).flatten(2)))
    torch.testing.assert_close(found, h + block.ls2(block.mlp(block.norm2(h))), atol=1e-5, rtol=1e-5)
    model.train()
    pool.eval()
    tokens = model.forward_tokens(x)
    owed = losses_owed(model, tokens, Teaching())["tap_adl"]
    torch.testing.assert_close(owed, attention_diversification([attention], 1.0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
def test_every_new_parameter_learns_within_two_steps(kind):
    model = build("deit")
    x, before = images(model), copy.deepcopy(model.state_dict())
    tokenzoo.patch_model(model, "tap", threshold=1.0)
    model.train()
    reached = set()
    for _ in range(2):
        with torch.autocast("cpu", kind, enabled=kind != torch.float32):
            tokens = model.forward_tokens(x)
            loss = model.forward_head(tokens).float().square().mean() + sum(
                losses_owed(model, tokens, Teaching()).values()
            )
        loss.backward()
        new = {n: p for n, p in model.named_parameters() if ".tokenzoo_" in n}
        reached |= {n for n, p in new.items() if p.grad is not None and p.grad.abs().max() > 0}
    assert reached == set(new) and len(new) == 4 * len(model.blocks)
    tokenzoo.unpatch_model(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_saved_and_loaded(tmp_path):
    model = build("deit")
    x = images(model)
    tokenzoo.patch_model(model, "tap", num_scales=2)
    tokenzoo.save(model, tmp_path)
    assert torch.equal(tokenzoo.load(tmp_path, build("deit"))(x), model(x))


def test_refusals():
    for options, message in (
        ({"num_scales": 0}, "num_scales=0"), ({"adl_weight": -1}, "adl_weight=-1"), ({"threshold": -1}, "threshold=-1"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            tokenzoo.patch_model(build("deit"), "tap", **options)
    with pytest.raises(ValueError, match="let it act in earlier blocks"):
        tokenzoo.patch_model(build("deit"), [{"method": "evit", "layers": [0]}, {"method": "tap", "layers": [2]}])
    with pytest.raises(ValueError, match="tap looks at the attention that tomesd acts in"):
        tokenzoo.patch_model(build("deit"), ["tap", "tomesd"])
    with pytest.raises(ValueError, match="give all patches in their places"):
        TokenAveragePooling(8)(torch.zeros(1, 7, 8), (2, 3))
    with pytest.raises(ValueError, match="give maps"):
        attention_diversification([torch.zeros(2, 4, 4)])
    with pytest.raises(ValueError, match="there is no map"):
        attention_diversification([])
    with pytest.raises(ValueError, match="num_scales=0"):
        TokenAveragePooling(8, 0)
