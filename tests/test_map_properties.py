"""Every form of token map against its own dense matrix, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenzoo.core.filtering import filtered
from tokenzoo.core.lift import lift
from tokenzoo.core.tokens import Layout, Tokens, trace_assign
from tokenzoo.maps import (
    ChainMap,
    FuseMap,
    GatedMergeMap,
    GateMap,
    KeepMap,
    MergeMap,
    MixMap,
    Moves,
    NoteMap,
    SpreadMap,
)
from tokenzoo.ops.matching.bipartite import Pairs

FORMS = ("keep", "keep_padded", "merge", "merge_weighted", "merge_pairs", "merge_sum", "merge_assign", "merge_dropped",
         "fuse", "mix", "mix_prefix", "gate", "gated_merge", "note", "spread", "low_pass", "chain")  # fmt: skip
SOFT = ("mix", "mix_prefix", "spread", "low_pass")


def random_rows(batch, n, count, generator):
    return torch.stack([torch.randperm(n, generator=generator)[:count] for _ in range(batch)])


def make(form, n, seed, batch=2):
    g = torch.Generator().manual_seed(seed)
    keep = 1 + int(torch.randint(n - 1, (), generator=g))
    order = random_rows(batch, n, n, g)
    heads, src = order[:, :keep], order[:, keep:]
    slot = torch.randint(keep, (batch, n - keep), generator=g)
    weight = torch.rand(batch, n, 1, generator=g, dtype=torch.float64) + 0.1
    if form == "keep":
        return KeepMap(heads, n)
    if form == "keep_padded":
        counts = torch.randint(1, keep + 1, (batch, 1), generator=g)
        return KeepMap(heads, n, torch.arange(keep).unsqueeze(0) < counts)
    if form == "merge":
        return MergeMap(heads, src, slot, n)
    if form == "merge_weighted":
        return MergeMap(heads, src, slot, n, weight)
    if form == "merge_pairs":  # no slot is looked at
        return MergeMap.of_pairs(Pairs(heads, src, slot), n, weight)
    if form == "merge_sum":
        return MergeMap(heads, src, slot, n, reduce="sum")
    if form == "merge_assign":
        assign = torch.randint(keep, (batch, n), generator=g).scatter(1, heads, torch.arange(keep).expand(batch, -1))
        return MergeMap.from_assign(heads, assign, weight)
    if form == "merge_dropped":
        return MergeMap(heads, src, torch.where(torch.rand(slot.shape, generator=g) < 0.5, slot, -1), n, weight)
    if form == "fuse":
        left_out = torch.ones(batch, n, dtype=torch.bool).scatter(1, heads, False)
        return FuseMap(heads, weight.squeeze(-1) * left_out, left_out)
    if form == "gate":
        return GateMap(torch.ones(batch, n, dtype=torch.float64).scatter(1, src, 0.0))
    if form == "gated_merge":
        gate = torch.ones(batch, n, dtype=torch.float64).scatter(1, src, 0.0)
        moved = (torch.rand(slot.shape, generator=g) < 0.5).double()
        into = torch.arange(n).expand(batch, -1).scatter(1, src, heads.gather(1, slot))
        taken = torch.zeros_like(gate).scatter(1, src, moved)
        return GatedMergeMap(gate, Moves(into, taken, weight.squeeze(-1)))
    if form == "mix":
        return MixMap(torch.randn(batch, keep, n, generator=g, dtype=torch.float64))
    if form == "mix_prefix":
        return MixMap(torch.randn(batch, keep, n - 1, generator=g, dtype=torch.float64), num_prefix=1)
    if form == "note":
        return NoteMap(torch.zeros(batch, n, 1), object())
    if form == "spread":  # one prefix token in front
        shares = torch.rand(batch, keep, n - 1, generator=g, dtype=torch.float64).softmax(1)
        front = torch.zeros(batch, 1, dtype=torch.int64)
        anchors = 1 + torch.randint(n - 1, (batch, keep), generator=g)
        return SpreadMap(torch.cat([front, anchors], 1), shares, 1, weight[:, 1:].transpose(1, 2))
    if form == "low_pass":
        return filtered(Tokens(torch.zeros(batch, n, 1), Layout(0, False, (1, n))), None, lambda n: keep)
    first = make("merge_weighted", n, seed + 1, batch)
    return ChainMap(first, make("keep", first.n_out, seed + 2, batch) if first.n_out > 1 else first_identity(first))


def first_identity(token_map):
    return KeepMap(torch.arange(token_map.n_out).expand(token_map.heads.shape[0], -1), token_map.n_out)


sizes = given(n=st.integers(2, 24), seed=st.integers(0, 10_000))
forms = pytest.mark.parametrize("form", FORMS)


@forms
@settings(max_examples=25, deadline=None)
@sizes
def test_apply_is_the_matrix(form, n, seed):
    token_map = make(form, n, seed)
    x = torch.randn(2, n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    out = token_map.apply(x)
    assert out.shape == (2, token_map.n_out, 3)
    torch.testing.assert_close(out, token_map.matrix().double() @ x, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(token_map.apply(x[:1].expand(2, -1, -1))[0], out[0])  # batch mates have no influence


@forms
@settings(max_examples=25, deadline=None)
@sizes
def test_pooling_is_membership_and_keeps_mass(form, n, seed):
    token_map = make(form, n, seed)
    mass = torch.rand(2, n, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.1
    pooled = token_map.pool(mass)
    if form != "chain":
        torch.testing.assert_close(pooled, token_map.membership().double() @ mass, atol=1e-6, rtol=1e-6)
    kept = (token_map.assign >= 0).unsqueeze(-1)
    if form != "mix":
        tol = 1e-6 if form == "low_pass" else 1e-9  # shares of stretches are float32
        torch.testing.assert_close(pooled.sum(1), (mass * kept).sum(1), atol=tol, rtol=tol)
    else:
        torch.testing.assert_close(pooled.sum(1), mass.sum(1), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("form", [form for form in FORMS if form not in SOFT])  # soft: no token is alone
@settings(max_examples=25, deadline=None)
@sizes
def test_tokens_that_stand_for_themselves_come_back(form, n, seed):
    token_map = make(form, n, seed)
    x = torch.randn(2, n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    out, assign, heads = token_map.apply(x), token_map.assign, token_map.heads
    assert assign.min() >= -1 and assign.max() < token_map.n_out and heads.shape == (2, token_map.n_out)
    back = token_map.lift(out)
    stashed = token_map.lift(out, x)
    for image in range(2):
        for old in range(n):
            new = int(assign[image, old])
            if new < 0:
                assert (back[image, old] == 0).all()
                if form != "chain":  # there, what was dropped may have been merged before
                    torch.testing.assert_close(stashed[image, old], x[image, old])
                continue
            members = (assign[image] == new).sum()
            if members == 1 and heads[image, new] == old:
                assert torch.equal(back[image, old], x[image, old])
            elif form != "fuse":
                assert torch.equal(back[image, old], out[image, new])


def test_elementwise_maximum():
    token_map = MergeMap(torch.tensor([[0, 2]]), torch.tensor([[1, 3]]), torch.tensor([[1, 1]]), 4, reduce="max")
    x = torch.tensor([[[1.0], [5.0], [3.0], [4.0]]])
    assert token_map.apply(x).flatten().tolist() == [1.0, 5.0]
    assert not token_map.linear
    with pytest.raises(TypeError, match="max"):
        token_map.matrix()


def test_side_data_follows_the_map():
    layout = Layout(1, True, (2, 3), track_size=True, track_positions=True, keep_values=True)
    x = torch.arange(7.0).view(1, 7, 1)
    tokens = Tokens(x, layout, coords=torch.arange(14.0).view(1, 7, 2), trace=())
    merge = MergeMap(torch.tensor([[0, 1, 3, 5]]), torch.tensor([[2, 4, 6]]), torch.tensor([[1, 1, 3]]), 7)
    tokens = tokens.reduce(merge, 0, "a")
    assert tokens.size.flatten().tolist() == [1, 3, 1, 2]
    assert tokens.positions.tolist() == [[0, 1, 3, 5]]
    torch.testing.assert_close(tokens.coords[0, 1], torch.tensor([(2 + 4 + 8) / 3, (3 + 5 + 9) / 3]))
    left_out = torch.tensor([[False, False, True, True]])
    fused = tokens.reduce(FuseMap(torch.tensor([[0, 1]]), left_out.float(), left_out), 1, "b")
    assert fused.positions.tolist() == [[0, 1, -1]]
    assert fused.size.flatten().tolist() == [1, 3, 3]
    assign = trace_assign(fused.trace, 1, 7, x.device)
    assert assign.tolist() == [[0, 1, 1, 2, 1, 2, 2]]
    zero = lift(fused.x, fused.trace, "zero")
    assert zero[0, :, 0].tolist() == [fused.x[0, i, 0].item() for i in assign[0]]
    stash = lift(fused.x, fused.trace)
    assert stash[0, 3, 0] == 3.0  # as it was when it was left out
    assert stash[0, 5, 0] == stash[0, 6, 0] == 5.5
    # the kept tokens before the step were 0 and 1 3 5 averaged; 3 and 5.5 are nearest to the merged one
    nearest = lift(fused.x, fused.trace, "nearest")
    assert nearest[0, [3, 5, 6], 0].tolist() == [fused.x[0, 1, 0].item()] * 3
    with pytest.raises(ValueError, match="fill='nearst'"):
        lift(fused.x, fused.trace, "nearst")
    bare = tuple(step._replace(before=None) for step in fused.trace)
    with pytest.raises(ValueError, match="dense=True"):
        lift(fused.x, bare)
    with pytest.raises(ValueError, match="map of 7 tokens met a sequence of 3"):
        fused.reduce(merge)


@pytest.mark.parametrize("reduce", ["sum", "max"])
def test_sums_and_maxima_know_no_weights(reduce):
    """Weights are those of means: one of zero leaves nobody out, unless a mask hides the token."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, 3, generator=generator, dtype=torch.float64)
    order, src, slot = (torch.tensor([row] * 2) for row in ([0, 1, 2], [3, 4, 5], [1, 1, 2]))
    weight = torch.ones(2, 6, 1)
    weight[:, 3] = 0
    weighted = MergeMap(order, src, slot, 6, weight, reduce)
    assert torch.equal(weighted.apply(x), MergeMap(order, src, slot, 6, None, reduce).apply(x))
    visible = torch.ones(2, 6, dtype=torch.bool)
    visible[:, 4] = False
    together = x[:, [1, 3]]
    wanted = together.sum(1) if reduce == "sum" else together.amax(1)
    torch.testing.assert_close(weighted.masked(visible).apply(x)[:, 1], wanted, atol=1e-12, rtol=0)


def test_sums_of_the_weights_are_used_again():
    """Sizes are summed before values are merged: the same numbers as alone, and other weights are not mistaken."""
    merge, x = make("merge_pairs", 9, 3), torch.randn(2, 9, 4, dtype=torch.float64)
    alone = merge.apply(x)
    for size in (merge.weight, merge.weight * 2):
        again = make("merge_pairs", 9, 3)
        again.weight = merge.weight
        torch.testing.assert_close(again.mass(size, 2, x.device), merge.pool(size))
        torch.testing.assert_close(again.apply(x), alone)
        torch.testing.assert_close(again.apply(x.float()), alone.float())
