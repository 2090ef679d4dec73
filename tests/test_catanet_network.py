"""CATANet's network: published sizes, windows that overlap, gradients, refusals."""

from __future__ import annotations

import pytest
import torch

from tokenzoo.models import CATANetSR
from tokenzoo.ops.overlapping import cut_windows, join_windows, window_starts

TINY = {
    "dim": 8, "qk_dim": 8, "mlp_dim": 12, "heads": 2, "patch_size": (8, 10), "num_tokens": (4, 8),
    "group_size": (32, 24), "n_iters": (2, 2),
}  # fmt: skip


@pytest.mark.parametrize("upscale,thousands", [(2, 477), (3, 550), (4, 535)])
def test_parameters(upscale: int, thousands: int):
    with torch.device("meta"):
        model = CATANetSR(upscale)
    assert sum(p.numel() for p in model.parameters()) / 1000 == pytest.approx(thousands, abs=0.5)


@pytest.mark.parametrize(
    "grid,size,step", [((20, 18), (8, 8), (6, 6)), ((9, 15), (8, 8), (6, 6)), ((5, 7), (5, 4), (3, 2))]
)
def test_windows_are_put_back_as_their_mean(grid, size, step):
    x = torch.randn(2, 3, *grid, dtype=torch.float64)
    windows = cut_windows(x, size, step)
    torch.testing.assert_close(join_windows(windows, grid, step), x)
    other = torch.randn_like(windows)
    total, held = torch.zeros_like(x), torch.zeros_like(x)
    for i, top in enumerate(window_starts(grid[0], size[0], step[0])):
        for j, left in enumerate(window_starts(grid[1], size[1], step[1])):
            place = (slice(None), slice(None), slice(top, top + size[0]), slice(left, left + size[1]))
            assert torch.equal(windows[:, :, i, j], x[place])
            total[place] += other[:, :, i, j]
            held[place] += 1
    assert held.min() >= 1
    torch.testing.assert_close(join_windows(other, grid, step), total / held)


@pytest.mark.parametrize("upscale", [2, 3, 4])
def test_any_size_and_gradients(upscale: int):
    torch.manual_seed(0)
    model = CATANetSR(upscale, **TINY)
    for size in ((13, 21), (5, 4)):
        out = model(torch.randn(2, 3, *size))
        assert out.shape == (2, 3, upscale * size[0], upscale * size[1])
    out.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


def test_refusals():
    with pytest.raises(ValueError, match="upscale=5 has no upsampler"):
        CATANetSR(5, **TINY)
    with pytest.raises(ValueError, match=r"are for \[1, 2, 2, 2\] blocks"):
        CATANetSR(**{**TINY, "patch_size": (8,)})
    with pytest.raises(ValueError, match="windows of 2 only overlap"):
        CATANetSR(**{**TINY, "patch_size": (8, 2)})
    with pytest.raises(ValueError, match="do not split into 3 heads"):
        CATANetSR(**{**TINY, "heads": 3})
    with pytest.raises(ValueError, match="no batch of images"):
        CATANetSR(**TINY)(torch.zeros(3, 8, 8))
