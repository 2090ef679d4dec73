"""What methods see of an SViT: one sequence a stage with plain attention."""

from __future__ import annotations

from torch import nn

from ...core.recipe import Recipe
from ...core.tokens import Layout
from ...models.svit.blocks import halved


def sequence_layout(grid: tuple[int, int], recipe: Recipe | None, standalone: bool = False) -> Layout:
    """What the blocks of a stage see: no prefix, and the trace is kept with all it takes to go back to the grid."""
    size = recipe is not None and recipe.track_size
    positions, raster = recipe is not None and recipe.track_positions, recipe is not None and recipe.order == "raster"
    return Layout(0, False, grid, size, positions, standalone, keep_values=True, raster=raster)


def stage_layouts(model: nn.Module, grid: tuple[int, int], recipe: Recipe | None) -> dict[int, Layout]:
    """First block of every stage with plain attention, and what it sees.

    Args:
        model: patched or not.
        grid: places (high, wide) of the first stage.
        recipe: decides which side data is tracked.
    """
    found, first = {}, 0
    for stage in model.layers:
        if stage.is_plain:
            found[first] = sequence_layout(tuple(grid), recipe)
            first += len(stage.blocks)
        grid = halved(grid)
    return found
