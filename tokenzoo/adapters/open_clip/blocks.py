"""open_clip's blocks and the attention inside of them: torch's `nn.MultiheadAttention`, or open_clip's own `Attention`.

Read from open_clip 2.27 to 3.3; blocks with norms inside of attention from 3.0 on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from open_clip.transformer import Attention, CustomResidualAttentionBlock, ResidualAttentionBlock
from torch import Tensor, nn

from ...core.method import BlockShape
from ...ops.attention import Heads
from ...ops.layer_macs import unwrapped
from ...ops.rows import split_dim
from ..attending import AttentionLayer
from ..block import ReducingBlock
from ..hooked import Aside
from ..multihead import REDUCING_MULTIHEAD, call_multihead, check_multihead, multihead_shape, projected


class ReducingOpenClipAttention(AttentionLayer, Attention):
    """open_clip's own attention, of blocks with norms inside."""

    @property
    def fused_attn(self) -> bool:
        return self.use_fsdpa

    def project(self, z: Tensor, rows: Tensor | None, with_values: bool = True) -> Heads:
        q, k, v = (*projected(self, z, 0, 3 if with_values else 2), None)[:3]
        dropout = self.attn_drop.p if self.training else 0.0
        return Heads(self.ln_q(q), self.ln_k(k), v, self.scale, None, self.fused_attn, dropout, self.attn_drop)

    def project_values(self, z: Tensor) -> Tensor:
        return projected(self, z, 2, 3)[0]

    def output(self, out: Tensor, z: Tensor | None) -> Tensor:
        if self.head_scale is not None:
            out = (split_dim(out, 2, self.num_heads, -1) * self.head_scale.squeeze(2)).flatten(2)
        return self.out_drop(self.out_proj(self.ln_inner(out)))


class _OpenClipBlock(ReducingBlock):
    """What both kinds of block share."""

    def attention_input(self, x: Tensor) -> Tensor:
        return self.ln_1(x)

    def mlp_input(self, x: Tensor) -> Tensor:
        return self.ln_2(x)

    def mlp_branch(self, z: Tensor) -> Tensor:
        return self.ls_2(self.mlp(z))


class ReducingResidualAttentionBlock(_OpenClipBlock, ResidualAttentionBlock):
    """Pre-norm block with torch's attention."""

    def call_layer(self, layer: nn.Module, z: Tensor, attend: Callable[..., Tensor]) -> Tensor:
        return call_multihead(layer, z, attend)

    def attention_branch(self, outs: list[Tensor]) -> Tensor:
        return self.ls_1(outs[0])

    def shape(self) -> BlockShape:
        return multihead_shape(self.attn)

    def forward(
        self,
        q_x: Any,
        k_x: Tensor | None = None,
        v_x: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        rope: Any = None,
        aside: Aside | None = None,
    ) -> Any:
        """Tokens to tokens; the first four arguments are open_clip's.

        Raises:
            ValueError: keys or values of another sequence.
        """
        if k_x is not None or v_x is not None:
            raise ValueError("k_x, v_x: a block that reduces tokens attends to its own ones only; unpatch the model")
        return self.call(q_x, rope, attn_mask, is_causal, aside)


class ReducingCustomResidualAttentionBlock(_OpenClipBlock, CustomResidualAttentionBlock):
    """Block with norms of queries, keys, heads, attention or MLP."""

    def attention_branch(self, outs: list[Tensor]) -> Tensor:
        return self.ls_1(self.ln_attn(outs[0]))

    def shape(self) -> BlockShape:
        attn = unwrapped(self.attn)
        return BlockShape(attn.num_heads * attn.head_dim, attn.num_heads, attn.head_dim)


def check_block(block: nn.Module) -> nn.Module | None:
    """An attention layer that is not exactly known, None for one that is; adapters around it are looked through."""
    layer = unwrapped(block.attn)
    if type(layer) is Attention:
        if layer.logit_scale is not None or not hasattr(layer, "ln_q"):
            raise ValueError(
                "attn: tokens are not reduced in blocks with scaled cosine attention, nor in custom blocks of "
                "open_clip before 3.0; create the model without scaled_cosine_attn, with a newer open_clip"
            )
        return None
    if type(layer) is not nn.MultiheadAttention:
        return layer
    if hasattr(block, "ln_1_kv"):
        raise ValueError("a block made with is_cross_attention=True attends to another sequence; reduce that one")
    check_multihead(layer, "attn")
    return None


BLOCKS: dict[type, type] = {
    ResidualAttentionBlock: ReducingResidualAttentionBlock,
    CustomResidualAttentionBlock: ReducingCustomResidualAttentionBlock,
}
ATTENTIONS: dict[type, type] = {**REDUCING_MULTIHEAD, Attention: ReducingOpenClipAttention}
