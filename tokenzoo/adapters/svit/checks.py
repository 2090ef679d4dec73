"""What cannot be served of an SViT."""

from __future__ import annotations

from torch import nn

from ...core.recipe import Recipe
from ...layers.super_token import MapAttention, SuperTokenAttention
from ...models.svit.blocks import ChannelNorm, ConvFfn, ResidualDepthwise
from ..staged import refuse_across_stages
from .layouts import stage_layouts


def check(model: nn.Module) -> None:
    """Refuses settings of a model that reduction cannot serve.

    Raises:
        ValueError: no stage attends among all tokens (stoken_size 1).
    """
    if not any(stage.is_plain for stage in model.layers):
        raise ValueError(
            f"{type(model).__name__} attends among super tokens in every stage; methods need stages with stoken_size 1"
        )


def check_block(block: nn.Module) -> nn.Module | None:
    """A part of a block that is no exactly known class, None if all are."""
    attn = block.attn
    parts = [(attn, SuperTokenAttention), (block.mlp2, ConvFfn), (block.pos_embed, ResidualDepthwise)]
    if type(attn) is SuperTokenAttention:
        parts.append((attn.stoken_refine, MapAttention))
    return next((part for part, known in [*parts, (block.norm1, ChannelNorm)] if type(part) is not known), None)


def bypassed(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """Modules that are never called as a whole, and what to do instead."""
    found = []
    for index, stage in enumerate(model.layers):
        if stage.is_plain:
            found.append((f"layers.{index}", stage, "hook its blocks one by one (model.blocks[i]) or its downsample"))
    for index, block in enumerate(model.blocks):
        for name, parts in _PARTS.items():
            found.append((f"blocks.{index}.{name}", block.get_submodule(name), f"hook its parts ({parts})"))
    return found


# modules of a block that go apart once tokens are no grid any more, and what is called instead
_PARTS = {
    "pos_embed": "pos_embed.conv",
    "norm1": "norm1.norm",
    "mlp2": "mlp2.fc1, mlp2.conv.conv, mlp2.fc2",
    "mlp2.conv": "mlp2.conv.conv",
}


def check_recipe(model: nn.Module, recipe: Recipe) -> None:
    """Refuses recipes that this model cannot follow.

    Raises:
        ValueError: a method in front of block 0 needs images of half the size embedded, which the stem cannot do; one
            rebuilds at a block of another stage than it was reduced in.
    """
    firsts = sorted(stage_layouts(model, (1, 1), recipe))
    refuse_across_stages(type(model).__name__, len(model.blocks), recipe, firsts, "stem of four convolutions")
