"""Matching against slow loops written from the papers' equations, chunks against the whole, padding against none."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenzoo.maps import MergeMap
from tokenzoo.methods.ats import sample_heights
from tokenzoo.ops.matching import bipartite as matching
from tokenzoo.ops.matching import two_way as fusion


def cosine(a, b):
    return float((a @ b) / (a.norm() * b.norm()))


def slow_tome(metric, r, prefix):
    """One image: {source: destination} and the new order."""
    n = len(metric)
    even, odd = range(0, n, 2), range(1, n, 2)
    best = {}
    for i in even:
        if i >= prefix:
            best[i] = max(((cosine(metric[i], metric[j]), j) for j in odd if j >= prefix), key=lambda pair: pair[0])
    ranked = sorted(best, key=lambda i: -best[i][0])
    rest = sorted(ranked[r:]) if prefix else ranked[r:]
    order = [*range(prefix), *rest, *(j for j in odd if j >= prefix)]
    return {i: best[i][1] for i in ranked[:r]}, order


@settings(max_examples=40, deadline=None)
@given(n=st.integers(6, 23), prefix=st.sampled_from([0, 1, 2, 5]), seed=st.integers(0, 999), share=st.floats(0, 1))
def test_bipartite_pairs(n, prefix, seed, share):
    if n < prefix + 2:
        return
    r = round(share * ((n - prefix) // 2))
    metric = torch.randn(2, n, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    pairs = matching.bipartite_pairs(metric, r, prefix)
    for image in range(2):
        into, order = slow_tome(metric[image], r, prefix)
        assert pairs.order[image].tolist() == order
        got = {int(s): order[int(slot)] for s, slot in zip(pairs.src[image], pairs.slot[image])}
        assert got == into
    scaled = metric * (torch.rand(2, n, 1) + 0.5)  # similarity does not see lengths
    assert torch.equal(matching.bipartite_pairs(scaled, r, prefix).src, pairs.src)


def slow_mctf(x, c, size, r, prefix, taus, both):
    """One image: final head of every token, and the new order, by two successive rounds on a full score table."""
    n = len(x)
    g = [1 / float(v) for v in c]
    z = [1 / float(v) for v in size]

    def score(i, j):
        value = ((cosine(x[i], x[j]) + 1) / 2) ** (1 / taus[0]) if taus[0] else 1.0
        if taus[1]:
            value *= (g[i] * g[j] / max(g) ** 2) ** (1 / taus[1])
        if taus[2]:
            value *= (z[i] * z[j] / max(z) ** 2) ** (1 / taus[2])
        return value

    even = [i for i in range(0, n, 2) if i >= prefix]
    odd = [j for j in range(1, n, 2) if j >= prefix]
    r1 = r // 2 if both else r
    best = {i: max(odd, key=lambda j: score(i, j)) for i in even}
    ranked = sorted(even, key=lambda i: -score(i, best[i]))
    gone, left = ranked[:r1], ranked[r1:]
    left = sorted(left) if prefix else left
    into = {i: best[i] for i in gone}
    order_odd = odd
    if both:
        back = {j: max(left, key=lambda i: score(i, j)) for j in odd}
        ranked_odd = sorted(odd, key=lambda j: -score(back[j], j))
        into.update({j: back[j] for j in ranked_odd[: r - r1]})
        order_odd = ranked_odd[r - r1 :]
    final = {}
    for token in range(n):
        head = token
        while head in into:
            head = into[head]
        final[token] = head
    return final, [*range(prefix), *left, *order_odd]


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(10, 23), prefix=st.sampled_from([0, 1, 2, 5]), seed=st.integers(0, 999), share=st.floats(0.1, 0.9),
    taus=st.sampled_from([(1, 20, 40), (4, 2, 2), (1, 0, 0), (0, 1, 1)]), both=st.booleans(),
)  # fmt: skip
def test_fusion_pairs(n, prefix, seed, share, taus, both):
    g = torch.Generator().manual_seed(seed)
    r = max(1, int(share * ((n - prefix) // 2)))
    x = torch.randn(2, n, 6, generator=g)
    c, size = torch.rand(2, n, generator=g) + 0.01, torch.randint(1, 4, (2, n, 1), generator=g).float()
    pairs = fusion.fusion_pairs(x, c, size, r, prefix, taus, both)
    assign = MergeMap(pairs.order, pairs.src, pairs.slot, n).assign
    for image in range(2):
        final, order = slow_mctf(x[image].double(), c[image], size[image], r, prefix, taus, both)
        assert pairs.order[image].tolist() == order
        assert [order[slot] for slot in assign[image].tolist()] == [final[token] for token in range(n)]


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_slices_equal_the_whole(monkeypatch, prefix):
    torch.manual_seed(0)
    x, c, size = torch.randn(2, 41, 8), torch.rand(2, 41), torch.rand(2, 41, 1) + 1
    whole = matching.bipartite_pairs(x, 12, prefix)
    whole_fusion = fusion.fusion_pairs(x, c, size, 12, prefix, (1, 20, 40), True)
    for module in (matching, fusion):
        monkeypatch.setattr(module, "_CHUNK_ABOVE", 4)
        monkeypatch.setattr(module, "_CHUNK", 3)
    for a, b in ((whole, matching.bipartite_pairs(x, 12, prefix)),
                 (whole_fusion, fusion.fusion_pairs(x, c, size, 12, prefix, (1, 20, 40), True))):  # fmt: skip
        assert all(torch.equal(p, q) for p, q in zip(a[:3], b[:3]))


@pytest.mark.parametrize("prefix", [1, 5])
@pytest.mark.parametrize("padding", [1, 4, 7])
def test_padding_has_no_influence(prefix, padding):
    """An image in a longer batch merges as it does alone, and its padding stays behind its real tokens."""
    torch.manual_seed(0)
    n, r = 20, 4
    x, c, size = torch.randn(1, n, 8), torch.rand(1, n), torch.rand(1, n, 1) + 1
    longer = lambda t, fill: torch.cat([t, torch.full_like(t[:, :padding], fill)], dim=1)  # noqa: E731
    valid = torch.arange(n + padding).unsqueeze(0) < n
    plans = [
        (matching.bipartite_pairs(x, r, prefix), matching.bipartite_pairs(longer(x, 3.0), r, prefix, valid)),
        (
            fusion.fusion_pairs(x, c, size, r, prefix, (1, 20, 40), True),
            fusion.fusion_pairs(
                longer(x, 3.0), longer(c, 1e-9), longer(size, 1.0), r, prefix, (1, 20, 40), True, valid,
                torch.tensor([[r]]),
            ),
        ),
    ]  # fmt: skip
    for alone, padded in plans:
        assert torch.equal(padded.order[:, : n - r], alone.order)
        assert padded.valid.sum() == n - r and padded.valid[0, : n - r].all()
        merged = MergeMap(padded.order, padded.src, padded.slot, n + padding, longer(size, 1.0), valid=padded.valid)
        own = MergeMap(alone.order, alone.src, alone.slot, n, size)
        torch.testing.assert_close(merged.apply(longer(x, 3.0))[:, : n - r], own.apply(x))


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("plan", ["bipartite", "fusion", "one_way"])
def test_no_token_is_lost_beside_longer_images(prefix, plan):
    """At every number of real tokens and every r, half of all included: sizes add up, and counts are those alone."""
    torch.manual_seed(0)
    for n in range(prefix + 2, prefix + 11):
        x, c = torch.randn(2, n, 8), torch.rand(2, n) + 0.1
        for real in range(prefix + 1, n):
            valid = torch.arange(n).unsqueeze(0) < torch.tensor([[n], [real]])
            for r in range(1, (n - prefix) // 2 + 1):
                own = torch.tensor([[r], [min(r, (real - prefix) // 2)]])
                if plan == "bipartite":
                    pairs = matching.bipartite_pairs(x, r, prefix, valid)
                else:
                    pairs = fusion.fusion_pairs(
                        x, c, None, r, prefix, (1, 20, 40), plan == "fusion", valid, own
                    )  # fmt: skip
                merged = MergeMap(pairs.order, pairs.src, pairs.slot, n, valid=pairs.valid)
                mass = merged.pool(valid.unsqueeze(2).float()).squeeze(2)
                assert mass.sum(1).tolist() == [n, real], (n, real, r)
                assert pairs.valid.sum(1).tolist() == [n - r, real - own[1].item()], (n, real, r)
                assert (mass > 0).equal(pairs.valid)
                alone = matching.bipartite_pairs(x[1:, :real], own[1].item(), prefix) if plan == "bipartite" and (
                    own[1] > 0
                ) else None  # fmt: skip
                if alone is not None:
                    assert torch.equal(pairs.order[1:, : real - own[1]], alone.order)


def slow_sampling(scores, heights, skip):
    """One image, by the card: every height picks the nearest cumulative score."""
    order = sorted(range(len(scores)), key=lambda i: scores[i])
    total, f = sum(scores), []
    for i in order:
        f.append((f[-1] if f else 0.0) + scores[i] / total)
    low = f[0] if skip else 0.0
    g = [(v - low) / (f[-1] - low) for v in f]
    first = min(v for v in g if v > 0)
    picked = set()
    for k in range(heights):
        y = first + k / (heights - 1) * (1 - first)
        picked.add(min(range(len(g)), key=lambda i: (abs(y - g[i]), i)))
    return order, picked


@settings(max_examples=60, deadline=None)
@given(n=st.integers(3, 60), heights=st.integers(2, 80), seed=st.integers(0, 9999), skip=st.booleans())
def test_sampling_heights(n, heights, seed, skip):
    scores = torch.rand(1, n, generator=torch.Generator().manual_seed(seed)) ** 3 + 1e-3
    picked, order = sample_heights(scores, heights, torch.tensor([[skip]]))
    expected_order, expected = slow_sampling(scores[0].double().tolist(), heights, skip)
    assert order[0].tolist() == expected_order
    got = set(picked[0].nonzero().flatten().tolist())
    # float32 against float64 may differ where a height lies between two tokens by chance
    assert len(got ^ expected) <= 2
    assert n - 1 in got and len(got) <= heights
    if skip:
        assert 0 not in got
    again, _ = sample_heights(scores * 7, heights, torch.tensor([[skip]]))
    assert (again ^ picked).sum() <= 2
