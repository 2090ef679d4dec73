"""Multiply-adds of scanning models by formula, in both conventions: all directions of the scan, or one."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from ...core.recipe import Recipe
from ...core.tokens import Layout
from ...ops.layer_macs import linear_macs
from ..classes import unwrapped


class ScanCosts(NamedTuple):
    """Everything about a model that counting needs.

    Attributes:
        blocks: (block, its reducing class) of every block.
        embed: multiply-adds of the embedding.
        head: multiply-adds of the classifier.
        head_pools: the classifier sees one pooled vector.
    """

    blocks: tuple[tuple[nn.Module, Any], ...]
    embed: int
    head: int
    head_pools: bool

    def rows(
        self, recipe: Recipe | None, layout: Layout, directions: int | None = None
    ) -> list[tuple[str, str, int, int, int, int, str]]:
        """Name, methods, tokens in and out, multiply-adds, those of reduction, and attention path (none) of every row.

        Args:
            recipe: None for the unpatched model.
            layout: the sequence that block 0 sees.
            directions: directions of the scan that count, 1 or None for all.
        """
        n, depth = layout.num_prefix + layout.num_patches, len(self.blocks)
        counts = recipe.token_counts(depth, layout) if recipe is not None else [[] for _ in range(depth)]
        rows = [("embed", "", n, n, self.embed, 0, "")]
        for index, ((block, kind), steps) in enumerate(zip(self.blocks, counts)):
            shape, start, reduction, inside = kind.shape(block), n, 0, n
            for step, before, after in steps:
                reduction += step.method.macs(before, after, shape, layout, step)
                n = after
                if step.method.place in ("before", "ahead"):
                    inside = after
            total = kind.macs(block, inside, layout, directions) + reduction
            names = ", ".join(step.method.name for step, _, _ in steps)
            rows.append((f"blocks.{index}", names, start, n, total, reduction, ""))
        head = self.head * (1 if self.head_pools else n)
        return [*rows, ("head", "", n, n, head, 0, "")]


def read_scan_costs(model: nn.Module, grid: tuple[int, int]) -> ScanCosts:
    """Reads what the formulas need off a model, patched or not, at a grid of tokens."""
    from ..registry import find_family

    family = find_family(model)
    blocks = tuple((block, family.block_kind(block)) for block in map(unwrapped, model.blocks))
    return ScanCosts(blocks, model.patch_embed.macs(grid), linear_macs(model.head), bool(model.global_pool))
