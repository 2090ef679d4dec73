"""`dct` and `fourier` against transforms written out in float64, and what low-pass filters promise."""

from __future__ import annotations

import math

import pytest
import torch
from cases import build
from torch import Tensor

import tokenzoo
from tokenzoo.core.filtering import filtered
from tokenzoo.core.tokens import Layout, Tokens


def cosines(n: int) -> Tensor:
    """The orthonormal DCT-II of n samples, entry by entry."""
    rows = [[math.cos(math.pi * k * (2 * j + 1) / (2 * n)) * math.sqrt((2 if k else 1) / n) for j in range(n)]
            for k in range(n)]  # fmt: skip
    return torch.tensor(rows, dtype=torch.float64)


def reference(x: Tensor, few: int) -> Tensor:
    """Samples x [n, ...] float64 without their high frequencies: transform, cut, inverse transform, scale."""
    spectrum = torch.tensordot(cosines(len(x)), x, dims=1)[:few]
    return torch.tensordot(cosines(few).T, spectrum, dims=1) * math.sqrt(few / len(x))


def interpolated(y: Tensor, many: int) -> Tensor:
    """The way back: the missing frequencies are zero."""
    spectrum = torch.zeros(many, *y.shape[1:], dtype=torch.float64)
    spectrum[: len(y)] = torch.tensordot(cosines(len(y)), y, dims=1)
    return torch.tensordot(cosines(many).T, spectrum, dims=1) * math.sqrt(many / len(y))


def tokens_of(batch: int, grid: tuple[int, int], seed: int, shuffled: bool = False, **side) -> Tokens:
    g, patches = torch.Generator().manual_seed(seed), grid[0] * grid[1]
    x = torch.randn(batch, 1 + patches, 6, generator=g, dtype=torch.float64)
    layout = Layout(1, True, grid, track_size=True, track_positions=True)
    if shuffled:  # as a method leaves them that orders patches by score
        order = torch.stack([torch.randperm(patches, generator=g) for _ in range(batch)]) + 1
        side["positions"] = torch.cat([torch.zeros(batch, 1, dtype=torch.int64), order], dim=1)
    return Tokens(x, layout, **side)


def in_raster(tokens: Tokens, image: int) -> Tensor:
    """Real patches of an image in raster order."""
    real = slice(None) if tokens.valid is None else tokens.valid[image]
    return tokens.x[image, real][1:][tokens.original_positions()[image, real][1:].argsort()]


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("few", [1, 4, 7, 12])
def test_sequences(few, shuffled):
    tokens = tokens_of(3, (3, 4), few, shuffled)
    token_map = filtered(tokens, None, lambda n: few)
    after = tokens.reduce(token_map)
    for image in range(3):
        torch.testing.assert_close(after.x[image, 1:], reference(in_raster(tokens, image), few), atol=1e-6, rtol=0)
    assert torch.equal(after.x[:, 0], tokens.x[:, 0])
    torch.testing.assert_close(token_map.matrix() @ tokens.x, after.x, atol=1e-6, rtol=0)
    back = tokens._replace(x=token_map.lift(after.x))
    for image in range(3):
        wanted = interpolated(reference(in_raster(tokens, image), few), 12)
        torch.testing.assert_close(in_raster(back, image), wanted, atol=1e-6, rtol=0)
    torch.testing.assert_close(after.size[:, 1:], torch.full((3, few, 1), 12 / few))
    place = after.positions[:, 1:]
    assert (place.diff(dim=1) > 0).all()  # heads stand in raster order


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("grid,cells", [((4, 6), (2, 3)), ((5, 7), (3, 4)), ((3, 4), (3, 4)), ((4, 4), (1, 3))])
def test_grids(grid, cells, shuffled):
    tokens = tokens_of(2, grid, 1, shuffled)
    after = tokens.reduce(filtered(tokens, cells, lambda n: math.prod(cells)))
    for image in range(2):
        rows = reference(in_raster(tokens, image).unflatten(0, grid), cells[0])
        wanted = reference(rows.transpose(0, 1), cells[1]).transpose(0, 1).flatten(0, 1)
        torch.testing.assert_close(after.x[image, 1:], wanted, atol=1e-6, rtol=0)
    torch.testing.assert_close(after.size.sum(1), torch.full((2, 1), 1.0 + grid[0] * grid[1]))


@pytest.mark.parametrize("cells", [None, (2, 2)])
def test_images_of_a_padded_batch_are_what_they_are_alone(cells):
    """Also one that has all its patches, beside others that do not."""
    whole = tokens_of(3, (4, 4), 2, shuffled=True)
    valid = torch.ones(3, 17, dtype=torch.bool)
    valid[1, 9:], valid[2, 5:] = False, False
    padded = whole._replace(valid=valid)
    remaining = lambda n: 4 if n == 16 else max(1, n // 4)  # noqa: E731
    after = padded.reduce(filtered(padded, cells, remaining))
    for image in range(3):
        real = valid[image]
        cut = lambda side: side[image : image + 1, real]  # noqa: E731, B023
        one = whole._replace(x=cut(whole.x), positions=cut(whole.positions))
        alone = one.reduce(filtered(one, cells, remaining))
        kept = after.valid[image]
        assert kept.sum() == alone.length
        torch.testing.assert_close(after.x[image, kept], alone.x[0], atol=1e-6, rtol=0)
        assert torch.equal(after.positions[image, kept], alone.positions[0])
        torch.testing.assert_close(after.size[image, kept], alone.size[0])


def test_scales():
    """Constants stay; between orthonormal bases they grow with the square root of the reduction, and come back."""
    tokens = tokens_of(1, (6, 6), 0)._replace(x=torch.ones(1, 37, 2))
    for rescale, value in ((True, 1.0), (False, 2.0)):
        token_map = filtered(tokens, (3, 3), lambda n: 9, rescale)
        out = token_map.apply(tokens.x)
        torch.testing.assert_close(out[:, 1:], torch.full((1, 9, 2), value))
        torch.testing.assert_close(token_map.lift(out), tokens.x)


def test_the_mean_of_the_patches_stays():
    tokens = tokens_of(2, (5, 7), 4)
    for token_map in (filtered(tokens, (2, 3), lambda n: 6), filtered(tokens, None, lambda n: 11)):
        torch.testing.assert_close(token_map.apply(tokens.x)[:, 1:].mean(1), tokens.x[:, 1:].mean(1), atol=1e-6, rtol=0)


@torch.no_grad()
def test_half_precision_is_filtered_in_float32():
    tokens = tokens_of(1, (8, 8), 0)
    half = tokens._replace(x=tokens.x.bfloat16())
    token_map = filtered(half, (4, 4), lambda n: 16)
    out = token_map.apply(half.x)
    assert torch.equal(out, token_map.apply(half.x.float()).bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(token_map.apply(half.x.float()), token_map.apply(half.x.double().float()))
        assert token_map.apply(half.x.float()).dtype == torch.float32
    torch.testing.assert_close(token_map.apply(half.x.float()).bfloat16(), out, atol=0, rtol=0)


@pytest.mark.parametrize("cells", [None, (2, 2)])
@pytest.mark.parametrize("count", [3, 9])
def test_hidden_patches_are_no_part_of_it(count, cells):
    """The visible ones are filtered, or stay as they are where they are few; hidden ones fill what is left."""
    tokens = tokens_of(2, (4, 4), 5, shuffled=True)
    visible = torch.ones(2, 17, dtype=torch.bool)
    visible[0, 1 + count :] = False
    tokens = tokens._replace(visible=visible)
    token_map = filtered(tokens, cells, lambda n: 4)
    after = tokens.reduce(token_map.masked(visible))
    few = min(4, count)
    seen = tokens.x[0, 1 : 1 + count][tokens.positions[0, 1 : 1 + count].argsort()]
    torch.testing.assert_close(after.x[0, 1 : 1 + few], reference(seen, few), atol=1e-6, rtol=0)
    assert after.visible[0].tolist() == [True] * (1 + few) + [False] * (4 - few)
    assert all((tokens.x[0] == row).all(1).any() for row in after.x[0, 1 + few :])
    alone = tokens._replace(x=tokens.x[1:], positions=tokens.positions[1:], visible=None)
    torch.testing.assert_close(after.x[1:], alone.reduce(filtered(alone, cells, lambda n: 4)).x, atol=1e-6, rtol=0)
    torch.testing.assert_close(token_map.matrix() @ tokens.x, after.x, atol=1e-6, rtol=0)
    back = token_map.lift(after.x)
    if count == 3:  # visible ones come back as they were
        torch.testing.assert_close(back[0, 1:4], tokens.x[0, 1:4], atol=1e-6, rtol=0)


@pytest.mark.parametrize("method,options,error,words", [
    ("fourier", {"stride": 0}, ValueError, ["fourier: stride=", "at least 1"]),
    ("fourier", {"grid": (9, 2)}, ValueError, ["fourier at block 1", "grid=(9, 2)", "4 x 4 patches"]),
    ("fourier", {"grid": "wide"}, TypeError, ["grid='wide'"]),
    ("dct", {"keep_rate": 1.5}, ValueError, ["keep_rate=1.5", "(0, 1]"]),
    ("dct", {"tokens": 40}, ValueError, ["tokens=40"]),
])  # fmt: skip
def test_bad_options(method, options, error, words):
    with pytest.raises(error) as caught:
        tokenzoo.patch_model(build("deit"), method, **options)
    assert all(word in str(caught.value) for word in words)
