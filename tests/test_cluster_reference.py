"""Clusterings of patches against slow loops in float64, written from the equations."""

import math

import pytest
import torch
from torch import Tensor

from tokenzoo.core.grouping import around_centres
from tokenzoo.core.selection import keep_patches
from tokenzoo.core.step import Step
from tokenzoo.core.tokens import Layout, Tokens
from tokenzoo.methods.kmedoids import KMedoids
from tokenzoo.methods.radial import Radial, ball, radii
from tokenzoo.ops.cells.density import peak_scores
from tokenzoo.ops.cells.medoids import farthest_first, refine
from tokenzoo.ops.distances import squared_distances


def drawn(batch: int = 3, length: int = 20, width: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(seed))


def apart(x: Tensor) -> list[list[float]]:
    """Euclidean distances of the rows of one image."""
    rows = x.double().tolist()
    return [[math.dist(a, b) for b in rows] for a in rows]


def density_peaks(x: Tensor, count: int, k: int) -> tuple[list[int], list[int]]:
    """Centres by falling score, and the number of the centre of every token."""
    scale = math.sqrt(x.shape[1])
    d = [[value / scale for value in row] for row in apart(x)]
    density = [math.exp(-sum(sorted(v * v for v in row)[:k]) / min(k, len(row))) for row in d]
    longest = max(map(max, d))
    score = []
    for i, row in enumerate(d):
        denser = [row[j] for j in range(len(d)) if density[j] > density[i]]
        score.append(density[i] * (min(denser) if denser else longest))
    centres = sorted(range(len(d)), key=lambda i: -score[i])[:count]
    labels = [min(range(count), key=lambda c: d[i][centres[c]]) for i in range(len(d))]
    for number, centre in enumerate(centres):
        labels[centre] = number
    return centres, labels


@pytest.mark.parametrize("k", [3, 5, 50])  # two tokens that are each other's nearest tie at 2
def test_density_peaks(k):
    x = drawn()
    squared = squared_distances(x) / x.shape[2]
    tokens = Tokens(x, Layout(0, False, (4, 5)))
    found = around_centres(keep_patches(peak_scores(squared, k), tokens, lambda n: 6), squared, tokens)
    for i in range(len(x)):
        centres, labels = density_peaks(x[i], 6, k)
        assert found.heads[i].tolist() == centres and found.assign[i].tolist() == labels


def test_density_peaks_far_apart():
    """Densities that float32 cannot hold still rank tokens."""
    x = drawn() * 50
    scores = peak_scores(squared_distances(x) / x.shape[2], 5)
    assert scores.isfinite().all()
    assert all(len(set(row)) == len(row) for row in scores.tolist())


@pytest.mark.parametrize("hides", [False, True], ids=["padding", "a mask"])
def test_tokens_that_do_not_count_change_nothing(hides):
    x = drawn(length=17)
    seen = torch.ones(3, 17, dtype=torch.bool)
    seen[1, 10:] = seen[2, 3:] = False
    layout = Layout(0, False, (1, 17))
    results = []
    for noise in (0.0, 30.0):
        values = x + noise * ~seen.unsqueeze(2)
        tokens = Tokens(values, layout, valid=None if hides else seen, visible=seen)
        squared = squared_distances(values)
        centres = keep_patches(peak_scores(squared, 4, tokens.seen_patches), tokens, lambda n: math.ceil(0.4 * n))
        found = around_centres(centres, squared, tokens).masked(seen)
        visible = found.pool(seen.unsqueeze(2).float()) > 0
        results.append(torch.where(visible, found.apply(values), 0.0))
        if not hides:  # as the image alone
            alone = Tokens(x[1:2, :10], Layout(0, False, (1, 10)))
            own = squared_distances(alone.x)
            few = around_centres(keep_patches(peak_scores(own, 4), alone, lambda n: math.ceil(0.4 * n)), own, alone)
            torch.testing.assert_close(found.apply(values)[1:2, :4], few.apply(alone.x))
            assert found.valid.sum(1).tolist() == [7, 4, 2]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("pattern", ["l1", "l2", "linf"])
@pytest.mark.parametrize("grid", [(4, 4), (5, 8), (1, 3)])
def test_balls(grid, pattern):
    """The same patches whatever was left before, in counts that a ball can have."""
    total = grid[0] * grid[1]
    possible = {sum(r <= bound for r in radii(grid, pattern)) for bound in radii(grid, pattern)}
    for target in range(1, total + 1):
        count = ball(grid, pattern, target)
        assert count in possible and abs(count - target) == min(abs(c - target) for c in possible)
    layout = Layout(1, True, grid)
    tokens = Tokens(torch.zeros(1, 1 + total, 2), layout)
    method = Radial(keep_rate=0.5, pattern=pattern, layers=(0,))
    kept = method.map(tokens, None, Step(method, 0, (0.5, None)))
    bound = sorted(radii(grid, pattern))[kept.n_out - 2]
    inside = [i for i, r in enumerate(radii(grid, pattern)) if r <= bound]
    assert sorted((kept.heads[0, 1:] - 1).tolist()) == inside


def medoids(x: Tensor, first: list[int], rounds: int, weight: list[float] | None) -> list[int]:
    """Medoids of one image after some rounds, from the equations."""
    d, found = apart(x), list(first)
    for _ in range(rounds):
        labels = [min(range(len(found)), key=lambda c: d[i][found[c]]) for i in range(len(d))]
        for number, centre in enumerate(found):
            labels[centre] = number
        for number in range(len(found)):
            inside = [i for i in range(len(d)) if labels[i] == number]
            if weight is None:
                costs = {i: sum(d[i][j] for j in inside) for i in inside}
            else:
                costs = {i: weight[i] * sum(d[i]) for i in inside}
            # two members are exact ties: the first
            found[number] = min(inside, key=lambda i: round(costs[i], 5))
    return found


@pytest.mark.parametrize("weighs", [False, True])
def test_medoids(weighs):
    x = drawn(length=24)
    weight = torch.rand(3, 24, generator=torch.Generator().manual_seed(1)) if weighs else None
    distances = squared_distances(x).sqrt()
    first = farthest_first(x.norm(dim=2), distances, 6)
    found = refine(distances, first, 4, weight)
    for i in range(3):
        d = apart(x[i])
        chosen = [max(range(24), key=lambda j: math.hypot(*x[i, j].double().tolist()))]
        while len(chosen) < 6:
            chosen.append(max(range(24), key=lambda j: min(d[j][c] for c in chosen)))
        assert first[i].tolist() == chosen
        assert found[i].tolist() == medoids(x[i], chosen, 4, weight[i].double().tolist() if weighs else None)


@pytest.mark.parametrize("options", [
    {"start": "farthest", "cost": "cluster"}, {"start": "farthest", "cost": "attention"}, {"cost": "cluster"},
    {"mean": True}, {"mean": True, "start": "farthest", "cost": "cluster"},
], ids=str)  # fmt: skip
def test_hidden_and_missing_patches(options):
    """Every form of k-medoids: no mate and no hidden patch has a part in what an image keeps."""
    x = drawn(length=17)
    seen = torch.ones(3, 17, dtype=torch.bool)
    seen[1, 11:] = seen[2, 4:] = False
    method = KMedoids(keep_rate=0.5, layers=(1,), **options)
    step = Step(method, 1, (0.5, None, False))
    scores = torch.rand(3, 17, generator=torch.Generator().manual_seed(2))
    for hides in (False, True):
        kept = []
        for noise in (0.0, 30.0):
            values, marks = x + noise * ~seen.unsqueeze(2), scores + noise * ~seen
            layout = Layout(1, True, (4, 4))
            tokens = Tokens(values, layout, valid=None if hides else seen, visible=seen, scores=marks)
            found = method.map(tokens, None, step).masked(seen)
            visible = found.pool(seen.unsqueeze(2).float()) > 0
            kept.append(torch.where(visible, found.apply(values), 0.0))
        torch.testing.assert_close(*kept)
        if hides:  # visible patches stay before any hidden one
            assert visible.sum(1).flatten().tolist() == [9, 9, 4]
        else:
            alone = Tokens(x[1:2, :11], Layout(1, True, (4, 4)), scores=scores[1:2, :11])
            torch.testing.assert_close(kept[0][1:2, :6], method.map(alone, None, step).apply(alone.x))


def test_many_rounds_settle():
    """Once medoids stay where they are, further rounds change nothing: no image waits for another."""
    x = drawn(length=24)
    distances = squared_distances(x).sqrt()
    first = farthest_first(x.norm(dim=2), distances, 6)
    assert torch.equal(refine(distances, first, 50), refine(distances, first, 51))
    assert not torch.equal(refine(distances, first, 0), refine(distances, first, 50))
