"""A slow mixer of PlainMamba, one scalar step after another, for tests: it shares no code with the fast one."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_MOVES = {(0, 1): 1, (0, -1): 2, (-1, 0): 3, (1, 0): 4}


def walk(grid: tuple[int, int], path: int) -> list[tuple[int, int]]:
    """Places (row, column) along a path."""
    high, wide = grid
    places = []
    if path in (0, 1):
        for row in range(high):
            columns = range(wide) if row % 2 == 0 else reversed(range(wide))
            places += [(row, column) for column in columns]
    else:
        for column in range(wide):
            rows = range(high) if column % 2 == 0 else reversed(range(high))
            places += [(row, column) for row in rows]
    return places[::-1] if path in (1, 3) else places


def arrivals(grid: tuple[int, int], path: int) -> dict[int, int]:
    """Code of arrival at each raster position of a path."""
    places = walk(grid, path)
    codes = {places[0][0] * grid[1] + places[0][1]: 0}
    for (row, column), (next_row, next_column) in zip(places, places[1:]):
        codes[next_row * grid[1] + next_column] = _MOVES[next_row - row, next_column - column]
    return codes


def filtered_path(grid: tuple[int, int], path: int, kept: list[int]) -> list[int]:
    """Raster positions of the kept tokens in the order of the original path."""
    along = [row * grid[1] + column for row, column in walk(grid, path)]
    return [position for position in along if position in kept]


def mix(
    mixer: torch.nn.Module,
    y: Tensor,
    grid: tuple[int, int],
    kept: Tensor,
    decay: Callable[[Tensor, int], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The mixer on tokens y [B, K, C] at raster positions kept [B, K].

    Args:
        mixer: whose parameters to use.
        y: tokens.
        grid: tokens (high, wide).
        kept: positions.
        decay: step sizes [K, D] of a path as the steps take them, and the path -> those that the state decays by.

    Returns:
        The output [B, K, C], and the sums of positive scan outputs over channels [B, 4, K] in raster order.
    """
    p = {name: value.detach().double() for name, value in mixer.state_dict().items()}
    inner, states = p["A_log"].shape
    rank, size = p["dt_proj.weight"].shape[1], p["conv2d.weight"].shape[-1]
    outs, scores = [], []
    for tokens, positions in zip(y.double(), kept.tolist()):
        both = tokens @ p["in_proj.weight"].T + p["in_proj.bias"]
        x, z = both[:, :inner], both[:, inner:]
        there = dict(zip(positions, x))
        seen = []
        for position in positions:
            row, column = divmod(position, grid[1])
            total = p["conv2d.bias"].clone()
            for i in range(size):
                for j in range(size):
                    at = row + i - size // 2, column + j - size // 2
                    inside = 0 <= at[0] < grid[0] and 0 <= at[1] < grid[1]
                    if inside and at[0] * grid[1] + at[1] in there:
                        total = total + p["conv2d.weight"][:, 0, i, j] * there[at[0] * grid[1] + at[1]]
            seen.append(F.silu(total))
        seen = torch.stack(seen)
        low = seen @ p["x_proj.weight"].T
        # the bias twice, as released
        dt = F.softplus(low[:, :rank] @ p["dt_proj.weight"].T + 2 * p["dt_proj.bias"])
        b, c = low[:, rank : rank + states], low[:, rank + states :]
        summed = torch.zeros_like(seen)
        scored = []
        for path in range(4):
            codes, score = arrivals(grid, path), torch.zeros(len(positions), dtype=torch.float64)
            slower = dt if decay is None else decay(dt, path)
            h = torch.zeros(inner, states, dtype=torch.float64)
            for step, position in enumerate(filtered_path(grid, path, positions)):
                token = positions.index(position)
                into = b[step] + p["direction_Bs"][codes[position]]
                a = -p["A_log"].exp()
                h = (slower[step][:, None] * a).exp() * h + dt[step][:, None] * into * seen[token][:, None]
                out = h @ c[step] + p["D"] * seen[token]
                summed[token] += out
                score[token] = out.clamp(min=0).sum()
            scored.append(score)
        outs.append((summed * F.silu(z)) @ p["out_proj.weight"].T + p["out_proj.bias"])
        scores.append(torch.stack(scored))
    assert all(math.isfinite(value) for value in torch.stack(outs).flatten().tolist())
    return torch.stack(outs), torch.stack(scores)
