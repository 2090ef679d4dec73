"""ALGM against slow loops written from its description, image by image; fixed counts, padding, odd grids, refusals."""

import itertools
import statistics

import pytest
import torch
from cases import build, images
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenzoo
from tokenzoo.core.method import Step
from tokenzoo.core.tokens import Layout, Tokens
from tokenzoo.maps import AssignMap
from tokenzoo.methods.algm import ALGM, Stage
from tokenzoo.ops.cells.windows import window_members, window_similarity


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


def slow_windows(patches, grid, window, threshold=None, count=None):
    """One image: groups of patches in the new order."""
    scored = []
    for top in range(0, grid[0] - window[0] + 1, window[0]):
        for left in range(0, grid[1] - window[1] + 1, window[1]):
            members = [(top + i) * grid[1] + left + j for i in range(window[0]) for j in range(window[1])]
            pairs = [cosine(patches[i], patches[j]) for i, j in itertools.permutations(members, 2)]
            scored.append((sum(pairs) / len(pairs), members))
    scored.sort(key=lambda pair: -pair[0])
    merged = [m for s, m in scored if s >= threshold] if count is None else [m for _, m in scored[:count]]
    gone = {i for members in merged for i in members}
    return merged + [[i] for i in range(len(patches)) if i not in gone]


def slow_pairs(x, prefix, block):
    """One image: groups of all tokens in the new order."""
    even = [i for i in range(0, len(x), 2) if i >= prefix]
    odd = [j for j in range(1, len(x), 2) if j >= prefix]
    best = {i: max((cosine(x[i], x[j]), j) for j in odd) for i in even}
    values = [value for value, _ in best.values()]
    limit = statistics.mean(values) + statistics.stdev(values) / block if len(values) > 1 else float("inf")
    merged = [i for i in even if best[i][0] >= limit]
    stay = [i for i in even if i not in merged]
    if not prefix:
        stay.sort(key=lambda i: -best[i][0])
    groups = [[i] for i in range(prefix)] + [[i] for i in stay]
    return groups + [[j, *(i for i in merged if best[i][1] == j)] for j in odd]


def check_groups(token_map, tokens, groups):
    """The map of a batch holds the groups of every image, with weighted means, sizes and padding."""
    longest = max(len(own) for own in groups)
    assert token_map.n_out == longest
    out = tokens.reduce(token_map)
    for image, own in enumerate(groups):
        assign = token_map.assign[image].tolist()
        for slot, members in enumerate(own):
            assert [i for i, a in enumerate(assign) if a == slot] == sorted(members)
            weight = tokens.sizes()[image, members]
            mean = (tokens.x[image, members] * weight).sum(0) / weight.sum()
            torch.testing.assert_close(out.x[image, slot], mean, atol=1e-6, rtol=1e-5)
            assert out.size[image, slot] == weight.sum()
            assert int(token_map.heads[image, slot]) == members[0]
        if out.valid is None:
            assert len(own) == longest
        else:
            assert out.valid[image].tolist() == [k < len(own) for k in range(longest)]
            assert (out.x[image, len(own) :] == 0).all() and (out.size[image, len(own) :] == 0).all()


def smooth(batch, n, seed, dim=6):
    """Tokens with neighbours that are alike, to a different degree in every image."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, n, dim, generator=g)
    level = torch.rand(batch, 1, 1, generator=g) * 3
    return x + level * torch.randn(batch, 1, dim, generator=g)


@settings(max_examples=40, deadline=None)
@given(
    grid=st.tuples(st.integers(2, 7), st.integers(2, 7)), window=st.sampled_from([(2, 2), (1, 2), (2, 3), (3, 3)]),
    prefix=st.sampled_from([0, 1, 2, 5]), seed=st.integers(0, 9999), threshold=st.sampled_from([0.3, 0.6, 0.9]),
)  # fmt: skip
def test_windows(grid, window, prefix, seed, threshold):
    n = grid[0] * grid[1]
    x = smooth(3, prefix + n, seed)
    method = ALGM(threshold=threshold, window=window)
    tokens = Tokens(x, Layout(prefix, prefix > 0, grid, track_size=True))
    token_map = method.map(tokens, None, Step(method, 0, Stage(True, None)))
    groups = []
    for image in x:
        own = slow_windows(image[prefix:].double(), grid, window, threshold)
        groups.append([[i] for i in range(prefix)] + [[prefix + i for i in members] for members in own])
    if token_map is None:
        assert all(len(own) == prefix + n for own in groups)
        return
    check_groups(token_map, tokens, groups)


@settings(max_examples=30, deadline=None)
@given(
    grid=st.tuples(st.integers(2, 6), st.integers(2, 6)), prefix=st.sampled_from([0, 1, 5]),
    seed=st.integers(0, 9999), share=st.floats(0, 1),
)  # fmt: skip
def test_fixed_counts(grid, prefix, seed, share):
    windows = (grid[0] // 2) * (grid[1] // 2)
    count = max(1, round(share * windows))
    x = smooth(2, prefix + grid[0] * grid[1], seed)
    method = ALGM(r=count, layers=(0,))
    tokens = Tokens(x, Layout(prefix, prefix > 0, grid, track_size=True))
    step = Step(method, 0, method.strengths(4)[0])
    groups = []
    for image in x:
        own = slow_windows(image[prefix:].double(), grid, (2, 2), count=count)
        groups.append([[i] for i in range(prefix)] + [[prefix + i for i in members] for members in own])
    token_map = method.map(tokens, None, step)
    assert token_map.valid is None and token_map.n_out == step.tokens_out(tokens.length, tokens.layout)
    check_groups(token_map, tokens, groups)


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(4, 30), prefix=st.sampled_from([0, 1, 2, 5]), seed=st.integers(0, 9999), block=st.integers(1, 9),
    padding=st.booleans(),
)  # fmt: skip
def test_pairs(n, prefix, seed, block, padding):
    x = smooth(3, prefix + n, seed)
    size = torch.randint(1, 5, (3, prefix + n, 1), generator=torch.Generator().manual_seed(seed)).float()
    real = torch.full((3,), n)
    if padding:
        real = torch.randint(2, n + 1, (3,), generator=torch.Generator().manual_seed(seed))
    valid = torch.arange(prefix + n) < prefix + real.unsqueeze(1)
    layout = Layout(prefix, prefix > 0, (1, n), track_size=True)
    # padding holds values that would be everybody's favourite partner
    tokens = Tokens(torch.where(valid.unsqueeze(2), x, x.mean(1, keepdim=True)), layout, size)
    tokens = tokens._replace(valid=valid if padding else None, size=size * valid.unsqueeze(2))
    method = ALGM()
    token_map = method.map(tokens, None, Step(method, block - 1, Stage(False, None)))
    groups = [slow_pairs(x[i, : prefix + real[i]].double(), prefix, block) for i in range(3)]
    if token_map is None:
        assert all(len(own) == prefix + real[i] for i, own in enumerate(groups))
        return
    check_groups(token_map, tokens, groups)


@pytest.mark.parametrize("r", [None, 1, 2])
def test_stretches_behind_padding(r):
    """After another reduction, stretches in raster order merge, in every image as in that image alone."""
    torch.manual_seed(0)
    prefix, counts, length = 1, (12, 7, 9), 13
    layout = Layout(prefix, True, (4, 5), track_size=True, track_positions=True)
    x, place = smooth(3, length, 4), torch.full((3, length), -1)
    valid = torch.arange(length) < prefix + torch.tensor(counts).unsqueeze(1)
    for image, count in enumerate(counts):
        place[image, : prefix + count] = torch.cat([torch.zeros(1), 1 + torch.randperm(20)[:count]]).long()
    tokens = Tokens(x * valid.unsqueeze(2), layout, valid.unsqueeze(2).float(), valid, place)
    method = ALGM(threshold=0.2, r=r)
    step = Step(method, 0, Stage(True, r))
    token_map = method.map(tokens, None, step)
    out = tokens.reduce(token_map)
    for image, count in enumerate(counts):
        order = place[image, prefix : prefix + count].argsort()
        own = slow_windows(x[image, prefix + order].double(), (1, count), (1, 4), 0.2, r)
        merged = [[prefix + int(order[i]) for i in members] for members in own if len(members) > 1]
        gone = {i for members in merged for i in members}
        groups = [[0], *merged, *([i] for i in range(prefix, prefix + count) if i not in gone)]
        assign = token_map.assign[image].tolist()
        for slot, members in enumerate(groups):
            assert sorted(i for i, a in enumerate(assign) if a == slot) == sorted(members)
        assert out.valid[image].sum() == len(groups) and out.valid[image, : len(groups)].all()
        assert out.size[image].sum() == prefix + count
    if r is not None:
        assert token_map.n_out == step.tokens_out(length, layout)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(2, 24), seed=st.integers(0, 9999))
def test_assign_map_is_its_matrix(n, seed):
    g = torch.Generator().manual_seed(seed)
    real = torch.randint(1, n + 1, (2,), generator=g)
    kept = [int(torch.randint(1, int(r) + 1, (), generator=g)) for r in real]
    n_out = max(kept)
    assign, heads = torch.full((2, n), -1), torch.full((2, n_out), -1)
    for image in range(2):
        order = torch.randperm(int(real[image]), generator=g)
        heads[image, : kept[image]] = order[: kept[image]]
        assign[image, order] = torch.randint(kept[image], (len(order),), generator=g)
        assign[image, order[: kept[image]]] = torch.arange(kept[image])
    weight = torch.rand(2, n, 1, generator=g, dtype=torch.float64) + 0.1
    valid = heads >= 0
    x = torch.randn(2, n, 3, generator=g, dtype=torch.float64)
    for given_weight in (weight, None):
        token_map = AssignMap(assign, heads, given_weight, valid)
        torch.testing.assert_close(token_map.apply(x), token_map.matrix() @ x)
        torch.testing.assert_close(token_map.pool(x), token_map.membership().double() @ x)
        alone = (token_map.membership().sum(2) == 1).nonzero().tolist()
        for image, slot in alone:
            assert torch.equal(token_map.apply(x)[image, slot], x[image, heads[image, slot]])
    assert (token_map.lift(token_map.apply(x))[assign < 0] == 0).all()


def test_properties_of_windows():
    x = smooth(2, 24, 3)
    members = window_members((4, 6), (2, 2), x.device).unsqueeze(0)
    score = window_similarity(x, members)
    torch.testing.assert_close(window_similarity(x * (torch.rand(2, 24, 1) + 0.5), members), score)
    assert sorted(members.flatten().tolist()) == list(range(24))
    assert (window_similarity(torch.ones(1, 24, 5), members) - 1).abs().max() < 1e-5
    assert window_members((5, 7), (2, 3), x.device).shape == (4, 6)


@torch.no_grad()
def test_batch_mates_decide_only_when_asked():
    model = build("deit")
    x = images(model, 4)
    options = {"layers": (0, 2), "threshold": 0.1}
    with tokenzoo.patched(model, "algm", **options):
        tokens = model.forward_tokens(x)
        own = [model.forward_tokens(image[None]).length for image in x]
        assert tokens.valid.sum(1).tolist() == own and len(set(own)) > 1 and tokens.length == max(own)
    with tokenzoo.patched(model, "algm", batch_min=True, **options):
        shared = model.forward_tokens(x)
        assert shared.valid is None and shared.length >= max(own)
        doubled = model.forward_tokens(x[:1].expand(2, -1, -1, -1))
        torch.testing.assert_close(doubled.x, model.forward_tokens(x[:1]).x.expand(2, -1, -1))
    with tokenzoo.patched(model, "algm", r=(1, 2), layers=(0, 2)):
        assert model.forward_tokens(x).length == 17 - 3 - 2 == tokenzoo.report(model).tokens_out
        assert not tokenzoo.report(model).data_dependent


@pytest.mark.parametrize("options,error,words", [
    ({"window": 1}, ValueError, ["window=1", "2 or more"]),
    ({"window": (2, 2.5)}, TypeError, ["(2, 2.5)", "whole"]),
    ({"threshold": "high"}, TypeError, ["'high'", "cosine"]),
    ({"r": -1}, ValueError, ["r=-1", "counts"]),
    ({"r": (1, 2, 3)}, ValueError, ["3 entries", "2 layers"]),
    ({"r": (5, 1)}, ValueError, ["algm at block 0", "r=5", "at most 4 windows", "lower r"]),
    ({"r": (4, 3)}, ValueError, ["algm at block 1", "r=3", "at most 2 pairs", "lower r"]),
])  # fmt: skip
def test_refused(options, error, words):
    model = build("deit")
    with pytest.raises(error) as caught:
        tokenzoo.patch_model(model, "algm", **options)
    assert all(word in str(caught.value) for word in words), caught.value
    assert not tokenzoo.is_patched(model)
