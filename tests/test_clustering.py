"""Clustering and reconstruction against slow, obvious loops, and what must hold whatever the numbers."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenzoo.maps import ClusterMap
from tokenzoo.ops.cells import axis as cutting
from tokenzoo.ops.cells import soft as assignment
from tokenzoo.ops.cells import tiles as tiling
from tokenzoo.ops.cells.kmeans import cluster, cluster_macs, hard_labels
from tokenzoo.ops.cells.reconstruct import copy_back, reconstruct

few = settings(max_examples=40, deadline=None)
sides = st.integers(1, 9)


@st.composite
def problems(draw, iterations=(0, 5)):
    size = draw(sides), draw(sides)
    grid = draw(st.integers(1, size[0])), draw(st.integers(1, size[1]))
    seed, steps = draw(st.integers(0, 10_000)), draw(st.integers(*iterations))
    window, temperature = draw(st.sampled_from([1, 3, 5])), draw(st.sampled_from([0.02, 0.1, 1.0]))
    x = torch.randn(2, size[0] * size[1], 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x, size, grid, steps, window, temperature


def slow_pool(x, size, grid):
    """Mean of one image's tokens [N, C] in every bin of adaptive average pooling."""
    image = x.view(*size, -1)
    rows = [(i * size[0] // grid[0], math.ceil((i + 1) * size[0] / grid[0])) for i in range(grid[0])]
    columns = [(j * size[1] // grid[1], math.ceil((j + 1) * size[1] / grid[1])) for j in range(grid[1])]
    return torch.stack([image[a:b, c:d].mean((0, 1)) for a, b in rows for c, d in columns])


def slow_cluster(x, size, grid, iterations, window, temperature):
    """The equations for one image [N, C], one token at a time; the final centres and assignment [M, N]."""
    centers, count = slow_pool(x, size, grid), grid[0] * grid[1]
    labels = F.interpolate(torch.arange(count).float().view(1, 1, *grid), size=size, mode="nearest").long().flatten()
    share = torch.zeros(count, len(x), dtype=x.dtype)
    for _ in range(iterations):
        share.zero_()
        for n in range(len(x)):
            row, column = divmod(int(labels[n]), grid[1])
            near = [
                m for m in range(count)
                if abs(m // grid[1] - row) <= window // 2 and abs(m % grid[1] - column) <= window // 2
            ]  # fmt: skip
            logits = torch.stack([-temperature * (x[n] - centers[m]).square().sum() for m in near])
            share[near, n] = logits.softmax(0)
        centers = torch.stack(
            [(share[m, :, None] * x).sum(0) / max(float(share[m].sum()), 1e-16) for m in range(count)]
        )
    return centers, share


def slow_reconstruct(values, x, centers, temperature, k, norm):
    out = []
    for token in x:
        weight = torch.exp(-temperature * (token - centers).square().sum(1))
        if k != -1:
            weight = torch.where(weight >= weight.sort(descending=True).values[min(k, len(weight)) - 1], weight, 0)
        weight = weight / (weight.norm() if norm == "l2" else weight.sum())
        out.append((weight[:, None] * values).sum(0))
    return torch.stack(out)


@few
@given(problems())
def test_cluster_is_the_slow_loop(problem):
    x, size, grid, iterations, window, temperature = problem
    found = cluster(*problem)
    for image in range(2):
        centers, share = slow_cluster(x[image], size, grid, iterations, window, temperature)
        torch.testing.assert_close(found.centers[image], centers, atol=1e-9, rtol=1e-9)
        if iterations:
            torch.testing.assert_close(found.cells.dense_sums()[image], share, atol=1e-9, rtol=1e-9)
        nearest = torch.cdist(x[image], centers).argmin(1)
        assert torch.equal(hard_labels(x, found.centers)[image], nearest)


@pytest.mark.parametrize("tile", [1, 2, 3])
@few
@given(problems(iterations=(1, 3)))
def test_cut_has_no_influence(tile, problem):
    kept = cutting._TILES, cutting._MOVE, assignment._LEAST
    whole = cluster(*problem)
    try:
        # many small tiles, worked on one row of tiles at a time
        cutting._TILES, cutting._MOVE, assignment._LEAST = (tile,), -1000, 1
        tiling._remembered.cache_clear()
        cut = cluster(*problem)
    finally:
        cutting._TILES, cutting._MOVE, assignment._LEAST = kept
        tiling._remembered.cache_clear()
    torch.testing.assert_close(cut.centers, whole.centers, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(cut.cells.dense_sums(), whole.cells.dense_sums(), atol=1e-9, rtol=1e-9)
    mass = torch.rand(2, problem[0].shape[1], 1, dtype=torch.float64)
    torch.testing.assert_close(cut.cells.sums(mass), cut.cells.dense_sums() @ mass)


def test_home_cells_are_nearest_upsampling():
    for length in range(1, 100):
        for cells in range(1, length + 1):
            labels = torch.arange(cells).float().view(1, 1, -1)
            expected = F.interpolate(labels, size=length, mode="nearest").long().flatten().tolist()
            assert list(cutting.home_cells(length, cells)) == expected


@few
@given(problems(), st.integers(-1, 12).filter(bool), st.sampled_from(["l1", "l2"]))
def test_reconstruct_is_the_slow_loop(problem, k, norm):
    x, temperature = problem[0], problem[-1]
    centers = cluster(*problem).centers
    values = torch.randn(2, centers.shape[1], 3, dtype=torch.float64)
    out = reconstruct(values, x, centers, temperature, k, norm)
    for image in range(2):
        expected = slow_reconstruct(values[image], x[image], centers[image], temperature, k, norm)
        torch.testing.assert_close(out[image], expected, atol=1e-8, rtol=1e-8)


@few
@given(problems())
def test_what_moves_with_the_tokens(problem):
    x, size, grid, iterations, window, temperature = problem
    centers = cluster(*problem).centers
    high, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    assert (centers <= high + 1e-9).all() and (centers >= low - 1e-9).all()
    near = {"atol": 1e-8, "rtol": 1e-8}
    shift = torch.randn(4, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    options = size, grid, iterations, window
    torch.testing.assert_close(cluster(x + shift, *options, temperature).centers, centers + shift, **near)
    torch.testing.assert_close(cluster(x @ turn, *options, temperature).centers, centers @ turn, **near)
    torch.testing.assert_close(cluster(3 * x, *options, temperature / 9).centers, 3 * centers, **near)
    torch.testing.assert_close(cluster(x[1:], *options, temperature).centers, centers[1:], **near)  # batch mates
    values = torch.randn(2, centers.shape[1], 3, dtype=torch.float64)
    plain = reconstruct(values, x, centers, temperature, -1)
    torch.testing.assert_close(reconstruct(values, x + shift, centers + shift, temperature, -1), plain, **near)
    torch.testing.assert_close(reconstruct(values, x @ turn, centers @ turn, temperature, -1), plain, **near)


@few
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 1000))
def test_flips_commute_where_the_grid_divides(h, w, down, right, seed):
    size, grid = (h * down, w * right), (h, w)
    x = torch.randn(1, *size, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    centers = cluster(x.flatten(1, 2), size, grid, 3, 3).centers.unflatten(1, grid)
    for dims in ((1,), (2,), (1, 2)):
        flipped = cluster(x.flip(dims).flatten(1, 2), size, grid, 3, 3).centers.unflatten(1, grid)
        torch.testing.assert_close(flipped, centers.flip(dims), atol=1e-9, rtol=1e-9)


@few
@given(problems())
def test_reconstruction_weights(problem):
    x, temperature = problem[0], problem[-1]
    centers = cluster(*problem).centers
    count = centers.shape[1]
    values = torch.randn(2, count, 3, dtype=torch.float64)
    everything = reconstruct(values, x, centers, temperature, -1)
    assert torch.equal(reconstruct(values, x, centers, temperature, count), everything)
    assert torch.equal(reconstruct(values, x, centers, temperature, count + 5), everything)
    constant = torch.full_like(values, 2.5)
    mean = reconstruct(constant, x, centers, temperature, 3, "l1")
    torch.testing.assert_close(mean, torch.full_like(mean, 2.5))
    # l2 is l1 times the sum of the weights over their norm: between 1 and the root of their number
    ones = torch.ones_like(values[..., :1])
    factor = reconstruct(ones, x, centers, temperature, 3, "l2")
    assert (factor >= 1 - 1e-9).all()
    l1, l2 = (reconstruct(values, x, centers, temperature, 3, norm) for norm in ("l1", "l2"))
    torch.testing.assert_close(l2, l1 * factor, atol=1e-9, rtol=1e-9)
    copied = copy_back(values, x, centers)
    assert all((row == values[i]).all(1).any() for i in range(2) for row in copied[i])


def test_grid_as_large_as_the_map_without_steps_is_the_identity():
    x = torch.randn(2, 35, 8)
    assert torch.equal(cluster(x, (5, 7), (5, 7), 0).centers, x)
    y = torch.randn(2, 35, 3)
    assert torch.equal(reconstruct(y, x, x, 0.02, 1), y)
    assert torch.equal(copy_back(y, x, x), y)


def test_far_tokens_do_not_vanish():
    x, centers = torch.randn(1, 10, 4) * 100, torch.randn(1, 3, 4)
    assert (torch.exp(-torch.cdist(x, centers).square().amin(2)) == 0).all()  # as computed in the released code
    out = reconstruct(torch.ones(1, 3, 2), x, centers, 1.0, 2, "l1")
    torch.testing.assert_close(out, torch.ones(1, 10, 2))


def test_large_common_part_does_not_cancel():
    x = torch.randn(1, 64, 16, dtype=torch.float64)
    exact = cluster(x, (8, 8), (4, 4)).centers
    common = 300 * torch.ones(16, dtype=torch.float64)  # |x|^2 is 1.4e6: one step of float32 is 0.125
    shifted = (x + common).float()
    found = cluster(shifted, (8, 8), (4, 4))
    torch.testing.assert_close(found.centers.double() - common, exact, atol=1e-3, rtol=0)
    values = torch.randn(1, 16, 3)
    out = reconstruct(values, shifted, found.centers, 0.02, -1)
    torch.testing.assert_close(out, reconstruct(values, x.float(), exact.float(), 0.02, -1), atol=1e-3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    # a draw without near ties, where rounding in float32 would decide between two cells
    x = (torch.randn(2, 120, 32, generator=torch.Generator().manual_seed(1)) * 20).to(dtype)  # squares overflow float16
    exact = cluster(x.double(), (10, 12), (4, 5))
    found = cluster(x, (10, 12), (4, 5))
    assert found.centers.dtype == dtype
    torch.testing.assert_close(found.centers.double(), exact.centers, atol=1e-5, rtol=2 * torch.finfo(dtype).eps)
    y = torch.randn(2, 20, 6).to(dtype)
    out = reconstruct(y, x, found.centers)
    assert out.dtype == dtype
    expected = reconstruct(y.double(), x.double(), found.centers.double())
    torch.testing.assert_close(out.double(), expected, atol=1e-3, rtol=2 * torch.finfo(dtype).eps)


def test_autocast_leaves_distances_alone():
    x, y = torch.randn(2, 64, 16), torch.randn(2, 16, 5)
    found = cluster(x, (8, 8), (4, 4))
    out = reconstruct(y, x, found.centers)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(cluster(x, (8, 8), (4, 4)).centers, found.centers)
        assert torch.equal(reconstruct(y, x, found.centers), out)


@pytest.mark.parametrize("iterations", [0, 3])
def test_weights_carry_no_gradient(iterations):
    x = torch.randn(2, 63, 8, dtype=torch.float64, requires_grad=True)
    found = cluster(x, (7, 9), (3, 4), iterations)
    upstream = torch.randn_like(found.centers)
    (grad,) = torch.autograd.grad(found.centers, x, upstream)
    torch.testing.assert_close(grad, found.cells.dense_means().double().transpose(1, 2) @ upstream)
    values = torch.randn(2, 12, 3, dtype=torch.float64, requires_grad=True)
    out = reconstruct(values, x, found.centers, k=4)
    grads = torch.autograd.grad(out.sum(), (values, x), allow_unused=True)
    assert grads[0].abs().sum() > 0 and grads[1] is None


def test_tiles_remembered_in_inference_mode_can_train():
    tiling._remembered.cache_clear()
    x = torch.randn(1, 63, 8)
    with torch.inference_mode():
        cluster(x, (7, 9), (3, 4))
    x.requires_grad_()
    cluster(x, (7, 9), (3, 4)).centers.sum().backward()
    assert x.grad.abs().sum() > 0


def test_bad_input_is_named():
    x = torch.randn(1, 12, 4)
    with pytest.raises(ValueError, match="no map of 3 x 5"):
        cluster(x, (3, 5), (2, 2))
    with pytest.raises(ValueError, match=r"grid=\(4, 4\) does not fit a map of 3 x 4"):
        cluster(x, (3, 4), (4, 4))
    with pytest.raises(ValueError, match=r"grid=\(0, 4\)"):
        cluster(x, (3, 4), (0, 4))
    with pytest.raises(ValueError, match="window=4"):
        cluster(x, (3, 4), (2, 2), window=4)
    with pytest.raises(ValueError, match="iterations=-1"):
        cluster(x, (3, 4), (2, 2), iterations=-1)
    with pytest.raises(ValueError, match="temperature=0"):
        cluster(x, (3, 4), (2, 2), temperature=0)
    centers = torch.randn(1, 4, 4)
    with pytest.raises(ValueError, match="k=0"):
        reconstruct(centers, x, centers, k=0)
    with pytest.raises(ValueError, match="norm='l3'"):
        reconstruct(centers, x, centers, norm="l3")
    with pytest.raises(ValueError, match="values of 3 centres, but 4"):
        reconstruct(centers[:, :3], x, centers)
    with pytest.raises(ValueError, match="temperature=-1"):
        reconstruct(centers, x, centers, temperature=-1)


def test_macs_are_those_of_the_products():
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.randn(1, 1600, 32)
    for iterations in (0, 1, 4):
        with FlopCounterMode(display=False) as counter:
            cluster(x, (40, 40), (28, 28), iterations)
        macs = cluster_macs((40, 40), (28, 28), iterations, 5, 32)
        # besides: one product a step for the centres' own part of the distances
        assert macs <= counter.get_total_flops() / 2 <= macs + 784 * 32 * iterations
    dense = 2 * 5 * 1600 * 784 * 32
    assert cluster_macs((40, 40), (28, 28), 5, 5, 32) < dense / 5


# ---- the map


@st.composite
def maps(draw):
    problem = draw(problems())
    prefix = draw(st.integers(0, 2))
    x = torch.cat([torch.randn(2, prefix, 4, dtype=torch.float64), problem[0]], dim=1)
    return x, ClusterMap.of(x, prefix, *problem[1:], k=3)


@few
@given(maps())
def test_map_is_its_matrix(made):
    x, token_map = made
    assert torch.equal(token_map.apply(x)[:, token_map.num_prefix :], token_map.centers)
    other = torch.randn(2, token_map.n_in, 3, dtype=torch.float64)
    for values in (x, other):
        torch.testing.assert_close(token_map.apply(values), token_map.matrix().double() @ values)
    mass = torch.rand(2, token_map.n_in, 1, dtype=torch.float64)
    pooled = token_map.pool(mass)
    torch.testing.assert_close(pooled, token_map.membership().double() @ mass)
    torch.testing.assert_close(pooled.sum(1), mass.sum(1))  # every token has a window: no mass is lost


@few
@given(maps())
def test_prefix_and_the_way_back(made):
    x, token_map = made
    prefix, heads, assign = token_map.num_prefix, token_map.heads, token_map.assign
    assert heads.shape == (2, token_map.n_out) and assign.shape == (2, token_map.n_in)
    y = token_map.apply(x)
    assert torch.equal(y[:, :prefix], x[:, :prefix])
    assert (heads[:, :prefix] == torch.arange(prefix)).all() and (assign[:, :prefix] == torch.arange(prefix)).all()
    rows, columns = (heads[0, prefix:] - prefix) // token_map.size[1], (heads[0, prefix:] - prefix) % token_map.size[1]
    homes = [cutting.home_cells(a, b) for a, b in zip(token_map.size, token_map.grid)]
    cells = [homes[0][r] * token_map.grid[1] + homes[1][c] for r, c in zip(rows.tolist(), columns.tolist())]
    assert cells == list(range(token_map.n_out - prefix))  # every head lies in its own cell
    back = token_map.lift(y)
    assert torch.equal(back[:, :prefix], x[:, :prefix])
    patches = x[:, prefix:]
    expected = reconstruct(y[:, prefix:], patches, y[:, prefix:], token_map.temperature, 3, "l1")
    assert torch.equal(back[:, prefix:], expected)
    copied = token_map.with_lift(norm="copy")
    assert torch.equal(copied.lift(y), torch.stack([y[i, assign[i]] for i in range(2)]))
    other = token_map.with_lift(k=-1, temperature=0.5, norm="l2")
    expected = reconstruct(y[:, prefix:], patches, y[:, prefix:], 0.5, -1, "l2")
    assert torch.equal(other.lift(y)[:, prefix:], expected)
    assert (token_map.k, token_map.norm) == (3, "l1")  # the first map is what it was


def test_traced_programs_take_any_batch():
    class Program(torch.nn.Module):
        def forward(self, x):
            token_map = ClusterMap.of(x, 1, (15, 20), (7, 12), 2)
            return token_map.lift(2 * token_map.apply(x)), token_map.assign, token_map.heads, token_map.pool(x)

    program, x = Program().eval(), torch.randn(2, 301, 16)
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(program, (x,), dynamic_shapes={"x": {0: batch}}).module()
    more = torch.randn(5, 301, 16)
    for got, expected in zip(exported(more), program(more)):
        torch.testing.assert_close(got, expected)
    for got, expected in zip(torch.compile(program, fullgraph=True)(x), program(x)):
        torch.testing.assert_close(got, expected)
