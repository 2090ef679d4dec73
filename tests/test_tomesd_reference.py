"""Merging around branches against slow loops: cells, matching, padding, a block written out, refusals."""

import pytest
import torch
from cases import build, images
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenzoo
from tokenzoo.core.signals import Signals
from tokenzoo.core.tokens import Layout, Tokens
from tokenzoo.methods.tomesd import ToMeSD
from tokenzoo.ops.matching.strided import cell_split, split_pairs, stretch_split


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


def slow_cells(grid, stride, pick=None):
    """Destinations of whole cells in raster order of the cells; `pick` numbers the patch of each cell."""
    dst, cell = [], 0
    for top in range(0, grid[0] - stride[0] + 1, stride[0]):
        for left in range(0, grid[1] - stride[1] + 1, stride[1]):
            down, right = divmod(0 if pick is None else pick[cell], stride[1])
            dst.append((top + down) * grid[1] + left + right)
            cell += 1
    return sorted(dst)


def slow_merge(x, src, dst, r):
    """One image: destination of each of the r sources that merge, and the sources that stay by falling similarity."""
    best = {i: max(((cosine(x[i], x[j]), j) for j in dst), key=lambda pair: pair[0]) for i in src}
    ranked = sorted(src, key=lambda i: -best[i][0])
    return {i: best[i][1] for i in ranked[:r]}, ranked[r:]


def groups_of(token_map, image):
    """Old tokens of every new one that holds any."""
    assign = token_map.assign[image].tolist()
    return {frozenset(i for i, a in enumerate(assign) if a == slot) for slot in set(assign) if slot >= 0}


def slow_groups(into, everything):
    return {frozenset([j, *(i for i, k in into.items() if k == j)]) for j in everything if j not in into}


@settings(max_examples=60, deadline=None)
@given(
    grid=st.tuples(st.integers(2, 9), st.integers(2, 9)), stride=st.sampled_from([(2, 2), (1, 2), (2, 3), (3, 3)]),
    seed=st.none() | st.integers(0, 99),
)  # fmt: skip
def test_cells(grid, stride, seed):
    size, count = stride[0] * stride[1], (grid[0] // stride[0]) * (grid[1] // stride[1])
    draw = pick = None
    if seed is not None:
        draw = torch.rand(count, generator=torch.Generator().manual_seed(seed))
        pick = [int(v * size) for v in draw]
    src, dst = cell_split(grid, stride, torch.device("cpu"), draw)
    expected = slow_cells(grid, stride, pick)
    assert dst.tolist() == expected
    assert src.tolist() == [i for i in range(grid[0] * grid[1]) if i not in expected]
    if seed is None:  # graphs and other devices make them by operations
        by_operations = cell_split(grid, stride, torch.device("cpu"), torch.zeros(count))
        assert [part.tolist() for part in by_operations] == [src.tolist(), dst.tolist()]


@pytest.mark.parametrize("patches,length", [(9, 4), (8, 4), (3, 4), (10, 3)])
def test_stretches(patches, length):
    src, dst = stretch_split(patches, length, torch.device("cpu"))
    assert dst.tolist() == list(range(0, patches, length))
    assert sorted([*src.tolist(), *dst.tolist()]) == list(range(patches))


@settings(max_examples=40, deadline=None)
@given(n=st.integers(3, 24), prefix=st.sampled_from([0, 1, 5]), seed=st.integers(0, 9999), share=st.floats(0, 1))
def test_matching(n, prefix, seed, share):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2, prefix + n, 6, generator=g)
    cut = int(torch.randint(1, n, (), generator=g))
    order = prefix + torch.stack([torch.randperm(n, generator=g) for _ in range(2)])
    src, dst = order[:, :cut], order[:, cut:]
    r = round(share * cut)
    pairs = split_pairs(x, src, dst, r, prefix)
    for image in range(2):
        into, rest = slow_merge(x[image].double(), src[image].tolist(), dst[image].tolist(), r)
        new = [*range(prefix), *rest, *dst[image].tolist()]
        assert pairs.order[image].tolist() == new
        assert {int(s): new[int(k)] for s, k in zip(pairs.src[image], pairs.slot[image])} == into


def decide(method, tokens, block=0):
    signals = Signals(None, None, tokens)
    signals.branch_input = tokens.x
    return method.map(tokens, signals, tokenzoo.Recipe((method,)).steps(3)[block][0])


@pytest.mark.parametrize("stride", [2, (1, 3), None])
@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("ratio", [0.3, 0.45, 0.7])
def test_padding_has_no_influence(stride, prefix, ratio):
    """After another reduction, images of different lengths merge as they do alone; no token gets lost."""
    g = torch.Generator().manual_seed(3)
    counts, longest = (20, 11, 16, 17, 4), 20
    layout = Layout(prefix, prefix > 0, (5, 6), track_positions=True)
    x = torch.randn(5, prefix + longest, 6, generator=g)
    valid = torch.arange(prefix + longest) < prefix + torch.tensor(counts).unsqueeze(1)
    place = torch.full(valid.shape, -1)
    for image, count in enumerate(counts):
        place[image, :prefix] = torch.arange(prefix)
        place[image, prefix : prefix + count] = prefix + torch.randperm(30, generator=g)[:count]
    # padding looks like the first patch: everybody's favourite, if it were asked
    x = torch.where(valid.unsqueeze(2), x, x[:, prefix : prefix + 1])
    tokens = Tokens(x, layout, valid=valid, positions=place)
    metric = "x" if stride is not None else "normed"
    method = ToMeSD(ratio=ratio, stride=stride, metric=metric, clip=True)
    together = decide(method, tokens)
    step = tokenzoo.Recipe((method,)).steps(3)[0][0]
    assert together.n_out == method.tokens_inside(tokens.length, step, layout)
    back = together.lift(together.apply(x))
    for image, count in enumerate(counts):
        real = slice(0, prefix + count)
        own = Tokens(x[image, None, real], layout, positions=place[image, None, real])
        alone = decide(method, own)
        assert groups_of(together, image) == groups_of(alone, 0)
        assert together.valid[image].sum() == alone.n_out
        torch.testing.assert_close(back[image, real], alone.lift(alone.apply(own.x))[0])
        if stride is not None:
            cell = 4 if stride == 2 else 3
            order = (prefix + place[image, prefix : prefix + count].argsort()).tolist()
            dst = order[::cell]
            src = [i for i in order if i not in dst]
            into, _ = slow_merge(x[image].double(), src, dst, min(int(count * ratio), len(src)))
            assert groups_of(alone, 0) == slow_groups(into, range(prefix + count))


def test_scrambled_patches_keep_their_cells():
    """Tokens that all are there but in another order: cells follow the image, not the sequence."""
    g = torch.Generator().manual_seed(0)
    x, order = torch.randn(1, 17, 6, generator=g), torch.cat([torch.zeros(1), 1 + torch.randperm(16, generator=g)])
    order = order.long()
    layout = Layout(1, True, (4, 4), track_positions=True)
    method = ToMeSD(ratio=0.5, stride=2)
    straight = decide(method, Tokens(x, layout))
    scrambled = decide(method, Tokens(x[:, order], layout, positions=order.unsqueeze(0)))
    renamed = {frozenset(int(order[i]) for i in members) for members in groups_of(scrambled, 0)}
    assert renamed == groups_of(straight, 0)


def slow_block(block, x, ratio, branches, metric, prefix, grid):
    """One image through a pre-norm block, merging written out; returns what leaves it."""

    def merged(z, source):
        n = len(z)
        dst = [prefix + i for i in slow_cells(grid, (2, 2))]
        src = [i for i in range(prefix, n) if i not in dst]
        into, _ = slow_merge(source.double(), src, dst, int((n - prefix) * ratio))
        heads = [i for i in range(n) if i not in into]
        rows = [torch.stack([z[i], *(z[k] for k in into if into[k] == i)]).mean(0) for i in heads]
        read = [heads.index(into.get(i, i)) for i in range(n)]
        return torch.stack(rows), read

    start = x
    for name, norm, run in (("attention", block.norm1, block.attn), ("mlp", block.norm2, block.mlp)):
        z = norm(x)
        if name in branches:
            rows, read = merged(z, start if metric == "x" else z)
            x = x + run(rows[None])[0][read]
        else:
            x = x + run(z[None])[0]
    return x


@pytest.mark.parametrize("ratio", [0.5, 0.95])
def test_a_full_image_beside_a_shorter_one(ratio):
    """One image has all its patches, and cells of a grid that they do not divide; the other has lost some, and rows.

    So neither depends on its batch mate.
    """
    x, count = torch.randn(2, 35, 6, generator=torch.Generator().manual_seed(0)), 33
    valid = torch.arange(35) < torch.tensor([[35], [count]])
    place = torch.where(valid, torch.arange(35), -1)
    tokens = Tokens(x, Layout(0, False, (5, 7), track_positions=True), valid=valid, positions=place)
    together = decide(ToMeSD(ratio=ratio, clip=True), tokens)
    for image, own in enumerate((35, count)):
        cells = [7 * row + column for row in (0, 2) for column in (0, 2, 4)]
        dst = cells if own == 35 else list(range(0, own, 4))
        src = [i for i in range(own) if i not in dst]
        into, _ = slow_merge(x[image].double(), src, dst, min(int(own * ratio), len(src)))
        assert groups_of(together, image) == slow_groups(into, range(own))
        assert together.valid[image].sum() == own - len(into)


@pytest.mark.parametrize("metric", ["x", "normed"])
@pytest.mark.parametrize("branches", [("attention",), ("mlp",), ("attention", "mlp")])
@torch.no_grad()
def test_a_block_written_out(metric, branches):
    model = build("deit")
    x = images(model, 2)
    embedded = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    expected = embedded
    for block in model.blocks:
        expected = torch.stack([slow_block(block, t, 0.5, branches, metric, 1, (4, 4)) for t in expected])
    tokenzoo.patch_model(model, "tomesd", branches=branches, metric=metric)
    torch.testing.assert_close(model.forward_features(x), model.norm(expected), atol=1e-5, rtol=1e-4)
    assert model.forward_tokens(x, trace=True).trace == ()


@torch.no_grad()
def test_seeds():
    x = torch.randn(2, 37, 6, generator=torch.Generator().manual_seed(0))
    tokens = Tokens(x, Layout(1, True, (6, 6)))
    heads = lambda method, block=0: decide(method, tokens, block).heads[:, -9:]  # noqa: E731
    drawn = heads(ToMeSD(seed=1))
    assert torch.equal(drawn, heads(ToMeSD(seed=1))) and torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn, heads(ToMeSD(seed=2))) and not torch.equal(drawn, heads(ToMeSD(seed=1), 1))
    assert not torch.equal(drawn, heads(ToMeSD()))
    cells = (drawn[0] - 1) // 6 // 2 * 3 + (drawn[0] - 1) % 6 // 2
    assert sorted(cells.tolist()) == list(range(9))


@pytest.mark.parametrize("options,error,words", [
    ({"ratio": 1.0}, ValueError, ["ratio=1.0", "[0, 1)"]),
    ({"ratio": "half"}, TypeError, ["'half'", "share"]),
    ({"ratio": 0.85}, ValueError, ["tomesd at block 0", "ratio=0.85", "13 tokens", "at most 12 of 17", "clip=True"]),
    ({"ratio": 0.6, "stride": None}, ValueError, ["tomesd at block 0", "merge 10 tokens", "at most 8", "clip=True"]),
    ({"stride": 1}, ValueError, ["stride=1", "one patch"]),
    ({"stride": 5}, ValueError, ["tomesd at block 0", "stride=5", "4 x 4"]),
    ({"stride": (2, "2")}, TypeError, ["stride=(2, '2')", "None"]),
    ({"branches": ("attn",)}, ValueError, ["'attn'", "'mlp'"]),
    ({"branches": ()}, ValueError, ["branches=()", "'attention'"]),
    ({"metric": "keys"}, ValueError, ["'keys'", "'normed'"]),
    ({"seed": 1.5}, TypeError, ["seed=1.5", "whole"]),
    ({"seed": 1, "stride": None}, ValueError, ["seed=1", "stride=None"]),
])  # fmt: skip
def test_refused(options, error, words):
    model = build("deit")
    with pytest.raises(error) as caught:
        tokenzoo.patch_model(model, "tomesd", **options)
    assert all(word in str(caught.value) for word in words), caught.value
    assert not tokenzoo.is_patched(model)


@torch.no_grad()
def test_clip():
    model = build("deit")
    x = images(model)
    with tokenzoo.patched(model, "tomesd", ratio=0.9, clip=True):
        clipped = model(x)
    with tokenzoo.patched(model, "tomesd", ratio=0.75):
        assert torch.equal(model(x), clipped)
