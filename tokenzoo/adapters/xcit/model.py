"""timm's xcit.py: XCiT, which attends among channels; its class token enters behind the blocks, see `late_class`.

Read from timm 1.0.19 to 1.0.31. Differences from upstream: the model's subclass owns the loop over the blocks, for
features, intermediates and logits; pooling knows sizes and padding; intermediates in NCHW are lifted to the full grid.
The cost of attention is linear in tokens, so that reduction saves what it removes and nothing more; the convolutions of
the local patch interaction always run on the whole grid. No token looks at another one in attention: methods that read
such attention, or replace it, are refused by name, and so are attention masks.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.models.xcit import LPI, XCA, ClassAttentionBlock, XCABlock, Xcit
from torch import Tensor, nn

from ...core.recipe import Recipe
from ...core.tokens import Layout, Tokens
from ...ops.layer_macs import conv_macs
from ..backbone import Family
from ..late_class import LateClassModel, bypassed_class_blocks, class_attention, refuse_other_class_blocks
from .block import ReducingXCA, ReducingXCABlock, drop_path


class ReducingXcit(LateClassModel, Xcit):
    """`Xcit` whose blocks reduce tokens."""

    class_blocks = "cls_attn_blocks"
    takes_added = False
    takes_gates = False

    # ---- the grid, which the convolutions in front of block 0 halve until a patch is a place

    def grid_of(self, size: tuple[int, int]) -> tuple[int, int]:
        high, wide = size
        for _ in range(_halvings(self.patch_embed)):
            high, wide = (high + 1) // 2, (wide + 1) // 2
        return high, wide

    @property
    def own_grid(self) -> tuple[int, int]:
        return self.grid_of(self.patch_embed.img_size)

    def embed_macs(self, grid: tuple[int, int]) -> int:
        convs = [macs for part in self.patch_embed.proj if (macs := conv_macs(part))]
        places = [4 ** (len(convs) - 1 - i) for i in range(len(convs))]
        total = sum(macs * count for macs, count in zip(convs, places))
        total += 0 if self.pos_embed is None else conv_macs(self.pos_embed.token_projection)
        return total * grid[0] * grid[1]

    # ---- the pass

    def sequences(self, grid: tuple[int, int], recipe: Recipe | None) -> dict[int, Layout]:
        return {0: super().sequences(grid, recipe)[0]._replace(keep_values=True)}

    def start(self, x: Tensor, mask: Tensor | None, trace: bool, dense: bool) -> tuple[Tokens, Any]:
        if mask is not None:
            raise ValueError(
                f"{type(self).__name__} attends among channels: an attn_mask, which says what tokens see of each "
                "other, has no place in it; call the model without one"
            )
        return super().start(x, None, trace=True, dense=True)  # the convolutions in every block go back to the grid

    def embed(self, x: Tensor) -> tuple[Tensor, None]:
        x, (high, wide) = self.patch_embed(x)
        if self.pos_embed is not None:
            x = x + self.pos_embed(x.shape[0], high, wide).reshape(x.shape[0], -1, x.shape[1]).permute(0, 2, 1)
        return self.pos_drop(x), None

    def run_class_block(self, block: nn.Module, tokens: Tensor, bias: Tensor | None) -> Tensor:
        z = block.norm1(tokens)
        z = torch.cat([class_attention(block.attn, z, bias), z[:, 1:]], dim=1)
        tokens = tokens + drop_path(block, 1)(block.gamma1 * z)
        if block.tokens_norm:
            tokens = block.norm2(tokens)
        else:
            tokens = torch.cat([block.norm2(tokens[:, :1]), tokens[:, 1:]], dim=1)
        own = block.gamma2 * block.mlp(tokens[:, :1])
        return tokens + drop_path(block, 2)(torch.cat([own, tokens[:, 1:]], dim=1))

    def end_rows(self, rows: Tensor) -> Tensor:
        for block in self.cls_attn_blocks or ():  # what these do to patches, each by itself
            rows = rows + block.gamma1 * block.norm1(rows)
            rows = block.norm2(rows) if block.tokens_norm else rows
            rows = rows + rows
        return self.norm(rows)


def _halvings(embed: nn.Module) -> int:
    return round(math.log2(embed.patch_size))


def check(model: nn.Module) -> None:
    """Refuses settings of a model that reduction cannot serve.

    Raises:
        ValueError: class-attention blocks of other classes than timm's own.
    """
    refuse_other_class_blocks(model, ReducingXcit.class_blocks, ClassAttentionBlock)


def check_block(block: nn.Module) -> nn.Module | None:
    """A part of a block that is no exactly known class, None if all are."""
    return next((part for part, known in ((block.attn, XCA), (block.local_mp, LPI)) if type(part) is not known), None)


def check_recipe(model: nn.Module, recipe: Recipe) -> None:
    """Refuses recipes that the model cannot follow.

    Raises:
        ValueError: methods that read attention between tokens, or replace it; images of half the size.
    """
    name = type(model).__name__
    for method in recipe.methods:
        if method.reads_maps or method.replaces_attention:
            verb = "reads" if method.reads_maps else "replaces"
            raise ValueError(
                f"{method.name} {verb} attention between tokens, and {name} attends among channels; use a method that "
                "compares keys, values or places (tome, pitome, dpcknn, pool, ...)"
            )
        if method.place == "embed":
            raise ValueError(
                f"{method.name} embeds images at half the size, which the convolutions in front of {name} cannot do; "
                "use a model whose patches are one convolution"
            )


def bypassed(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """Modules that are never called as a whole, and what to do instead."""
    return bypassed_class_blocks(model, ReducingXcit.class_blocks)


FAMILY = Family(
    name="xcit",
    summary="timm xcit.py: XCiT, whose attention among channels is linear in tokens; its class-attention blocks stay",
    tried="timm 1.0.19 to 1.0.31",
    models={Xcit: ReducingXcit},
    blocks={XCABlock: ReducingXCABlock},
    attentions={XCA: ReducingXCA},
    check=check,
    check_block=check_block,
    check_recipe=check_recipe,
    bypassed=bypassed,
)
