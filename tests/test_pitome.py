"""PiToMe against loops written from the paper's equations, what it must hold, and what is refused."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import build, images
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import tokenzoo
from tokenzoo.core.selection import groups_with_prefix
from tokenzoo.core.tokens import Layout, Tokens
from tokenzoo.maps import MergeMap, group_map
from tokenzoo.ops.matching import energy as ops


def slow_energy(metric, margin, alpha, gaussian):
    """One image, token by token."""
    units = [row / row.norm() for row in metric]
    out = []
    for u in units:
        total = 0.0
        for v in units:
            y = float(u @ v) - margin
            if gaussian:
                width = 1 - margin
                total += math.exp(-0.5 * ((1 - y - margin) / width) ** 2) / (width * math.sqrt(2 * math.pi))
            else:
                total += y if y > 0 else alpha * (math.exp(y) - 1)
        out.append(total / len(units))
    return out


def slow_groups(metric, energy, r, split):
    """One image: members of every new token in the new order, its head first."""
    units = [row / row.norm() for row in metric]
    order = sorted(range(len(energy)), key=lambda t: -energy[t])
    likeness = lambda i, j: float(units[i] @ units[j])  # noqa: E731
    if split == "all":
        a, b = order[0::2], order[1::2]
        a = sorted(a, key=lambda i: -max(likeness(i, j) for j in b))
        stays, a = a[r:], a[:r]
    else:
        stays = order[2 * r :]
        a, b = (order[:r], order[r : 2 * r]) if split == "halves" else (order[0 : 2 * r : 2], order[1 : 2 * r : 2])
    groups = {j: [j] for j in [*stays, *b]}
    for i in a:
        groups[max(b, key=lambda j: likeness(i, j))].append(i)
    return list(groups.values())


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(4, 20), share=st.floats(0, 1), seed=st.integers(0, 999), margin=st.sampled_from([0.0, 0.3, 0.75]),
    alpha=st.sampled_from([1.0, 0.5]), split=st.sampled_from(ops.SPLITS), padding=st.integers(0, 5),
)  # fmt: skip
def test_groups_are_the_loops(n, share, seed, margin, alpha, split, padding):
    """Every image of a padded batch as it is alone."""
    counts, gaussian = (n, max(3, n - padding)), split == "halves"
    removed = [max(least, round(share * (count // 2))) for count, least in zip(counts, (1, 0))]
    metric = F.normalize(torch.randn(2, n, 6, generator=torch.Generator().manual_seed(seed)), dim=-1)
    real, own = torch.tensor(counts)[:, None], torch.tensor(removed)[:, None]
    counted = torch.arange(n) < real
    energy = ops.cluster_energy(metric, margin, alpha, gaussian, counted)
    plan = ops.energy_groups(metric, energy.masked_fill(~counted, float("-inf")), max(removed), split, real, own)
    for image, (count, r) in enumerate(zip(counts, removed)):
        alone = metric[image, :count].double()
        expected = slow_energy(alone, margin, alpha, gaussian)
        torch.testing.assert_close(energy[image, :count].double(), torch.tensor(expected).double(), atol=1e-5, rtol=0)
        # of three tokens, two can be alike in all that decides: float32 orders such as it rounds them
        assume(torch.tensor(expected).sort().values.diff().min() > 1e-6)
        groups = slow_groups(alone, expected, r, split)
        assign, head = (part[image] for part in plan)
        assert (assign[count:] == -1).all() and not head[count:].any()
        found = [sorted((assign == slot).nonzero().flatten().tolist()) for slot in range(len(groups))]
        assert found == [sorted(group) for group in groups]
        assert sorted(head.nonzero().flatten().tolist()) == sorted(group[0] for group in groups)
        if r:
            lone = metric[image : image + 1, :count]
            single = ops.energy_groups(lone, ops.cluster_energy(lone, margin, alpha, gaussian), r, split)
            assert torch.equal(single[0][0], assign[:count]) and torch.equal(single[1][0], head[:count])


def test_energy():
    """A copy raises it, and where every cosine exceeds the margin it is their mean."""
    units = F.normalize(torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(0)), dim=-1)
    energy = ops.cluster_energy(units, 0.4)
    torch.testing.assert_close(ops.cluster_energy(units, -1.5), (units @ units.mT).mean(2) + 1.5)
    twice = ops.cluster_energy(torch.cat([units, units[:, :1]], dim=1), 0.4)
    assert (twice[:, 0] > energy[:, 0]).all()


def test_slices_equal_the_whole(monkeypatch):
    metric = F.normalize(torch.randn(2, 23, 5, generator=torch.Generator().manual_seed(0)), dim=-1)
    whole = ops.cluster_energy(metric, 0.4)
    monkeypatch.setattr(ops, "_CHUNK_ABOVE", 4)
    monkeypatch.setattr(ops, "_CHUNK", 3)
    torch.testing.assert_close(ops.cluster_energy(metric, 0.4), whole)


@torch.no_grad()
def test_what_stands_alone_stays_as_it_is():
    """The tokens of lowest energy are exact copies, and the order of the patches does not matter."""
    generator = torch.Generator().manual_seed(3)
    x, metric = torch.randn(2, 16, 7, generator=generator), torch.randn(2, 16, 5, generator=generator)
    metric = F.normalize(metric, dim=-1)
    turned = torch.randperm(16, generator=generator)
    outs = []
    for at in (torch.arange(16), turned):
        energy = ops.cluster_energy(metric[:, at], 0.5)
        tokens = Tokens(x[:, at], Layout(0, False, (4, 4), track_size=True))
        merge = group_map(*ops.energy_groups(metric[:, at], energy, 5), 11, None, None)
        outs.append(tokens.reduce(merge))
        lowest = energy.argsort(dim=1, descending=True)[:, 10:]
        assert torch.equal(outs[-1].x[:, :6], tokens.x.gather(1, lowest[..., None].expand(-1, -1, 7)))
        assert (outs[-1].size[:, :6] == 1).all() and (outs[-1].size.sum(1) == 16).all()
    torch.testing.assert_close(outs[0].x, outs[1].x)


@torch.no_grad()
def test_forms_and_margins_by_block():
    """Half of the blocks is softer, margins fall in a line, and options change what comes out."""
    depth_five = {  # the first half is the larger one
        "first": [True, True, True, False, False], "last": [False, False, False, True, True], "all": [True] * 5,
        "none": [False] * 5,
    }  # fmt: skip
    for ordered, soft in depth_five.items():
        strengths = tokenzoo.PiToMe(ordered=ordered, margin=0.5).strengths(5)
        assert [strength[3] for strength in strengths.values()] == soft
        assert [strength[2] for strength in strengths.values()] == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1])
    named = tokenzoo.PiToMe(margin=(0.9, 0.3), layers=(1, 4)).strengths(5)
    assert {i: strength[2:] for i, strength in named.items()} == {1: (0.9, True), 4: (0.3, False)}
    model, outs = build("deit"), []
    x = images(model)
    for options in ({}, {"metric": "tokens"}, {"ordered": "none"}, {"prop_attn": True}, {"energy": "gaussian"},
                    {"margin": 0.2}, {"alpha": 0.1}):  # fmt: skip
        with tokenzoo.patched(model, "pitome", keep_rate=0.7, **options):
            outs.append(model(x))
    assert all(not torch.allclose(a, b, atol=1e-5) for i, a in enumerate(outs) for b in outs[:i])


@pytest.mark.parametrize("options,error,words", [
    ({"keep_rate": 0.4}, ValueError, ["pitome at block 0", "keep_rate=0.4 leaves 7 of 16", "at most 8", "raise it"]),
    ({"keep_rate": 1.5}, ValueError, ["keep_rate=1.5", "(0, 1]"]),
    ({"keep_rate": "half"}, TypeError, ["keep_rate='half'"]),
    ({"keep_rate": (0.9, 0.8)}, ValueError, ["2 entries for 4 layers"]),
    ({"margin": "high"}, TypeError, ["margin='high'", "one per layer"]),
    ({"margin": float("nan")}, ValueError, ["margin=nan"]),
    ({"margin": (0.7, 0.5)}, ValueError, ["margin has 2 entries for 4 layers"]),
    ({"margin": 1.0, "energy": "gaussian"}, ValueError, ["margin=1.0", "width 1 - margin", "below 1"]),
    ({"alpha": -1}, ValueError, ["alpha=-1", "negative"]),
    ({"ordered": "half"}, ValueError, ["ordered='half'", "'first'"]),
    ({"metric": "x"}, ValueError, ["metric='x'", "'keys'"]),
    ({"energy": "normal"}, ValueError, ["energy='normal'", "'gaussian'"]),
    ({"prop_attn": 1}, TypeError, ["prop_attn=1", "True or False"]),
])  # fmt: skip
def test_bad_options(options, error, words):
    model = build("deit")
    with pytest.raises(error) as caught:
        tokenzoo.patch_model(model, "pitome", **options)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not tokenzoo.is_patched(model)


@pytest.mark.parametrize("split", ops.SPLITS)
def test_pairs_are_the_groups(split):
    """Without padding and masks the map is read off the order; it is that of the general rule, behind a prefix too."""
    g = torch.Generator().manual_seed(1)
    units = F.normalize(torch.randn(3, 17, 5, generator=g), dim=-1)
    x, weight = torch.randn(3, 19, 4, generator=g), torch.rand(3, 19, 1, generator=g) + 0.5
    energy = ops.cluster_energy(units, 0.2)
    assign, head = groups_with_prefix(*ops.energy_groups(units, energy, 6, split), 2)
    expected = group_map(assign, head, 13, weight, None)
    found = MergeMap.of_pairs(ops.energy_pairs(units, energy, 6, split, 2), 19, weight)
    assert torch.equal(found.assign, expected.assign) and torch.equal(found.heads, expected.heads)
    torch.testing.assert_close(found.apply(x), expected.apply(x))
    torch.testing.assert_close(found.lift(found.apply(x)), expected.lift(expected.apply(x)))
