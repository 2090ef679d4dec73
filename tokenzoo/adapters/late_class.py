"""Models whose class token enters behind the blocks that methods act in, through class attention.

Blocks see patches alone, so methods that read the attention of a class token use what patches receive from each other,
as in any model without one. The class-attention blocks stay as they are and run on the patches that are left: with
proportional attention they add log sizes, padding and hidden patches are no keys. Behind them the class token stands in
front, as in a ViT.
"""

from __future__ import annotations

from timm.models.cait import ClassAttn
from torch import Tensor, nn

from ..core.joining import fronted_layout, join_front
from ..core.recipe import Recipe
from ..core.tokens import Layout, Tokens
from ..ops.attention import Heads, attend, key_bias
from ..ops.layer_macs import linear_macs, linear_shapes
from .classes import path_of
from .flow import Flow
from .model import ReducingModel
from .vit.attention import split_heads
from .walk import Beside


class LateClassModel(ReducingModel):
    """Mixin of such models; a family says where the class-attention blocks are and how they run."""

    num_prefix_tokens = 1  # behind the blocks; older releases of timm lack the attribute
    class_blocks: str  # attribute with the class-attention blocks; None there once they are taken off with the head

    def run_class_block(self, block: nn.Module, tokens: Tensor, bias: Tensor | None) -> Tensor:
        """A class-attention block on [B, 1 + N, C], the class token in front.

        Args:
            block: the block.
            tokens: values.
            bias: of the keys [B, 1, 1, 1 + N], None for none.
        """
        raise NotImplementedError

    def class_block_macs(self, block: nn.Module, n: int) -> int:
        """Multiply-adds of a class-attention block that reads n tokens, the class token included."""
        return class_attention_macs(block.attn, n) + linear_macs(block.mlp)

    def sequences(self, grid: tuple[int, int], recipe: Recipe | None) -> dict[int, Layout]:
        (layout,) = super().sequences(grid, recipe).values()
        return {0: layout._replace(num_prefix=layout.added, has_class=False)}

    def head_layout(self, layout: Layout) -> Layout:
        return layout if getattr(self, self.class_blocks) is None else fronted_layout(layout, 1, True)

    def behind_blocks(self, tokens: Tokens) -> Tokens:
        blocks = getattr(self, self.class_blocks)
        if blocks is None:
            return tokens
        tokens = join_front(tokens, self.cls_token.expand(tokens.x.shape[0], -1, -1), has_class=True)
        bias = self._class_bias(tokens)
        for block in blocks:
            tokens = tokens._replace(x=self.run_class_block(block, tokens.x, bias))
        return tokens

    def _class_bias(self, tokens: Tokens) -> Tensor | None:
        size = tokens.size if self.tokenzoo_recipe.proportional else None
        seen = tokens.valid if tokens.visible is None else tokens.visible
        if tokens.gate is not None and seen is not None:
            seen = seen | tokens.gate.closed  # these are not hidden, their gates say what they count
        bias = key_bias(size, seen)
        return bias if tokens.gate is None else tokens.gate.bias(bias)

    def beside(self, index: int, flow: Flow) -> list[Beside]:
        blocks = getattr(self, self.class_blocks)
        if index + 1 < len(self.served_blocks) or blocks is None:
            return []
        n, rows = flow.left, []
        for order, block in enumerate(blocks):
            macs = self.class_block_macs(block, flow.left + 1)
            rows.append(Beside(f"{self.class_blocks}.{order}", n, flow.left + 1, macs))
            n = flow.left + 1
        # older releases of timm take the blocks off with the head, and leave the class token in front
        return rows or [Beside(self.class_blocks, n, n + 1, 0)]

    def forward_head(self, x: Tensor | Tokens, pre_logits: bool = False) -> Tensor:
        """Pooling and classifier.

        Args:
            x: what `forward_tokens` or `forward_features` returned.
            pre_logits: stop in front of the classifier.
        """
        x = self.head_drop(self.pool(x))
        return x if pre_logits else self.head(x)


def class_attention(attn: nn.Module, z: Tensor, bias: Tensor | None) -> Tensor:
    """timm's `ClassAttn` with a bias of the keys: what the class token reads [B, 1, C].

    Args:
        attn: the layer.
        z: normed values of the class token and the patches [B, 1 + N, C].
        bias: of the keys [B, 1, 1, 1 + N], None for none.
    """
    rows = attn.q(z[:, 0]).unsqueeze(1), attn.k(z), attn.v(z)
    q, k, v = (split_heads(part, _width(attn) // attn.num_heads) for part in rows)
    dropout = attn.attn_drop.p if attn.training else 0.0
    heads = Heads(q, k, v, attn.scale, fused=attn.fused_attn, dropout=dropout, drop=attn.attn_drop)
    return attn.proj_drop(attn.proj(attend(heads, bias)))


def class_attention_macs(attn: nn.Module, n: int) -> int:
    """Multiply-adds of class attention that reads n tokens, the class token included."""
    once = linear_macs(attn.q) + linear_macs(attn.proj)
    return once + n * (linear_macs(attn.k) + linear_macs(attn.v) + 2 * _width(attn))


def _width(attn: nn.Module) -> int:
    """Channels of all heads together."""
    return next(inputs for _, inputs, _ in linear_shapes(attn.proj))


def refuse_other_class_blocks(model: nn.Module, name: str, known: type, attention: type = ClassAttn) -> None:
    """Refuses class-attention blocks of other classes than timm's own.

    Args:
        model: the model.
        name: attribute with the blocks.
        known: their exact class.
        attention: that of their attention layers.

    Raises:
        ValueError: with the block.
    """
    for index, block in enumerate(getattr(model, name) or ()):
        for part, where, cls in ((block, "", known), (block.attn, ".attn", attention)):
            if type(part) is not cls:
                raise ValueError(
                    f"{name}.{index}{where} is {path_of(type(part))}, and sizes and padding of tokens can be told to "
                    f"{path_of(cls)} alone; build the model with that class"
                )


def bypassed_class_blocks(model: nn.Module, name: str) -> list[tuple[str, nn.Module, str]]:
    """Class-attention blocks are never called as a whole; what to do instead."""
    found = []
    for index, block in enumerate(getattr(model, name) or ()):
        found.append((f"{name}.{index}", block, "hook its parts (norm1, attn.proj, norm2, mlp)"))
        found.append((f"{name}.{index}.attn", block.attn, "hook its parts (q, k, v, proj)"))
    return found
