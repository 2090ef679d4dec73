"""Groups the tokens of a map by a few steps of soft k-means that look at neighbouring grid cells only.

Pure tensor code. Source: Liang et al., "Expediting Large-Scale Vision Transformer for Dense Prediction without
Fine-tuning", NeurIPS 2022.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..attention import full_precision
from .axis import cut
from .soft import PooledCells, SoftCells, budget, pooled_cells
from .tiles import Fold, Tiles, make_tiles

_FAR = 1e30  # squared distance of what must not be chosen


class Clusters(NamedTuple):
    """What clustering found.

    Attributes:
        centers: [B, M, C] in the dtype of the tokens, in raster order of the grid.
        cells: the final assignment, to be applied to other values (`means`) or masses (`sums`).
        visible: centres of visible tokens [B, M] bool; None where no mask hides any.
    """

    centers: Tensor
    cells: SoftCells | PooledCells
    visible: Tensor | None = None


class Kinds(NamedTuple):
    """What a mask says: visible tokens and centres belong together, and so do hidden ones.

    Attributes:
        tokens: 1 for visible tokens [B, N, 1] float32.
        centers: 1 for cells with visible tokens [B, M, 1] float32.
    """

    tokens: Tensor
    centers: Tensor


def cluster(
    x: Tensor,
    size: tuple[int, int],
    grid: tuple[int, int],
    iterations: int = 5,
    window: int = 5,
    temperature: float | Tensor = 0.02,
    visible: Tensor | None = None,
) -> Clusters:
    """Clusters the tokens of a map: average pooling on a grid, then soft k-means among neighbouring cells.

    The assignment carries no gradient; the centres are a fixed linear map of the tokens. Distances are computed in
    float32 and never for a token and a centre further apart than the window allows (by more than a tile).

    Args:
        x: patch tokens in raster order [B, N, C].
        size: tokens (high, wide), N = high * wide.
        grid: centres (down, right), at most as many as tokens in either direction.
        iterations: steps of k-means; 0 leaves average pooling.
        window: cells that a token sees in each direction, its own in the middle; odd.
        temperature: inverse temperature, the factor of the squared distances; one number, or one per image [B, 1, 1]
            (see `relative_temperature`).
        visible: [B, N] bool, False for tokens that a mask hides. Those are in no centre but of cells that hold nothing
            else, and decide nothing; None without a mask.

    Raises:
        ValueError: a size that does not fit.

    Source: Liang et al., NeurIPS 2022.
    """
    _check(x, size, grid, iterations, window, temperature)
    pooled, kinds, seen = pooled_cells(size, grid, x, visible), None, None
    if visible is not None:
        seen = pooled.any_visible()
        kinds = Kinds(visible.unsqueeze(-1).float(), seen.unsqueeze(-1).float())
    if iterations == 0:
        return Clusters(pooled.means(x).to(x.dtype), pooled, seen)
    source = x.detach()
    tiles = make_tiles(tuple(size), tuple(grid), window // 2, source)
    with full_precision(x):
        centers = from_middle(pooled.means(source), seen)
        for _ in range(iterations - 1):
            centers = from_middle(_step(tiles, source, *centers, temperature, kinds), seen)
        weights = _final_weights(tiles, source, *centers, temperature, kinds)
    cells = SoftCells(weights, tiles)
    return Clusters(cells.means(x).to(x.dtype), cells, seen)


def relative_temperature(
    x: Tensor, size: tuple[int, int], sharpness: float, visible: Tensor | None = None
) -> Tensor:
    """The inverse temperature at which the usual squared distance of neighbouring tokens counts `sharpness`.

    Absolute numbers go with the scale of the features, which differs by orders of magnitude between models and depths.

    Args:
        x: patch tokens in raster order [B, N, C].
        size: tokens (high, wide), N = high * wide.
        sharpness: what the mean squared distance of tokens that touch, down or right, is to count in the exponent.
        visible: [B, N] bool, False for tokens that a mask hides, which decide nothing; None without a mask.

    Returns:
        [B, 1, 1], at least float32.
    """
    image = x.detach().to(torch.promote_types(x.dtype, torch.float32)).unflatten(1, tuple(size))
    seen = torch.ones_like(image[..., 0]) if visible is None else visible.unflatten(1, tuple(size)).to(image.dtype)
    squares, links = 0.0, 0.0
    for dim in (1, 2):
        length = size[dim - 1] - 1
        linked = seen.narrow(dim, 0, length) * seen.narrow(dim, 1, length)
        apart = (image.narrow(dim, 1, length) - image.narrow(dim, 0, length)).square().sum(3)
        squares, links = squares + (apart * linked).sum((1, 2)), links + linked.sum((1, 2))
    usual = squares / links.clamp(min=1)
    # where neighbours coincide, all that is left of their distances is rounding, which must not be blown up
    level = (image.square().sum(3) * seen).sum((1, 2)) / seen.sum((1, 2)).clamp(min=1)
    return (sharpness / torch.maximum(usual, 1e-6 * level + 1e-12)).view(-1, 1, 1)


def _step(
    tiles: Tiles, x: Tensor, offset: Tensor, bias: Tensor, temperature: float | Tensor, kinds: Kinds | None = None
) -> Tensor:
    """One step of k-means: weights from the centres (see `from_middle`), and their weighted means of the tokens."""
    fold = Fold(tiles)
    for start, stop in tiles.groups(x.shape[2], budget(x, 2)):
        tokens = tiles.take_tokens(x, start, stop)
        weights = _weights(tiles, tokens, offset, bias, temperature, start, stop, kinds)
        fold.add(weights.transpose(2, 3) @ tokens, weights.sum(2).unsqueeze(-1))
    return fold.close()


def _final_weights(
    tiles: Tiles, x: Tensor, offset: Tensor, bias: Tensor, temperature: float | Tensor, kinds: Kinds | None = None
) -> Tensor:
    """Weights of every token of every tile [B, T, P, S]."""
    parts = []
    for start, stop in tiles.groups(x.shape[2], budget(x, 2)):
        tokens = tiles.take_tokens(x, start, stop)
        parts.append(_weights(tiles, tokens, offset, bias, temperature, start, stop, kinds))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _weights(
    tiles: Tiles,
    tokens: Tensor,
    offset: Tensor,
    bias: Tensor,
    temperature: float | Tensor,
    start: int,
    stop: int,
    kinds: Kinds | None = None,
) -> Tensor:
    """Softmax of the negative distances of some rows of tiles, zero for padding: [B, (stop - start) * Tw, P, S]."""
    shift = tiles.take_centers(bias, start, stop).transpose(2, 3)
    logits = tokens @ tiles.take_centers(offset, start, stop).transpose(2, 3)
    barred = ~tiles.allowed[start:stop].flatten(0, 1)
    if kinds is not None:
        others = tiles.take_centers(kinds.centers, start, stop).transpose(2, 3)
        barred = barred | (tiles.take_tokens(kinds.tokens, start, stop) != others)
    factor = temperature.unsqueeze(1) if isinstance(temperature, Tensor) else temperature
    logits = ((2 * logits - shift) * factor).masked_fill(barred, float("-inf"))
    return logits.softmax(dim=-1).masked_fill(barred, 0)  # rows of padding have no cell, nor have some hidden tokens


def from_middle(centers: Tensor, visible: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Centres as distances need them: |x - c|^2 = bias - 2 x offset + what depends on x alone.

    Measured from the middle of all centres, so that what all tokens share does not cancel in large numbers.

    Args:
        centers: [B, M, C] float32.
        visible: [B, M] bool, False for centres of hidden tokens: all others are nearer. None without a mask.

    Returns:
        offset [B, M, C] and bias [B, M, 1].
    """
    if visible is not None:
        centers = centers * visible.unsqueeze(-1)
    middle = centers.mean(1, keepdim=True)
    offset = centers - middle
    squares = torch.linalg.vector_norm(offset, dim=2, keepdim=True).square()
    bias = squares + 2 * offset @ middle.transpose(1, 2)
    return offset, bias if visible is None else bias.masked_fill(~visible.unsqueeze(-1), _FAR)


def cluster_macs(size: tuple[int, int], grid: tuple[int, int], iterations: int, window: int, dim: int) -> int:
    """Multiply-adds of clustering one image: average pooling as two products, then distances and means by tiles.

    Args:
        size: tokens (high, wide).
        grid: centres (down, right).
        iterations: steps of k-means.
        window: cells that a token sees in each direction.
        dim: channels of a token.
    """
    macs = grid[0] * size[1] * (size[0] + grid[1])
    if iterations:
        rows, columns = cut(size, grid, window // 2)
        macs += 2 * iterations * rows.tiles * columns.tiles * rows.size * columns.size * rows.span * columns.span
    return macs * dim


def hard_labels(x: Tensor, centers: Tensor, visible: Tensor | None = None) -> Tensor:
    """Nearest of all centres for every token, a slice of tokens at a time.

    Args:
        x: tokens [B, N, C].
        centers: [B, M, C].
        visible: [B, M] bool, see `from_middle`.

    Returns:
        [B, N] int64.
    """
    x, centers = x.detach(), centers.detach()
    with full_precision(x):
        offset, bias = from_middle(centers.to(torch.promote_types(x.dtype, torch.float32)), visible)
        parts = []
        for start, stop in row_slices(x, centers.shape[1]):
            rows = x[:, start:stop].to(offset.dtype)
            parts.append((bias.transpose(1, 2) - 2 * rows @ offset.transpose(1, 2)).argmin(dim=2))
    return torch.cat(parts, dim=1)


def row_slices(x: Tensor, centers: int) -> list[tuple[int, int]]:
    """(start, stop) of slices of tokens whose distances to all centres stay small beside the tokens x [B, N, C]."""
    total = x.shape[1]
    step = max(1, budget(x, 16) // centers)
    return [(start, min(start + step, total)) for start in range(0, total, step)]


def _check(
    x: Tensor, size: tuple[int, int], grid: tuple[int, int], iterations: int, window: int,
    temperature: float | Tensor,
) -> None:
    if x.dim() != 3 or x.shape[1] != size[0] * size[1]:
        raise ValueError(f"cluster: tokens of shape {tuple(x.shape)} are no map of {size[0]} x {size[1]} (size)")
    if min(grid) < 1 or grid[0] > size[0] or grid[1] > size[1]:
        raise ValueError(
            f"cluster: grid={tuple(grid)} does not fit a map of {size[0]} x {size[1]} tokens; give 1 to as many cells"
        )
    if iterations < 0:
        raise ValueError(f"cluster: iterations={iterations}; give 0 (average pooling) or more")
    if window < 1 or window % 2 == 0:
        raise ValueError(f"cluster: window={window}; give an odd number, so that a token's own cell is in the middle")
    if not isinstance(temperature, Tensor) and temperature <= 0:
        raise ValueError(f"cluster: temperature={temperature}; the inverse temperature must be positive")
