"""Soft sharing out of patches: a slow reference in float64, and what the definition promises."""

from __future__ import annotations

import pytest
import torch
from cases import build
from torch import Tensor

import tokenzoo
from tokenzoo.core.layout import Layout
from tokenzoo.core.selection import keep_best
from tokenzoo.core.spreading import share_out
from tokenzoo.core.tokens import Tokens


def reference(x: Tensor, features: Tensor, scores: Tensor, size: Tensor, kept: int, tau: float, rows: bool):
    """One image, patch by patch: anchors, W, shares, sizes."""
    patches = len(x)
    anchors = sorted(sorted(range(patches), key=lambda i: -scores[i].item())[:kept])
    cosine = torch.zeros(kept, patches, dtype=torch.float64)
    for k, anchor in enumerate(anchors):
        for i in range(patches):
            cosine[k, i] = features[anchor] @ features[i] / (features[anchor].norm() * features[i].norm())
    raised = torch.exp(cosine / tau)
    shares = torch.stack([raised[:, i] / raised[:, i].sum() for i in range(patches)], 1)
    sizes = shares @ size
    if rows:
        weights = torch.stack([row / row.sum() for row in raised])
    else:
        weights = torch.stack([shares[k] * size / sizes[k] for k in range(kept)])
    return anchors, weights, shares, sizes


def tokens_of(batch: int, patches: int, seed: int, **side) -> tuple[Tokens, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 2 + patches, 6, generator=g, dtype=torch.float64)
    size = 1 + torch.randint(4, (batch, 2 + patches, 1), generator=g).float()
    tokens = Tokens(x, Layout(2, True, (1, patches), track_size=True), size=size, **side)
    return tokens, torch.randn(batch, 2 + patches, 5, generator=g), torch.rand(batch, 2 + patches, generator=g)


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("tau", [0.05, 0.1, 1.0])
@pytest.mark.parametrize("kept", [1, 4, 9])
def test_against_a_slow_reference(kept, tau, rows):
    tokens, features, scores = tokens_of(3, 9, kept)
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    token_map = share_out(unit, keep_best(scores, tokens, lambda n: kept), tokens, tau, rows)
    after = tokens.reduce(token_map)
    for i in range(3):
        anchors, weights, shares, sizes = reference(
            tokens.x[i, 2:], features[i, 2:].double(), scores[i, 2:], tokens.size[i, 2:, 0].double(), kept, tau, rows
        )
        assert token_map.heads[i].tolist() == [0, 1, *(a + 2 for a in anchors)]
        assert torch.allclose(after.x[i, 2:], weights @ tokens.x[i, 2:], atol=1e-10)
        assert torch.equal(after.x[i, :2], tokens.x[i, :2])
        assert torch.allclose(after.size[i, 2:, 0].double(), sizes, atol=1e-5)
        y = torch.randn(1, 2 + kept, 3, dtype=torch.float64)
        assert torch.allclose(token_map.lift(y.expand(3, -1, -1))[i, 2:], shares.T @ y[0, 2:], atol=1e-10)
        assert torch.allclose(token_map.matrix()[i, 2:, 2:].double(), weights, atol=1e-6)


def test_what_columns_conserve():
    """Sizes, the mean by size, and constants; rows of W sum to one; a constant comes back from the way back."""
    tokens, features, scores = tokens_of(2, 12, 3)
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    token_map = share_out(unit, keep_best(scores, tokens, lambda n: 5), tokens, 0.1, False)
    after = tokens.reduce(token_map)
    assert torch.allclose(after.size.sum(1), tokens.size.sum(1))
    mean = lambda t: (t.x[:, 2:] * t.size[:, 2:]).sum(1) / t.size[:, 2:].sum(1)  # noqa: E731
    assert torch.allclose(mean(after), mean(tokens), atol=1e-6)
    assert torch.allclose(token_map.matrix().sum(2), torch.ones(2, 7, dtype=torch.float64))
    ones = torch.ones(2, 14, 1, dtype=torch.float64)
    assert torch.allclose(token_map.apply(ones), ones[:, :7]) and torch.allclose(token_map.lift(ones[:, :7]), ones)


def test_cold_limit_is_the_nearest_anchor():
    tokens, features, scores = tokens_of(2, 10, 5)
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    token_map = share_out(unit, keep_best(scores, tokens, lambda n: 4), tokens, 1e-4, False)
    nearest = torch.bmm(unit[:, 2:], unit.gather(1, token_map.heads[:, 2:, None].expand(-1, -1, 5)).mT).argmax(2)
    assert torch.equal(token_map.assign[:, 2:] - 2, nearest)
    everything = share_out(unit, keep_best(scores, tokens, lambda n: 10), tokens, 1e-4, False)
    assert torch.allclose(everything.apply(tokens.x), tokens.x, atol=1e-10)


@pytest.mark.parametrize("rows", [False, True])
def test_hidden_patches_and_padding_share_nothing_with_others(rows):
    visible = torch.tensor([[1, 1, 1, 0, 1, 0, 1, 1], [1, 1, 0, 0, 0, 0, 0, 1], [1, 1, 0, 1, 1, 1, 0, 0]]).bool()
    valid = torch.tensor([[1] * 8, [1] * 8, [1, 1, 1, 1, 1, 1, 0, 0]]).bool()
    tokens, features, scores = tokens_of(3, 6, 7, visible=visible & valid, valid=valid)
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    token_map = share_out(unit, keep_best(scores, tokens, lambda n: n // 2), tokens, 0.2, rows)
    after, weights = tokens.reduce(token_map), token_map.matrix()[:, 2:, 2:]
    assert after.valid[:, 2:].sum(1).tolist() == [3, 3, 2]
    open_ = after.visible[:, 2:, None]
    assert not (weights * open_ * ~(visible & valid)[:, None, 2:]).any()
    assert not weights[~after.valid[:, 2:]].any()
    assert torch.allclose(weights[after.valid[:, 2:]].sum(1), torch.ones(8, dtype=torch.float64))


def test_options():
    with pytest.raises(ValueError, match="temperature=0 has to be positive"):
        tokenzoo.create_method("soft_transform", temperature=0)
    with pytest.raises(ValueError, match="mixture='both'; use one of 'columns', 'rows'"):
        tokenzoo.create_method("soft_transform", mixture="both")
    with pytest.raises(ValueError, match="features='q'; use one of 'keys', 'x'"):
        tokenzoo.create_method("soft_transform", features="q")
    with pytest.raises(ValueError, match="prop_attn=True needs sizes"):
        tokenzoo.create_method("soft_transform", mixture="rows", prop_attn=True)
    images = torch.randn(2, 3, 32, 32)
    answers = []
    for options in ({}, {"mixture": "rows"}, {"features": "x"}, {"prop_attn": True}, {"temperature": 1.0}):
        with torch.no_grad():
            answers.append(tokenzoo.patch_model(build("deit"), "soft_transform", **options)(images))
    assert all(not torch.allclose(a, b) for i, a in enumerate(answers) for b in answers[:i])
