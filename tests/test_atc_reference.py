"""Agglomerative clustering against merging one pair at a time in float64, and against scipy."""

import pytest
import torch
from cases import build, images
from torch import Tensor

import tokenzoo
from tokenzoo.ops.cells.agglomerate import LINKAGES, agglomerate

_OF = {"single": min, "complete": max, "average": lambda values: sum(values) / len(values)}


def drawn(batch: int, length: int, width: int = 5, seed: int = 0) -> Tensor:
    """Distances of random points, exactly symmetric."""
    x = torch.randn(batch, length, width, generator=torch.Generator().manual_seed(seed))
    apart = torch.cdist(x.double(), x.double())
    return ((apart + apart.transpose(1, 2)) / 2).float()


def one_at_a_time(apart: Tensor, count: int, linkage: str) -> list[int]:
    """First member of the cluster of every token."""
    clusters, d = [[i] for i in range(len(apart))], apart.double().tolist()
    while len(clusters) > count:
        pairs = [(a, b) for a in range(len(clusters)) for b in range(a)]
        a, b = min(pairs, key=lambda p: _OF[linkage]([d[i][j] for i in clusters[p[0]] for j in clusters[p[1]]]))
        clusters[b] += clusters.pop(a)
    heads = [0] * len(apart)
    for members in clusters:
        for i in members:
            heads[i] = min(members)
    return heads


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("linkage", LINKAGES)
@pytest.mark.parametrize("count", [1, 4, 11, 17])
def test_clusters(linkage, count, early):
    apart = drawn(3, 18)
    found = agglomerate(apart, 18 - count, 18 - count, linkage, early)
    for i in range(3):
        assert found[i].tolist() == one_at_a_time(apart[i], count, linkage)


@pytest.mark.parametrize("linkage", LINKAGES)
def test_scipy(linkage):
    hierarchy = pytest.importorskip("scipy.cluster.hierarchy")
    apart = drawn(2, 196, 16)
    found = agglomerate(apart, 59, 59, linkage, True)
    for i in range(2):
        condensed = apart[i].double()[tuple(torch.triu_indices(196, 196, 1))]
        labels = hierarchy.fcluster(hierarchy.linkage(condensed.numpy(), linkage), 137, "maxclust").tolist()
        first = {}
        assert found[i].tolist() == [first.setdefault(label, j) for j, label in enumerate(labels)]


def test_worst_case():
    """Every token is nearest to the one before it: one merge per round, and still as many clusters as asked."""
    place = torch.tensor([0.0, *(1.1 ** torch.arange(30)).cumsum(0).tolist()])
    apart = (place[:, None] - place[None]).abs()[None]
    for early in (True, False):
        assert agglomerate(apart, 12, 12, "single", early)[0].tolist() == [0] * 13 + list(range(13, 31))


@pytest.mark.parametrize("linkage", LINKAGES)
def test_equal_distances(linkage):
    """Ties stall nothing."""
    apart = torch.ones(2, 9, 9)
    apart[1] = torch.randint(1, 3, (9, 9), generator=torch.Generator().manual_seed(1)).float()
    apart = torch.maximum(apart, apart.transpose(1, 2))
    for merges in range(1, 9):
        for early in (True, False):
            found = agglomerate(apart, merges, merges, linkage, early).tolist()
            assert [len(set(row)) for row in found] == [9 - merges] * 2


@pytest.mark.parametrize("linkage", LINKAGES)
def test_images_have_their_own_counts(linkage):
    apart, real = drawn(2, 14), torch.ones(2, 14, dtype=torch.bool)
    real[1, 8:] = False
    padded = apart.masked_fill(~(real.unsqueeze(1) & real.unsqueeze(2)), float("inf"))
    found = agglomerate(padded, torch.tensor([[6], [3]]), 6, linkage, True)
    assert found[0].tolist() == one_at_a_time(apart[0], 8, linkage)
    assert found[1].tolist() == [*one_at_a_time(apart[1, :8, :8], 5, linkage), *range(8, 14)]


@pytest.mark.parametrize("linkage", LINKAGES)
def test_sizes_and_means(linkage):
    """All patches count, and a token is the mean of those it stands for."""
    model = build("deit")
    tokenzoo.patch_model(model, "atc", keep_rate=0.5, layers=(1, 2), linkage=linkage)
    tokens = model.forward_tokens(images(model), trace=True)
    assert tokens.size.sum(1).flatten().tolist() == [17.0] * 3 and tokens.length == 5
    first = tokens.trace[0].map
    x = torch.randn(3, 17, 4)
    for head in range(1, first.n_out):
        for i in range(3):
            torch.testing.assert_close(first.apply(x)[i, head], x[i, first.assign[i] == head].mean(0))
