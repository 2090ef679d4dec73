"""LookupViT: its block against slow loops, grids at run time, costs, gradients, refusals. There are no goldens."""

from __future__ import annotations

import math

import pytest
import timm
import torch

import tokenzoo
from tokenzoo.layers.lookup_block import LookupBlock
from tokenzoo.models import LookupViT

SIZES = {"img_size": 48, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 7}
GRIDS = {"token_grid": 3, "train_grids": (2, 3, (4, 2))}


def build(**options) -> LookupViT:
    torch.manual_seed(0)
    return LookupViT(**{**SIZES, **GRIDS, **options}).eval()


def image(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 48, 48, generator=torch.Generator().manual_seed(1))


def norm(x, layer):
    centred = x - x.mean()
    return centred / (centred.square().mean() + 1e-6).sqrt() * layer.weight + layer.bias


def slow_block(block: LookupBlock, compressed, lookup, heads: int):
    """One image, one head, one token at a time, from the equations."""
    own, width = block.exchange, compressed.shape[1] // heads
    read, seen = torch.zeros_like(compressed), []
    p = torch.stack([norm(x, block.norm_compressed) for x in compressed])
    f = torch.stack([norm(x, block.norm_lookup) for x in lookup])
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        q = [norm(own.q(x)[part], own.q_norm) for x in p]
        k = [norm(own.k(x)[part], own.k_norm) for x in f]
        rows = []
        for m in range(len(p)):
            weights = [math.exp(float(q[m] @ key) / math.sqrt(width)) for key in k]
            rows.append([w / sum(weights) for w in weights])
            read[m, part] = sum(a * own.v(x)[part] for a, x in zip(rows[m], f))
        seen.append(rows)
    compressed = compressed + own.proj(read)
    x = torch.stack([norm(row, block.norm1) for row in compressed])
    q, k, v = block.attn.qkv(x).chunk(3, dim=1)
    mixed = torch.zeros_like(compressed)
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        mixed[:, part] = (q[:, part] @ k[:, part].T / math.sqrt(width)).softmax(1) @ v[:, part]
    compressed = compressed + block.attn.proj(mixed)
    compressed = compressed + block.mlp(torch.stack([norm(row, block.norm2) for row in compressed]))
    p = torch.stack([norm(row, block.norm_back) for row in compressed])
    back = torch.zeros_like(lookup)
    for h, rows in enumerate(seen):
        part = slice(h * width, (h + 1) * width)
        for n in range(len(lookup)):
            total = sum(row[n] for row in rows)
            back[n, part] = sum(row[n] / total * own.v_back(x)[part] for row, x in zip(rows, p))
    lookup = lookup + own.proj_back(back)
    return compressed, lookup + block.lookup_mlp(torch.stack([norm(row, block.norm3) for row in lookup]))


@torch.no_grad()
def test_block_is_the_slow_one():
    torch.manual_seed(0)
    block = LookupBlock(12, 3).double().eval()
    for parameter in block.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    compressed, lookup = torch.randn(2, 4, 12, dtype=torch.float64), torch.randn(2, 9, 12, dtype=torch.float64)
    found = block(compressed, lookup)
    for b in range(2):
        for one, expected in zip(found, slow_block(block, compressed[b], lookup[b], 3)):
            torch.testing.assert_close(one[b], expected, atol=1e-9, rtol=1e-9)
    logs = block.exchange.gather(compressed, lookup)[1]
    torch.testing.assert_close(logs.exp().sum(3), torch.ones(2, 3, 4, dtype=torch.float64))
    order = torch.randperm(9)
    moved = block(compressed, lookup[:, order])
    torch.testing.assert_close(moved[0], found[0])
    torch.testing.assert_close(moved[1], found[1][:, order])


@torch.no_grad()
def test_a_lookup_token_that_nobody_sees_divides_nothing_by_zero():
    exchange = LookupBlock(12, 3).exchange
    logs = torch.randn(1, 3, 4, 9).log_softmax(3)
    logs[..., 5] = -500.0
    assert exchange.infuse(torch.randn(1, 4, 12), logs).isfinite().all()


@torch.no_grad()
def test_equal_grids_start_equal():
    model = build(token_grid=6, train_grids=())
    model.token_pos.zero_(), model.pos_embed.zero_()
    compressed, lookup = model._embed(image(), None)
    assert torch.equal(compressed[:, 1:], lookup)


@torch.no_grad()
def test_compressed_tokens_start_as_resized_patches():
    model, x = build(), image()
    model.token_pos.zero_()
    compressed, _ = model._embed(x, (4, 2))
    maps = torch.nn.functional.interpolate(model.patch_embed.proj(x), (4, 2), mode="bilinear", align_corners=False)
    torch.testing.assert_close(compressed[:, 1:], maps.flatten(2).transpose(1, 2))


def test_grids_at_run_time():
    model, x = build(), image()
    for grid in (1, 2, 5, (4, 2), 6):
        assert model.forward_features(x, grid).shape[1] == 1 + (grid * grid if isinstance(grid, int) else 8)
    assert torch.equal(model(x), model(x, 3)) and not torch.equal(model(x), model(x, 2))
    model.set_token_grid(2)
    assert torch.equal(model(x), model(x, 2))
    model.train()
    torch.manual_seed(0)
    seen = {model.forward_features(x).shape[1] for _ in range(20)}
    assert seen == {5, 9 + 1, 8 + 1}
    assert {build(train_grids=()).train().forward_features(x).shape[1] for _ in range(5)} == {10}


@pytest.mark.parametrize("options", [{}, {"global_pool": "avg"}])
def test_gradients_reach_every_parameter(options):
    model = build(**options).train()
    for grid in (2, 3, (4, 2)):
        model.zero_grad()
        model(image(), grid).square().sum().backward()
        missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        # an average over compressed tokens reads the class token by attention in the blocks alone, which is enough
        assert not missing
        assert all(p.grad.isfinite().all() for p in model.parameters())


def formula(model: LookupViT, patches: int, compressed: int) -> int:
    """Multiply-adds: 15 M C^2 and 4 N C^2 a block with 2 M^2 C + 3 M N C; less in a last block that does not write."""
    dim, depth, m, n = model.embed_dim, len(model.blocks), compressed + 1, patches
    block = 15 * m * dim**2 + 4 * n * dim**2 + 2 * m * m * dim + 3 * m * n * dim
    unwritten = m * dim**2 + 2 * n * dim**2 + m * n * dim
    resized = (n + 100 * (compressed != 100)) * compressed * dim  # tokens, and their table of 10 x 10
    return depth * block - unwritten + n * 3 * 256 * dim + dim * 1000 + resized


@pytest.mark.parametrize("name,millions", [("lookupvit_small", 34.1), ("lookupvit_base", 134.6)])
def test_sizes_and_costs(name: str, millions: float):
    """The paper says "about half"; that holds at 5 x 5. Its parameters are not known: these are this reproduction's."""
    model = timm.create_model(name).eval()
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)
    plain = timm.create_model(f"vit_{name.split('_')[1]}_patch16_224")
    whole, costs = tokenzoo.count_macs(plain).total, []
    for side in (5, 7, 10):
        model.set_token_grid(side)
        costs.append(tokenzoo.count_macs(model).total)
        assert costs[-1] == pytest.approx(formula(model, 196, side * side), rel=1e-4)  # weights of resizing
    assert costs == sorted(set(costs)) and 0.4 < costs[0] / whole < 0.55


def test_images_of_another_size():
    model = build()
    model.set_input_size((64, 40))
    assert model(torch.zeros(1, 3, 64, 40)).shape == (1, 7) and model.grid_size == (8, 5)
    with pytest.raises(ValueError, match="room for"):
        model.set_input_size(16)


def test_registered_with_timm():
    maps = timm.create_model("lookupvit_small", features_only=True, img_size=64, token_grid=2, train_grids=(2,))
    assert [tuple(m.shape) for m in maps(torch.zeros(1, 3, 64, 64))] == [(1, 384, 4, 4)] * 3
    with pytest.raises(RuntimeError, match="No pretrained weights"):
        timm.create_model("lookupvit_small", pretrained=True)


def test_refusals():
    with pytest.raises(ValueError, match=r"a grid of \(7, 7\) compressed tokens does not fit into \(6, 6\)"):
        build(token_grid=7)
    with pytest.raises(ValueError, match=r"a grid of \(0, 0\)"):
        build()(image(), 0)
    with pytest.raises(ValueError, match="not a whole number"):
        build(img_size=50)
    with pytest.raises(ValueError, match="do not split into 3 heads"):
        build(num_heads=3)
    with pytest.raises(ValueError, match="global_pool='max'"):
        build(global_pool="max")
    with pytest.raises(ValueError, match="does not match the model's"):
        build()(torch.zeros(1, 3, 40, 48))
    with pytest.raises(ValueError, match="NCHW"):
        build().forward_intermediates(image(), output_fmt="NLC")
    with pytest.raises(TypeError, match="LookupViT is not a backbone that tokenzoo can patch"):
        tokenzoo.patch_model(build(), "tome", r=2)
