"""Multiply-adds by formula: what a model costs block by block, exact about tokens, without running it.

One multiply-add counts once. Counted are linear layers, convolutions, attention products, and what deciding and
applying a reduction costs; norms, activations, softmax and sorting are not, as usual.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..adapters.backbone import Family
from ..adapters.block import BlockMacs
from ..adapters.classes import unwrapped as unwrapped_block
from ..adapters.costs import block_cost
from ..adapters.inspect import describe, running_steps
from ..adapters.registry import find_family
from ..adapters.scan.costs import ScanCosts
from ..adapters.wrappers import backbone_of
from ..core.method import BlockShape
from ..core.recipe import Placed, Recipe
from ..core.tokens import Layout
from ..ops.layer_macs import conv_macs, is_conv, linear_macs, unwrapped


@dataclass(frozen=True)
class BlockRow:
    """One row of a report.

    Attributes:
        name: "blocks.3", "embed" or "head".
        methods: names of the methods that act there.
        tokens_in: tokens before, prefix included.
        tokens_out: tokens after (the largest possible count where it depends on the images).
        macs: multiply-adds for one image, reduction included.
        reduction_macs: the part of it that reduction itself costs.
        attention: attention path, empty where there is none.
    """

    name: str
    methods: str
    tokens_in: int
    tokens_out: int
    macs: int
    reduction_macs: int
    attention: str


@dataclass(frozen=True)
class Report:
    """What a model costs, block by block, for one image.

    Attributes:
        rows: embed, the blocks, head.
        unpatched: multiply-adds of the same model without reduction.
        data_dependent: counts depend on the images, the rows are upper bounds.
        one_direction: multiply-adds of models that scan, and of the same model without reduction, with one direction of
            the scan counted, as most of their papers do; None for all other models.
    """

    rows: tuple[BlockRow, ...]
    unpatched: int
    data_dependent: bool = False
    one_direction: tuple[int, int] | None = None

    @property
    def total(self) -> int:
        """Multiply-adds of the whole model for one image."""
        return sum(row.macs for row in self.rows)

    @property
    def ratio(self) -> float:
        """Share of the unpatched model's multiply-adds."""
        return self.total / self.unpatched

    @property
    def tokens_out(self) -> int:
        """Tokens after the last block, prefix included."""
        return [row for row in self.rows if row.name.startswith("blocks.")][-1].tokens_out

    @property
    def attn_impl(self) -> str:
        """ "fused" if every block attends on the fused kernel, else "unfused"; "none" for models that scan."""
        if self.one_direction is not None:
            return "none"
        return "unfused" if any(row.attention.startswith("unfused") for row in self.rows) else "fused"

    def __str__(self) -> str:
        head = ("block", "method", "tokens", "GMACs", "attention")
        body = []
        for row in self.rows:
            same = row.tokens_in == row.tokens_out
            tokens = f"{row.tokens_in}" if same else f"{row.tokens_in} -> {row.tokens_out}"
            body.append((row.name, row.methods, tokens, f"{row.macs / 1e9:.3f}", row.attention))
        share = f"{self.total / 1e9:.3f}"
        bound = "at most " if self.data_dependent else ""
        body.append(("total", "", "", share, f"{bound}{self.ratio:.1%} of {self.unpatched / 1e9:.3f} unpatched"))
        if self.one_direction is not None:
            own, whole = self.one_direction
            what = f"{bound}{own / whole:.1%} of {whole / 1e9:.3f} unpatched"
            body[-1] = ("total", "all directions", *body[-1][2:])
            body.append(("total", "one direction", "", f"{own / 1e9:.3f}", what))
        widths = [max(len(line[i]) for line in (head, *body)) for i in range(len(head))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in (head, *body)]
        return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


@dataclass(frozen=True)
class Costs:
    """Everything about a model that the formulas need, read once."""

    blocks: tuple[tuple[BlockMacs, BlockShape, bool], ...]
    embed: int
    head: int
    head_per_token: int
    head_per_pair: int
    head_skips: int  # prefix tokens that pooling with attention does not see


def read_costs(backbone: nn.Module, family: Family, layout: Layout, grid: tuple[int, int] | None = None) -> Costs | Any:
    """Reads what the formulas need off a model, patched or not, at a patch grid (None for the model's own)."""
    if family.costs is not None:
        return family.costs(backbone, tuple(grid or backbone.patch_embed.grid_size))
    blocks = []
    for block in map(unwrapped_block, backbone.blocks):
        cls = family.block_kind(block)
        blocks.append((cls.macs(block), cls.shape(block), cls.fused.fget(block)))
    head, per_token, per_pair = _head_costs(backbone)
    sees_all = backbone.attn_pool is None or getattr(backbone, "pool_include_prefix", True)
    skips = 0 if sees_all else layout.own_prefix
    if getattr(backbone, "aux_head", None) is not None:  # a second classifier that reads every patch token
        per_token, skips = per_token + linear_macs(backbone.aux_head), layout.own_prefix
    return Costs(tuple(blocks), _embed_macs(backbone, layout), head, per_token, per_pair, skips)


def _embed_macs(backbone: nn.Module, layout: Layout) -> int:
    """Multiply-adds of the patch embedding, convolutional stems included, from the shapes that really occur."""
    embed, total = backbone.patch_embed, 0
    if hasattr(embed, "macs"):  # embeddings of tokenzoo.models know their cost
        return embed.macs(layout.grid)
    patch = embed.patch_size if isinstance(embed.patch_size, tuple) else (embed.patch_size,) * 2
    if is_conv(unwrapped(getattr(embed, "proj", None))) and not hasattr(embed, "backbone"):
        return conv_macs(embed.proj) * layout.num_patches

    def count(module: nn.Module, args: Any, out: torch.Tensor) -> None:
        nonlocal total
        positions = out[0, 0].numel() if isinstance(module, nn.Conv2d) else out[0].numel() // out.shape[-1]
        total += module.weight.numel() * positions

    layers = [m for m in embed.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    weight = layers[0].weight
    size = embed.img_size if embed.img_size is not None else tuple(g * p for g, p in zip(layout.grid, patch))
    training = embed.training
    try:
        embed.eval()
        with torch.no_grad():
            embed(torch.zeros(1, layers[0].weight.shape[1], *size, device=weight.device, dtype=weight.dtype))
    finally:
        embed.train(training)
        for hook in hooks:
            hook.remove()
    return total


def _head_costs(backbone: nn.Module) -> tuple[int, int, int]:
    """Multiply-adds of pooling and head: fixed, per pooled token, and per pair of pooled tokens."""
    heads = [m for name in ("head", "head_dist") if (m := getattr(backbone, name, None)) is not None]
    fixed = sum(linear_macs(m) for m in heads)
    pool = backbone.attn_pool
    if pool is None:
        # without pooling the head sees every token
        return (0, fixed, 0) if backbone.global_pool == "" else (fixed, 0, 0)
    if not hasattr(pool, "latent"):
        return fixed, 0, 2 * pool.num_heads * pool.head_dim
    width = pool.num_heads * pool.head_dim
    once = linear_macs(pool.q) + linear_macs(pool.proj) + (linear_macs(pool.mlp) if pool.mlp is not None else 0)
    return fixed + pool.latent_len * once, 2 * width * (width + pool.latent_len), 0


def block_rows(costs: Costs | Any, recipe: Recipe | None, layout: Layout) -> tuple[BlockRow, ...]:
    """The rows of a report: embedding, blocks, head; `recipe` None for the unpatched model."""
    if not isinstance(costs, Costs):
        return tuple(BlockRow(*row) for row in costs.rows(recipe, layout))
    depth = len(costs.blocks)
    counts = recipe.token_counts(depth, layout) if recipe is not None else [[] for _ in range(depth)]
    n = layout.num_prefix + layout.num_patches
    first = counts[0] if counts else []
    # a method before block 0 embeds the image at half resolution too, a quarter of the patches
    half = costs.embed // 4 if any(step.method.place == "embed" for step, _, _ in first) else 0
    rows = [BlockRow("embed", "", n, n, costs.embed + half, half, "")]
    sized = padded = False
    for index, ((macs, shape, fused), steps) in enumerate(zip(costs.blocks, counts)):
        after, total, reduction = block_cost(macs, shape, steps, n, layout)
        path = "fused" if fused else "unfused"
        if sized or padded:
            path += ", " + " and ".join([*(["log-size bias"] if sized else []), *(["padding mask"] if padded else [])])
        names = ", ".join(step.method.name for step, _, _ in steps)
        rows.append(BlockRow(f"blocks.{index}", names, n, after, total, reduction, path))
        sized = sized or (recipe is not None and recipe.proportional and any(s.method.merges for s, _, _ in steps))
        padded = padded or any(step.method.pads for step, _, _ in steps)
        n = after
    pooled = n - costs.head_skips
    head = costs.head + costs.head_per_token * pooled + costs.head_per_pair * pooled * pooled
    rows.append(BlockRow("head", "", n, n, head, 0, ""))
    return tuple(rows)


def report(model: nn.Module, img_size: int | tuple[int, int] | None = None) -> Report:
    """Tokens, multiply-adds and attention path of a model, block by block, by formula.

    Args:
        model: a served model, patched or not.
        img_size: image (height, width) or one side; None for the model's own.

    Raises:
        TypeError: a model that is not served.
        ValueError: the recipe cannot be met at this size.
    """
    backbone = backbone_of(model)
    recipe = getattr(backbone, "tokenzoo_recipe", None)
    if recipe is not None:  # what runs, which may have lost blocks since it was patched
        recipe = Placed.of(recipe, running_steps(backbone))
    family = find_family(backbone)
    grid = None
    if img_size is not None:
        size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        grid = tuple(backbone.patch_embed.dynamic_feat_size(size))
    info = describe(backbone, grid, recipe)
    costs = read_costs(backbone, family, info.layout, grid)
    unpatched = sum(row.macs for row in block_rows(costs, None, info.layout))
    data_dependent = recipe is not None and any(m.data_dependent for m in recipe.methods)
    one = None
    if isinstance(costs, ScanCosts):
        one = tuple(sum(row[4] for row in costs.rows(r, info.layout, 1)) for r in (recipe, None))
    return Report(block_rows(costs, recipe, info.layout), unpatched, data_dependent, one)
