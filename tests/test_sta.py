"""Super token attention in plain ViTs: plain attention where cells hold one patch, a slow loop elsewhere, refusals."""

import itertools
import math

import pytest
import timm
import torch
from cases import VIT, build, images

import tokenzoo
from tokenzoo.maps import SuperTokenMap
from tokenzoo.ops.cells.super_tokens import associate, to_cells

GRIDS = [((4, 4), (2, 2)), ((5, 7), (2, 3)), ((3, 4), (4, 1)), ((6, 6), (3, 3))]


def shares_by_loop(x, grid, cell, iterations, mask_borders):
    """How cells average [cells, H * W] and patches read back [H * W, cells], from the equations; x [H * W, C]."""
    high, wide = grid
    down, right = math.ceil(high / cell[0]), math.ceil(wide / cell[1])
    tokens = {}
    for i, j in itertools.product(range(down * cell[0]), range(right * cell[1])):
        tokens[i, j] = x[i * wide + j] if i < high and j < wide else torch.zeros_like(x[0])
    members = {(p, q): [] for p in range(down) for q in range(right)}
    for i, j in tokens:
        members[i // cell[0], j // cell[1]].append((i, j))
    supers = {pq: torch.stack([tokens[ij] for ij in own]).mean(0) for pq, own in members.items()}
    shares = {ij: {(ij[0] // cell[0], ij[1] // cell[1]): torch.tensor(1.0, dtype=x.dtype)} for ij in tokens}
    for round_ in range(iterations):
        for (i, j), value in tokens.items():
            around = [(i // cell[0] + a, j // cell[1] + b) for a in (-1, 0, 1) for b in (-1, 0, 1)]
            if mask_borders:
                around = [pq for pq in around if pq in supers]
            logits = torch.stack([
                supers[pq] @ value / math.sqrt(len(value)) if pq in supers else x.new_zeros(()) for pq in around
            ])  # fmt: skip
            shares[i, j] = {pq: w for pq, w in zip(around, logits.softmax(0)) if pq in supers}
        if round_ + 1 < iterations:
            for pq in supers:
                total = sum(w[pq] for w in shares.values() if pq in w)
                supers[pq] = sum(w[pq] * tokens[ij] for ij, w in shares.items() if pq in w) / total
    mass = {pq: sum(w[pq] for w in shares.values() if pq in w) for pq in supers}
    collect = x.new_zeros(down * right, high * wide)
    spread = x.new_zeros(high * wide, down * right)
    for (i, j), own in shares.items():
        for (p, q), w in own.items():
            if i < high and j < wide:
                collect[p * right + q, i * wide + j] = w / mass[p, q]
                spread[i * wide + j, p * right + q] = w
    return collect, spread


def map_of(x, grid, cell, iterations, mask_borders=False, prefix=0):
    cells = to_cells(x[:, prefix:].unflatten(1, grid), cell)
    return SuperTokenMap(associate(cells, iterations, mask_borders), grid, cell, prefix)


@pytest.mark.parametrize("mask_borders", [False, True])
@pytest.mark.parametrize("iterations", [0, 1, 3])
@pytest.mark.parametrize("grid,cell", GRIDS)
def test_map_is_the_loop(grid, cell, iterations, mask_borders):
    torch.manual_seed(0)
    x = torch.randn(2, 3 + grid[0] * grid[1], 5, dtype=torch.float64)
    found = map_of(x, grid, cell, iterations, mask_borders, prefix=3)
    assert (found.n_in, found.n_out) == (x.shape[1], 3 + math.ceil(grid[0] / cell[0]) * math.ceil(grid[1] / cell[1]))
    for b in range(2):
        collect, spread = shares_by_loop(x[b, 3:], grid, cell, iterations, mask_borders)
        whole = torch.block_diag(torch.eye(3, dtype=x.dtype), collect)
        torch.testing.assert_close(found.apply(x)[b], whole @ x[b], atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(found.matrix()[b], whole, atol=1e-9, rtol=1e-9)
        back = torch.block_diag(torch.eye(3, dtype=x.dtype), spread)
        y = torch.randn(2, found.n_out, 4, dtype=x.dtype)
        torch.testing.assert_close(found.lift(y)[b], back @ y[b], atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(found.pool(x)[b], back.T @ x[b], atol=1e-9, rtol=1e-9)
        assert torch.equal(found.assign[b, 3:] - 3, spread.argmax(1))
        assert found.assign[b, :3].tolist() == found.heads[b, :3].tolist() == [0, 1, 2]
    # the patch that stands for a super token lies in its cell
    own = map_of(x, grid, cell, 0, prefix=3)
    assert torch.equal(own.assign.gather(1, own.heads), torch.arange(own.n_out).expand(2, -1))


@pytest.mark.parametrize("iterations", [0, 1, 3])
@pytest.mark.parametrize("size", [224, 384, (240, 320)])
@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "registers", "class-token-free"])
@torch.no_grad()
def test_cells_of_one_patch_are_plain_attention(name, size, iterations):
    torch.manual_seed(0)
    options = {"registers": {"reg_tokens": 4, "no_embed_class": True, "init_values": 0.5}}
    options["class-token-free"] = {"class_token": False, "global_pool": "avg"}
    model = timm.create_model("deit_tiny_patch16_224", img_size=size, depth=3, **options.get(name, {})).eval()
    x = torch.randn(1, 3, *model.patch_embed.img_size)
    plain = model.forward_features(x)
    tokenzoo.patch_model(model, "sta", cell=1, iterations=iterations, layers=(0, 1, 2))
    torch.testing.assert_close(model.forward_features(x), plain, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["deit", "registers", "gap", "qk_norm", "dinov3"])
def test_block_is_the_loop(backbone):
    """A block with 2 x 2 cells: its own attention among prefix and super tokens, read back by shares."""
    model = build(backbone).double()
    x = images(model, 2).double()
    tokenzoo.patch_model(model, "sta", cell=2, layers=(0,))
    start, found = list(model.walk(x, last=0, trace=True))
    prefix, grid = start.layout.num_prefix, start.layout.grid
    tokenzoo.unpatch_model(model)
    block, out = model.blocks[0], []
    for b in range(2):
        z = block.norm1(start.x[b])
        collect, spread = shares_by_loop(z[prefix:], grid, (2, 2), 1, False)
        supers = torch.cat([z[:prefix], collect @ z[prefix:]])
        rope = {}
        if backbone == "dinov3":  # a super token stands where the middle patch of its cell stands
            table = model.rope.get_embed(grid).double()
            middle = [i * 2 * grid[1] + j * 2 for i in range(grid[0] // 2) for j in range(grid[1] // 2)]
            rope = {"rope": table[middle]}
        y = block.attn(supers[None], **rope)[0]
        y = torch.cat([y[:prefix], spread @ y[prefix:]])
        gamma = block.gamma_1 if getattr(block, "gamma_1", None) is not None else None
        scaled = y * gamma if gamma is not None else getattr(block, "ls1", torch.nn.Identity())(y)
        h = start.x[b] + scaled
        mlp = block.mlp(block.norm2(h)[None])[0]
        mlp = mlp * block.gamma_2 if gamma is not None else getattr(block, "ls2", torch.nn.Identity())(mlp)
        out.append(h + mlp)
    torch.testing.assert_close(found.x, torch.stack(out), atol=1e-6, rtol=1e-6)


def test_no_gradient_through_the_shares():
    model = build("deit").double()
    tokenzoo.patch_model(model, "sta", cell=2, layers=(0,))
    z = torch.randn(1, 17, 32, dtype=torch.float64, requires_grad=True)
    found = map_of(z, (4, 4), (2, 2), 2, prefix=1)
    assert not found.found.weights.requires_grad and not found.found.mass.requires_grad
    found.lift(found.apply(z)).square().sum().backward()
    assert z.grad.abs().sum() > 0


def test_needs_the_grid():
    model = build("deit")
    with pytest.raises(ValueError, match=r"sta at block 2: .*4 x 4 patches.*13 tokens|sta at block 2: .*grid"):
        tokenzoo.patch_model(model, [{"method": "tome", "r": 3, "layers": [0]}, {"method": "sta", "layers": [2]}])
    # as many tokens as patches, but a fused one among them: seen when it happens
    evit = {"method": "evit", "tokens": 15, "layers": [0]}
    tokenzoo.patch_model(model, [evit, {"method": "sta", "cell": 2, "layers": [1]}])
    with pytest.raises(ValueError, match="sta at block 1: .*reduced before"):
        model(images(model))


def test_smaller_images_are_checked_too():
    model = VIT(dynamic_img_size=True).eval()
    tokenzoo.patch_model(model, "sta", cell=4, layers=(0,))
    assert model(torch.randn(1, 3, 40, 56)).isfinite().all()
    with pytest.raises(ValueError, match="sta at block 0: a cell of 4 x 4 is larger than the 2 x 2 patches"):
        model(torch.randn(1, 3, 16, 16))


@pytest.mark.parametrize("options,error,words", [
    ({"cell": 0}, ValueError, ["cell=0", "no patch"]),
    ({"cell": "big"}, TypeError, ["cell='big'", "whole number"]),
    ({"cell": (2, 2, 2)}, TypeError, ["cell=(2, 2, 2)"]),
    ({"cell": 5}, ValueError, ["sta at block 0", "5 x 5", "4 x 4", "smaller cell"]),
    ({"iterations": -1}, ValueError, ["iterations=-1", "0 keeps"]),
    ({"iterations": 1.5}, TypeError, ["iterations=1.5"]),
    ({"mask_borders": 1}, TypeError, ["mask_borders=1"]),
])  # fmt: skip
def test_bad_options(options, error, words):
    model = build("deit")
    with pytest.raises(error) as caught:
        tokenzoo.patch_model(model, "sta", **options)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not tokenzoo.is_patched(model)


def test_counts():
    model = timm.create_model("vit_small_patch16_224", img_size=512)
    plain = tokenzoo.report(model).total
    tokenzoo.patch_model(model, "sta", layers=(0,))
    row = tokenzoo.report(model).rows[1]
    n, m, c = 1024, 64 + 1, 384
    association = 27 * n * c
    assert row.macs == 4 * m * c * c + 2 * m * m * c + 8 * (n + 1) * c * c + association
    assert row.reduction_macs == association
    assert (
        plain - tokenzoo.report(model).total == 4 * (n + 1 - m) * c * c + 2 * ((n + 1) ** 2 - m * m) * c - association
    )
