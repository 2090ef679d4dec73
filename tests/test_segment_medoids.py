"""Medoids of video segments, and distances along a graph, against loops written from the definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import build

import tokenzoo
from tokenzoo.core.tokens import Layout, Tokens
from tokenzoo.layers import SegmentMedoids
from tokenzoo.ops.cells.spectral import spectral_rows
from tokenzoo.ops.distances import squared_distances


def slow_medoids(x: np.ndarray, count: int, rounds: int) -> list[int]:
    """Of one set of tokens: farthest first, then rounds of assigning and choosing anew."""
    apart = np.array([[np.linalg.norm(a - b) for b in x] for a in x])
    chosen = [int(np.argmax([np.linalg.norm(a) for a in x]))]
    while len(chosen) < count:
        nearest = [-1.0 if i in chosen else min(apart[i, c] for c in chosen) for i in range(len(x))]
        chosen.append(int(np.argmax(nearest)))
    for _ in range(rounds):
        nearest = [int(np.argmin(row[chosen])) for row in apart]
        member = [chosen.index(i) if i in chosen else nearest[i] for i in range(len(x))]
        for k in range(count):
            own = [i for i in range(len(x)) if member[i] == k]
            chosen[k] = own[int(np.argmin([sum(apart[i, j] for j in own) for i in own]))]
    return sorted(chosen)


@pytest.mark.parametrize("segments", [1, 2, 4])
def test_segments(segments):
    """Two clips of four frames."""
    x = torch.randn(8, 7, 5, generator=torch.Generator().manual_seed(segments), dtype=torch.float64)
    out = SegmentMedoids(4, segments, 3, num_prefix=2, iterations=4)(x)
    joined = 4 // segments
    assert out.shape == (2 * segments, 5, 5)
    for segment in range(2 * segments):
        frames = x[segment * joined : (segment + 1) * joined]
        patches = frames[:, 2:].reshape(-1, 5)
        medoids = slow_medoids(patches.numpy(), 3, 4)
        torch.testing.assert_close(out[segment, :2], frames[:, :2].mean(0))
        assert torch.equal(out[segment, 2:], patches[medoids])


def test_means_and_pooled_frames():
    x = torch.randn(4, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    pooled = SegmentMedoids(2, 1, 4, "pooling")(x)
    torch.testing.assert_close(pooled[:, 1:], (x[0::2] + x[1::2])[:, 1:] / 2)
    means = SegmentMedoids(2, 1, 1, "mean")(x)
    torch.testing.assert_close(means[:, 1], x[:, 1:].reshape(2, 8, 3).mean(1))
    SegmentMedoids(2, 2, 4)(x).sum().backward()  # medoids of all patches are the patches
    torch.testing.assert_close(x.grad, torch.ones_like(x))


@torch.no_grad()
def test_between_two_blocks():
    """As in the published models: frames one by one, then segments; the unpatched model where nothing is joined."""
    model = build("deit")
    frames = torch.randn(4, 3, 32, 32)

    def run(layer: torch.nn.Module) -> torch.Tensor:
        x = model._pos_embed(model.patch_embed(frames))
        x = model.blocks[2:](layer(model.blocks[:2](x)))
        return model.forward_head(model.norm(x))

    torch.testing.assert_close(run(SegmentMedoids(2, 2, 16)), model(frames))
    assert run(SegmentMedoids(2, 1, 9)).shape == (2, 7)


@pytest.mark.parametrize("near", [None, 4])
def test_graph(near):
    """Rows against an eigenproblem in numpy; distances between rows do not see the signs of eigenvectors."""
    x = torch.randn(1, 9, 4, generator=torch.Generator().manual_seed(1))
    apart = np.array([[float((a - b).square().sum()) for b in x[0].double()] for a in x[0].double()])
    weight = np.exp(-apart / (2 * 1.5**2))
    if near is not None:
        close = [set(np.argsort(row)[:near]) for row in apart]
        weight *= [[j in close[i] or i in close[j] for j in range(9)] for i in range(9)]
    root = np.diag(weight.sum(1) ** -0.5)
    rows = np.linalg.eigh(np.eye(9) - root @ weight @ root)[1][:, :3]
    rows = torch.from_numpy(rows / np.linalg.norm(rows, axis=1, keepdims=True)).unsqueeze(0)
    found = spectral_rows(squared_distances(x), 3, 1.5, near)
    torch.testing.assert_close(squared_distances(found), squared_distances(rows), atol=1e-5, rtol=0)


def test_padding_has_no_part_in_the_graph():
    method = tokenzoo.KMedoids(keep_rate=0.5, layers=(1,), start="farthest", cost="cluster", space="spectral", graph=5)
    x = torch.randn(2, 13, 6, generator=torch.Generator().manual_seed(2))
    valid = torch.ones(2, 13, dtype=torch.bool)
    valid[1, 9:] = False
    layout = Layout(1, True, (3, 4))
    (step,) = [step for step in tokenzoo.Recipe.parse(method).steps(4)[1]]
    both = method.map(Tokens(x, layout, valid=valid), None, step)
    for image, length in ((0, 13), (1, 9)):
        alone = method.map(Tokens(x[image : image + 1, :length], layout), None, step)
        real = slice(None) if both.valid is None else both.valid[image]
        assert sorted(both.idx[image, real].tolist()) == sorted(alone.idx[0].tolist())


@pytest.mark.parametrize("options,words", [
    ({"segments": 3}, ["segments=3", "4 frames", "divisor"]),
    ({"how": "median"}, ["how='median'", "'pooling'"]),
    ({"tokens": 0}, ["tokens=0", "one token"]),
])  # fmt: skip
def test_bad_options(options, words):
    with pytest.raises(ValueError) as caught:
        SegmentMedoids(**{"frames": 4, "segments": 2, "tokens": 3, **options})
    assert all(word in str(caught.value) for word in words)


def test_bad_batches():
    layer = SegmentMedoids(4, 2, 30)
    with pytest.raises(ValueError, match="batch of 6 is no whole number of clips of 4 frames"):
        layer(torch.randn(6, 5, 3))
    with pytest.raises(ValueError, match="2 x 4 patches cannot leave 30; lower tokens"):
        layer(torch.randn(8, 5, 3))
