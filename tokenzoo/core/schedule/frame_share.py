"""A share of the tokens that merges into the first image of several, and into one patch per cell of the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from ...ops.draw import drawn
from ...ops.matching.frames import spread_step
from ..options import sides
from ..step import Step
from ..tokens import Layout
from .share import Share


class FrameCounts(NamedTuple):
    """What the options of a method come to for some tokens, as plain integers.

    Attributes:
        merged: tokens that merge.
        twice: protected destinations, which stand once more beside the merged ones; 0 where nothing merges.
        sources: patches that can merge.
        destinations: patches that others may merge into.
        kept: protected tokens of the sequence, prefix included.
        step: distance between them.
        first: patches in front that all are destinations.
    """

    merged: int
    twice: int
    sources: int
    destinations: int
    kept: int
    step: int
    first: int


@dataclass(frozen=True)
class FrameShare(Share):
    """A share of all tokens to merge: options `ratio`, `frames`, `stride`, `protected`, `seed` and `clip`."""

    def count(self, n: int, step: Step, layout: Layout) -> FrameCounts:
        """What merges, what stands twice, and out of how many."""
        method, prefix = step.method, layout.num_prefix
        patches, kept = n - prefix, int(method.protected * n)
        (down, right), every = sides(method.stride), spread_step(n, kept)
        places = [row - prefix for row in range(0, kept * every, every or 1) if row >= prefix]
        if patches == layout.num_patches:
            grid, seed = frame_grid(method, layout), draw_seed(method, step.block)
            first, cells = grid[0] * grid[1], (grid[0] // down) * (grid[1] // right)
            destinations = first + (method.frames - 1) * cells
            twice = sum(_is_picked(place, sides(method.stride), seed, grid) for place in places)
        else:  # they form no grid: stretches
            first = -(-patches // method.frames)
            destinations = first - (first - patches) // (down * right)
            twice = sum(place < first or (place - first) % (down * right) == 0 for place in places)
        sources = patches - destinations - len(places) + twice
        merged = min(int(method.ratio * n), sources)
        return FrameCounts(merged, twice if merged else 0, sources, destinations, kept, every, first)

    def tokens_out(self, n: int, step: Step, layout: Layout) -> int:
        method = step.method
        if n - layout.num_prefix == layout.num_patches:
            grid, frames, (rows, columns) = frame_grid(method, layout), method.frames, layout.grid
            if rows % frames:
                raise step.error(
                    f"frames={frames} does not divide the {rows} x {columns} patches into images of equal height; set "
                    f"frames to a divisor of {rows}, or stack the images in rows"
                )
            if sides(method.stride)[0] > grid[0] or sides(method.stride)[1] > grid[1]:
                raise step.error(
                    f"stride={method.stride} is larger than the {grid[0]} x {grid[1]} patches of each of {frames} "
                    "images; lower it, or frames"
                )
        found = step.count(n, layout)
        self.possible(int(method.ratio * n), found.sources, n, step)
        return n - found.merged + found.twice

    def left(self, patches: int, step: Step, layout: Layout) -> int:
        """Tokens inside of attention that some patches leave, without the prefix; unchecked."""
        found = step.count(layout.num_prefix + patches, layout)
        return patches - found.merged + found.twice

    def dial(self, method: Any, t: float, layers: Sequence[int], layout: Layout) -> dict[str, Any]:
        # what can merge whatever the draws are: each protected patch of the other images takes a source away
        n, (high, wide), (down, right) = layout.num_prefix + layout.num_patches, layout.grid, sides(method.stride)
        high, kept = max(1, high // method.frames), int(method.protected * n)
        every, behind = spread_step(n, kept), layout.num_prefix + high * wide
        protected = sum(row >= behind for row in range(0, kept * every, every or 1))
        most = (method.frames - 1) * (high * wide - (high // down) * (wide // right)) - protected
        return {"ratio": t * max(0, most) / n}


def frame_grid(method: Any, layout: Layout) -> tuple[int, int]:
    """Patches of each image (high, wide)."""
    return layout.grid[0] // method.frames, layout.grid[1]


def draw_seed(method: Any, block: int) -> int | None:
    """Seed of the draws of one block, None for the top left patch of each cell."""
    return None if method.seed is None else method.seed * 1009 + block


@lru_cache(maxsize=256)
def parts_of_grid(
    frames: int, grid: tuple[int, int], stride: tuple[int, int], seed: int | None, kept: range
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Patches that may merge and their destinations, both ascending, of images that have all their patches.

    Args:
        frames: images in the sequence.
        grid: patches of each (high, wide).
        stride: size of a cell (down, right).
        seed: of the draws, see `draw_seed`.
        kept: patches that must not merge.
    """
    picked = [_is_picked(place, stride, seed, grid) for place in range(frames * grid[0] * grid[1])]
    src = tuple(place for place, taken in enumerate(picked) if not taken and place not in kept)
    return src, tuple(place for place, taken in enumerate(picked) if taken)


def _is_picked(place: int, stride: tuple[int, int], seed: int | None, grid: tuple[int, int]) -> bool:
    """Whether a patch is a destination, of all images in their grid."""
    (high, wide), (down, right) = grid, stride
    image, place = divmod(place, max(1, high * wide))
    (row, down_in), (column, right_in) = divmod(place // wide, down), divmod(place % wide, right)
    rows, columns = high // down, wide // right
    if image == 0 or row >= rows or column >= columns:
        return image == 0
    if seed is None:
        return down_in == right_in == 0
    cell = ((image - 1) * rows + row) * columns + column
    return int(drawn(cell, seed) * (down * right)) == down_in * right + right_in
