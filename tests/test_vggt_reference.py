"""FastVGGT against slow loops from its equations: partition, merge - attend - unmerge, padding, masks, refusals."""

from itertools import product

import pytest
import torch
from cases import build, images

import tokenzoo
from tokenzoo.core.frames import _known_parts, _parts
from tokenzoo.core.signals import Signals
from tokenzoo.core.tokens import Layout, Tokens
from tokenzoo.maps import AssignMap, BesideMap, MergeMap
from tokenzoo.methods.vggt import FastVGGT
from tokenzoo.ops.draw import drawn, fixed_draw


def slow_parts(method, prefix, grid, m, block=0):
    """Sources, destinations and protected patches of m patches in raster order, as sets; the prefix is not counted."""
    n, (down, right) = prefix + m, (method.stride,) * 2 if isinstance(method.stride, int) else method.stride
    dst = set()
    if m == grid[0] * grid[1]:
        high, wide = grid[0] // method.frames, grid[1]
        draw = fixed_draw(10_000, (method.seed or 0) * 1009 + block, torch.device("cpu")).tolist()
        cell = 0
        for image in range(method.frames):
            if image == 0:
                dst |= set(range(high * wide))
                continue
            for top, left in product(range(0, high - down + 1, down), range(0, wide - right + 1, right)):
                pick = 0 if method.seed is None else int(draw[cell] * down * right)
                cell += 1
                dst.add((image * high + top + pick // right) * wide + left + pick % right)
    else:
        first = (m + method.frames - 1) // method.frames
        dst = set(range(first)) | set(range(first, m, down * right))
    kept, count = set(), int(method.protected * n)
    for i in range(count):
        kept.add(i * (n // count) - prefix)
    kept = {i for i in kept if i >= 0}
    return set(range(m)) - dst - kept, dst, kept


def slow_map(method, z, grid, prefix, block=0):
    """Groups (lists of tokens) that attend and the row each token reads, of one sequence in raster order."""
    parts = slow_parts(method, prefix, grid, len(z) - prefix, block)
    src, dst, kept = (sorted(i + prefix for i in part) for part in parts)
    unit = z / z.norm(dim=1, keepdim=True)
    best = {i: max(dst, key=lambda j: float(unit[i] @ unit[j])) for i in src}
    ranked = sorted(src, key=lambda i: -float(unit[i] @ unit[best[i]]))
    r = min(int(method.ratio * len(z)), len(src))
    if r == 0:
        return [[i] for i in range(len(z))], list(range(len(z)))
    gone = ranked[:r]
    groups = [[i] for i in range(prefix)] + [[i] for i in ranked[r:]]
    into = {j: len(groups) + place for place, j in enumerate(dst)}
    groups += [[j, *(i for i in gone if best[i] == j)] for j in dst]
    beside = {i: len(groups) + place for place, i in enumerate(kept)}
    groups += [[i] for i in kept]
    single = {group[0]: row for row, group in enumerate(groups) if len(group) == 1 and row < prefix + len(ranked) - r}
    reads = [beside.get(i, into.get(best[i] if i in gone else i, single.get(i))) for i in range(len(z))]
    return groups, reads


def slow_attention(attn, z, groups, reads):
    """Queries, keys and values merge behind their projection, plain attention runs, outputs are copied back."""
    heads = attn.num_heads
    qkv = (z @ attn.qkv.weight.T + attn.qkv.bias).unflatten(1, (3, heads, -1))
    merged = torch.stack([qkv[group].mean(0) for group in groups])
    q, k, v = merged.permute(1, 2, 0, 3)
    out = torch.softmax(q @ k.transpose(1, 2) * q.shape[-1] ** -0.5, dim=2) @ v
    return (out.transpose(0, 1).flatten(1) @ attn.proj.weight.T + attn.proj.bias)[reads]


@pytest.mark.parametrize("backbone,options", [
    ("deit", {"protected": 0.2}),
    ("deit", {"protected": 0.5, "ratio": 0.12, "seed": 4}),
    ("registers_only", {"protected": 0.0, "ratio": 0.2, "seed": None}),
    ("gap", {"protected": 0.3, "stride": (1, 2), "frames": 4}),
    ("non_square", {"protected": 0.25, "stride": (2, 3), "ratio": 0.2}),
])  # fmt: skip
@torch.no_grad()
def test_merge_attend_unmerge_written_out(backbone, options):
    model, method = build(backbone).double(), FastVGGT(**options)
    x, grid, prefix = images(model, 2).double(), model.patch_embed.grid_size, model.num_prefix_tokens
    sequences = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    expected, inside = [], set()
    for tokens in sequences:
        for index, block in enumerate(model.blocks):
            z = block.norm1(tokens)
            groups, reads = slow_map(method, z, grid, prefix, index)
            inside.add((index, len(groups)))
            tokens = tokens + block.ls1(slow_attention(block.attn, z, groups, reads))
            tokens = tokens + block.ls2(block.mlp(block.norm2(tokens)))
        expected.append(model.norm(tokens))
    tokenzoo.patch_model(model, "vggt", **options)
    found = model.forward_tokens(x, trace=True)
    torch.testing.assert_close(found.x, torch.stack(expected))
    assert {(note.block, note.map.n_out) for note in found.inside} == inside and found.trace == ()


def decide(method, tokens, block=0):
    signals = Signals(None, None, tokens)
    signals.branch_input = tokens.x
    return method.map(tokens, signals, tokenzoo.Recipe((method,)).steps(3)[block][0])


def partition(token_map, image):
    """Old tokens of every row inside of attention that holds any: the sets that are averaged, sorted."""
    weight = token_map.matrix()[image]
    rows = [tuple(row.nonzero().flatten().tolist()) for row in weight]
    return sorted(row for row in rows if row)


@pytest.mark.parametrize("prefix,stride,protect,seed,frames", [
    (1, 2, 0.1, 33, 2), (5, (2, 3), 0.3, None, 2), (0, (1, 2), 0.0, 7, 3), (1, (1, 2), 0.9, 1, 2),
])  # fmt: skip
def test_the_same_parts_by_operations(prefix, stride, protect, seed, frames):
    """Graphs and other devices make rows by operations; eager on a CPU they are known as plain integers."""
    method = FastVGGT(stride=stride, protected=protect, seed=seed, frames=frames)
    layout = Layout(prefix, prefix > 0, (6, 6))
    tokens = Tokens(torch.randn(2, prefix + 36, 4), layout)
    for block in (0, 2):
        step = tokenzoo.Recipe((method,)).steps(3)[block][0]
        found = step.count(tokens.length, layout)
        known, made = _known_parts(tokens, found, step), _parts(tokens, found, step)
        assert all(torch.equal(a, b) for a, b in zip(known, made, strict=True))


@pytest.mark.parametrize("prefix,stride,protect,ratio,seed,frames", [
    (0, 2, 0.1, 0.9, 33, 2), (1, 2, 0.5, 0.1, 7, 3), (5, (2, 3), 0.3, 0.2, None, 2), (1, (1, 2), 0.9, 0.9, 1, 2),
    (2, 3, 0.0, 0.3, 33, 6),
])  # fmt: skip
@pytest.mark.parametrize("m", [24, 36, 42])
def test_groups_and_counts(prefix, stride, protect, ratio, seed, frames, m):
    """What merges is what the equations say, in full grids and without one, and counts are known in advance."""
    if m == 36 and (frames == 6 or stride == 3):
        stride = (1, 3)  # images of one row
    method = FastVGGT(ratio=ratio, stride=stride, protected=protect, seed=seed, frames=frames)
    layout = Layout(prefix, prefix > 0, (6, 6), track_positions=True)
    x = torch.randn(2, prefix + m, 6, generator=torch.Generator().manual_seed(m), dtype=torch.float64)
    for block in (0, 2):
        step = tokenzoo.Recipe((method,)).steps(3)[block][0]
        token_map = decide(method, Tokens(x, layout), block)
        for image in range(2):
            groups, reads = slow_map(method, x[image], layout.grid, prefix, block)
            assert method.tokens_inside(prefix + m, step, layout) == len(groups)
            if token_map is None:
                assert len(groups) == prefix + m and reads == list(range(prefix + m))
                continue
            assert token_map.n_out == len(groups)
            assert partition(token_map, image) == sorted(tuple(sorted(group)) for group in groups)
            back = token_map.lift(token_map.apply(x))[image]
            torch.testing.assert_close(back, torch.stack([x[image, groups[row]].mean(0) for row in reads]))
            alone = [i for i, row in enumerate(reads) if groups[row] == [i]]
            assert torch.equal(back[alone], x[image, alone]) and alone


def padded(counts, prefix, grid):
    """Sequences of different lengths in scrambled order, padding behind; their positions."""
    g, total, longest = torch.Generator().manual_seed(3), grid[0] * grid[1], max(counts)
    valid = torch.arange(prefix + longest) < prefix + torch.tensor(counts).unsqueeze(1)
    place = torch.full(valid.shape, -1)
    for image, count in enumerate(counts):
        place[image, :prefix] = torch.arange(prefix)
        place[image, prefix : prefix + count] = prefix + torch.randperm(total, generator=g)[:count]
    x = torch.randn(*valid.shape, 6, generator=g)
    # padding looks like the first patch: everybody's favourite, if it were asked
    x = torch.where(valid.unsqueeze(2), x, x[:, prefix : prefix + 1])
    return Tokens(x, Layout(prefix, prefix > 0, grid, track_positions=True), valid=valid, positions=place)


@pytest.mark.parametrize("prefix,protect,ratio", [(0, 0.1, 0.9), (1, 0.4, 0.1), (5, 0.7, 0.9), (1, 0.0, 0.2)])
@pytest.mark.parametrize("counts", [(20, 11, 16, 1, 4), (24, 9, 24)])
def test_padding_has_no_influence(prefix, protect, ratio, counts):
    """After another reduction, sequences of different lengths merge as they do alone; no token gets lost."""
    tokens, method = padded(counts, prefix, (4, 6)), FastVGGT(ratio=ratio, protected=protect)
    together = decide(method, tokens)
    back = together.lift(together.apply(tokens.x))
    assert not (together.valid[:, 1:] & ~together.valid[:, :-1]).any()  # real rows are in front
    for image, count in enumerate(counts):
        real = slice(0, prefix + count)
        own = Tokens(tokens.x[image, None, real], tokens.layout, positions=tokens.positions[image, None, real])
        alone = decide(method, own)
        rows = [(i,) for i in range(prefix + count)] if alone is None else partition(alone, 0)
        assert partition(together, image) == rows and together.valid[image].sum() == len(rows)
        expected = own.x[0] if alone is None else alone.lift(alone.apply(own.x))[0]
        torch.testing.assert_close(back[image, real], expected)


def test_scrambled_patches_keep_their_images_and_cells():
    x, g = torch.randn(1, 17, 6, generator=torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1)
    order = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(16, generator=g)])
    layout, method = Layout(1, True, (4, 4), track_positions=True), FastVGGT(protected=0.3, ratio=0.12)
    straight = decide(method, Tokens(x, layout))
    scrambled = decide(method, Tokens(x[:, order], layout, positions=order.unsqueeze(0)))
    renamed = sorted(tuple(sorted(int(order[i]) for i in group)) for group in partition(scrambled, 0))
    assert renamed == partition(straight, 0)
    torch.testing.assert_close(scrambled.lift(scrambled.apply(x[:, order])), straight.lift(straight.apply(x))[:, order])


def test_hidden_tokens_leave_visible_ones_alone():
    tokens = Tokens(torch.randn(1, 17, 6, generator=torch.Generator().manual_seed(0)), Layout(1, True, (4, 4)))
    visible = torch.ones(1, 17, dtype=torch.bool)
    visible[:, [3, 5, 9, 16]] = False
    method, (step,) = FastVGGT(protected=0.3), tokenzoo.Recipe((FastVGGT(protected=0.3),)).steps(1)[0]
    outputs = []
    for values in (0.0, 100.0):
        x = torch.where(visible.unsqueeze(2), tokens.x, values + tokens.x)
        signals = Signals(None, None, tokens)
        signals.branch_input = x
        token_map = step.decide(tokens._replace(x=x, visible=visible), signals)
        outputs.append(token_map.lift(token_map.apply(x)))
    assert method.protected == 0.3 and torch.equal(outputs[0][visible], outputs[1][visible])


@pytest.mark.parametrize("form", ["merge", "assign"])
def test_the_map_is_its_matrix(form):
    order, src, slot = torch.tensor([[0, 1, 3, 4]]), torch.tensor([[2, 5]]), torch.tensor([[1, 1]])
    merge, rows = MergeMap(order, src, slot, 7), torch.tensor([[1, 6]])
    valid = None
    if form == "assign":
        heads, valid = torch.tensor([[0, 1, 3, 4, -1]]), torch.tensor([[True, True]])
        merge = AssignMap(merge.assign, heads, None, torch.tensor([[True, True, True, True, False]]))
    token_map, x = BesideMap(merge, rows, valid), torch.randn(1, 7, 3, dtype=torch.float64)
    behind = merge.n_out
    torch.testing.assert_close(token_map.matrix() @ x, token_map.apply(x))
    torch.testing.assert_close(token_map.apply(x)[:, behind:], x[:, rows[0]])
    assert token_map.assign.tolist() == [[0, behind, 1, 2, 3, 1, behind + 1]]
    assert token_map.heads[:, behind:].tolist() == [[1, 6]] and token_map.n_out == behind + 2
    assert token_map.pool(torch.ones(1, 7, 1))[0, :4, 0].tolist() == [1, 3, 1, 1]  # token 1 counts in its group too
    visible = torch.tensor([[True, False, True, True, True, True, True]])
    masked = token_map.masked(visible)
    torch.testing.assert_close(masked.apply(x)[:, 1], (x[:, 2] + x[:, 5]) / 2)
    torch.testing.assert_close(masked.apply(x)[:, behind], x[:, 1])


def test_scores_of_a_draw_one_by_one():
    for seed in (0, 33 * 1009 + 5, 10**9):
        assert fixed_draw(50, seed, torch.device("cpu")).tolist() == [drawn(i, seed) for i in range(50)]


@torch.no_grad()
def test_ratio_beyond_what_can_merge():
    model = build("deit")
    x = images(model)
    with tokenzoo.patched(model, "vggt"):
        published = model(x)
    with tokenzoo.patched(model, "vggt", ratio=6 / 17 + 1e-9, clip=False):
        assert torch.equal(model(x), published)
    with tokenzoo.patched(model, "vggt", flops=0.95):
        assert not torch.equal(model(x), published)


@pytest.mark.parametrize("options,error,words", [
    ({"ratio": 1.0}, ValueError, ["ratio=1.0", "[0, 1)"]),
    ({"ratio": "half"}, TypeError, ["'half'", "share"]),
    ({"ratio": 0.5, "clip": False}, ValueError,
     ["vggt at block 0", "ratio=0.5", "8 tokens", "at most 6 of 17", "clip=True"]),
    ({"frames": 3}, ValueError, ["vggt at block 0", "frames=3", "4 x 4", "divisor of 4"]),
    ({"frames": 1}, ValueError, ["frames=1", "2 or more"]),
    ({"frames": 2.0}, TypeError, ["frames=2.0", "number of images"]),
    ({"frames": 4}, ValueError, ["vggt at block 0", "stride=2", "1 x 4", "4 images"]),
    ({"stride": 1}, ValueError, ["stride=1", "one patch"]),
    ({"stride": None}, TypeError, ["stride=None", "two whole numbers"]),
    ({"protected": 1}, ValueError, ["protected=1", "[0, 1)"]),
    ({"protected": "all"}, TypeError, ["protected='all'", "protected"]),
    ({"seed": 1.5}, TypeError, ["seed=1.5", "whole"]),
    ({"clip": 1}, TypeError, ["clip=1", "True or False"]),
])  # fmt: skip
def test_refused(options, error, words):
    model = build("deit")
    with pytest.raises(error) as caught:
        tokenzoo.patch_model(model, "vggt", **options)
    assert all(word in str(caught.value) for word in words), caught.value
    assert not tokenzoo.is_patched(model)
