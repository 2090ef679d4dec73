"""Layers that look at neighbours on the grid, for tokens that are left: to the grid, through the layer, and back.

In front of such a layer every place of the grid gets the value of the token it belongs to, dropped ones what the
recipe's `fill` says; what the layer gives goes back to the tokens through the same maps.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..core.lift import lift
from ..core.recipe import Recipe
from ..core.tokens import Tokens, TraceStep
from ..ops.rows import split_dim, take_rows
from .places import Places, lost_tokens


def to_map(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tokens [B, H * W, C] as a map [B, C, H, W], channels last in memory; no copy."""
    return split_dim(x, 1, *grid).permute(0, 3, 1, 2)


def from_map(x: Tensor) -> Tensor:
    """A map [B, C, H, W] as tokens [B, H * W, C]; no copy where channels lie last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def on_grid(
    layer: Callable[[Tensor], Tensor],
    values: Tensor,
    tokens: Tokens,
    recipe: Recipe,
    through: Callable[[Tensor], Tensor],
    places: Places | None = None,
) -> Tensor:
    """What a layer on the grid gives the tokens [B, N', E].

    Args:
        layer: takes values of all places in raster order [B, N, D] and returns as many [B, N, E].
        values: of the tokens [B, N', D].
        tokens: the tokens and how they came about; their trace keeps the values of dropped ones.
        recipe: says what dropped tokens get.
        through: turns values of the residual stream, which dropped tokens are remembered by, into such values.
        places: the trace in one, for the images of `values`; None goes back map by map.
    """
    if places is not None:
        return places.collect(layer(places.spread(values, through)))
    trace = recipe.lift_trace(tokens.trace)
    if recipe.fill.kind == "stash":
        trace = tuple(_dropped_through(step, through) for step in trace)
    out = layer(lift(values, trace, recipe.fill))
    for step in tokens.trace:
        out = step.map.apply(out)
    return out


def _dropped_through(step: TraceStep, through: Callable[[Tensor], Tensor]) -> TraceStep:
    """A step whose kept values are those of a function, computed for dropped tokens alone."""
    if not step.map.drops:
        return step
    rows, slot = lost_tokens(step.map)
    return step._replace(before=take_rows(through(take_rows(step.before, rows)), slot))
