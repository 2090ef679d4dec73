"""How the branches of CrossViT tell each other: each class token reads the patches of the other branch that are left.

Read from timm 1.0.19 to 1.0.31. Differences from upstream: with proportional attention the logits get log sizes of
the tokens that are read, and padding is no key. As upstream, cross-attention blocks behind the first one see nothing
but the class token.
"""

from __future__ import annotations

import torch
from timm.models.crossvit import CrossAttention, CrossAttentionBlock, MultiScaleBlock
from torch import Tensor, nn

from ...core.recipe import Recipe
from ...core.tokens import Tokens
from ...ops.attention import Heads, attend, key_bias
from ...ops.layer_macs import linear_macs, linear_shapes
from ..classes import path_of
from ..vit.attention import split_heads


def fusion_blocks(fusion: nn.Module) -> tuple[nn.Module, ...]:
    """The cross-attention blocks of one branch."""
    return tuple(fusion) if isinstance(fusion, nn.Sequential) else (fusion,)


def exchanged(scale: nn.Module, branches: list[Tokens], recipe: Recipe) -> list[Tokens]:
    """The tokens of all branches with their class tokens behind the exchange.

    Args:
        scale: timm's `MultiScaleBlock`.
        branches: tokens of every branch, one class token in front.
        recipe: says whether sizes weigh.
    """
    asking = [scale.projs[index](tokens.x[:, :1]) for index, tokens in enumerate(branches)]
    found = []
    for index, tokens in enumerate(branches):
        other = branches[(index + 1) % len(branches)]
        rows = torch.cat([asking[index], other.x[:, 1:]], dim=1)
        bias = key_bias(other.size if recipe.proportional else None, other.valid)
        for block in fusion_blocks(scale.fusion[index]):
            rows = rows[:, :1] + block.drop_path(_cross_attention(block.attn, block.norm1(rows), bias))
            bias = None
        own = scale.revert_projs[index](rows)
        found.append(tokens._replace(x=torch.cat([own, tokens.x[:, 1:]], dim=1)))
    return found


def _cross_attention(attn: nn.Module, z: Tensor, bias: Tensor | None) -> Tensor:
    """What the first token reads of all [B, 1, C].

    Args:
        attn: the layer.
        z: normed values [B, N, C].
        bias: of the keys [B, 1, 1, N], None for none.
    """
    rows = attn.wq(z[:, :1]), attn.wk(z), attn.wv(z)
    q, k, v = (split_heads(part, _width(attn) // attn.num_heads) for part in rows)
    out = attend(Heads(q, k, v, attn.scale, fused=False, drop=attn.attn_drop), bias)
    return attn.proj_drop(attn.proj(out))


def _width(attn: nn.Module) -> int:
    """Channels of all heads together."""
    return next(inputs for _, inputs, _ in linear_shapes(attn.proj))


def exchange_macs(scale: nn.Module, index: int, n: int) -> int:
    """Multiply-adds of what one branch asks, the projections of its class token included.

    Args:
        scale: timm's `MultiScaleBlock`.
        index: the branch that asks.
        n: tokens of the branch that is read, a class token included.
    """
    total = linear_macs(scale.projs[index]) + linear_macs(scale.revert_projs[index])
    for block in fusion_blocks(scale.fusion[index]):
        attn = block.attn
        total += linear_macs(attn.wq) + linear_macs(attn.proj)
        total += n * (linear_macs(attn.wk) + linear_macs(attn.wv) + 2 * _width(attn))
        n = 1
    return total


def refuse_other_parts(model: nn.Module) -> None:
    """Refuses parts of the exchange that are no exactly known class.

    Raises:
        ValueError: with the part.
    """
    for order, scale in enumerate(model.blocks):
        known = [("", scale, MultiScaleBlock)]
        for index, fusion in enumerate(scale.fusion if type(scale) is MultiScaleBlock else ()):
            for name, block in fusion_names(f".fusion.{index}", fusion):
                known += [(name, block, CrossAttentionBlock), (f"{name}.attn", block.attn, CrossAttention)]
        for name, part, cls in known:
            if type(part) is not cls:
                raise ValueError(
                    f"blocks.{order}{name} is {path_of(type(part))}, and sizes and padding of tokens can be told to "
                    f"{path_of(cls)} alone; build the model with that class"
                )


def fusion_names(name: str, fusion: nn.Module) -> list[tuple[str, nn.Module]]:
    """The cross-attention blocks of one branch, with their names."""
    several = isinstance(fusion, nn.Sequential)
    return [(f"{name}.{i}" if several else name, block) for i, block in enumerate(fusion_blocks(fusion))]
