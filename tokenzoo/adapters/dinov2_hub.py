"""The classes of facebookresearch/dinov2 that `torch.hub.load("facebookresearch/dinov2", ...)` gives.

That package is in no index, so this was written from its public interface and never ran beside it; the tests hold it
against a stand-in. Patching therefore sends two random tokens through every block, and refuses a model where its parts,
as they are spelled here, do not add up to the block. Differences from upstream: attention runs through
`scaled_dot_product_attention` (xFormers is not asked for); `get_intermediate_layers` gives all patches, each reading
the token it went into; `forward_features` gives the patches that are left, all of them with `dense=True` in the recipe.
Lists of crops, masks and chunked blocks, which only pre-training uses, are refused.
"""

from __future__ import annotations

from typing import Any

import torch
from dinov2.layers.attention import Attention, MemEffAttention
from dinov2.layers.block import Block, NestedTensorBlock
from dinov2.models.vision_transformer import DinoVisionTransformer
from torch import Tensor, nn

from ..core.lift import lift
from ..core.method import BlockShape
from ..core.tokens import Layout, Tokens
from ..ops.attention import Heads, attend
from ..ops.layer_macs import conv_macs, linear_macs
from ..ops.projections import linear_part
from ..ops.rows import split_dim
from .attending import AttentionLayer
from .backbone import Family
from .block import ReducingBlock
from .features import Reads, encode
from .halving import half_tokens
from .model import ReducingModel
from .registry import register_family


class _Layer(AttentionLayer):
    """Both attention classes: the second only asks for another kernel."""

    def project(self, z: Tensor, rows: Tensor | None, with_values: bool = True) -> Heads:
        width = z.shape[2]
        parts = linear_part(self.qkv, z, 0, (3 if with_values else 2) * width).split(width, dim=2)
        q, k, *v = (split_dim(part, 2, self.num_heads, -1).transpose(1, 2) for part in parts)
        drop = self.attn_drop  # a module, or in newer versions the probability itself
        dropout = 0.0 if not self.training else drop.p if isinstance(drop, nn.Module) else float(drop)
        return Heads(q, k, v[0] if v else None, self.scale, dropout=dropout)

    def project_values(self, z: Tensor) -> Tensor:
        width = z.shape[2]
        part = linear_part(self.qkv, z, 2 * width, 3 * width)
        return split_dim(part, 2, self.num_heads, -1).transpose(1, 2)

    def output(self, out: Tensor, z: Tensor | None) -> Tensor:
        return self.proj_drop(self.proj(out))


class ReducingHubAttention(_Layer, Attention):
    """`Attention` inside a block that reduces tokens."""


class ReducingMemEffAttention(_Layer, MemEffAttention):
    """`MemEffAttention` inside a block that reduces tokens."""


class _HubBlock(ReducingBlock):
    """Pre-norm block with layer scale; `NestedTensorBlock` takes lists of crops besides."""

    def attention_input(self, x: Tensor) -> Tensor:
        return self.norm1(x)

    def attention_branch(self, outs: list[Tensor]) -> Tensor:
        return self.drop_path1(self.ls1(outs[0]))

    def mlp_input(self, x: Tensor) -> Tensor:
        return self.norm2(x)

    def mlp_branch(self, z: Tensor) -> Tensor:
        return self.drop_path2(self.ls2(self.mlp(z)))

    def shape(self) -> BlockShape:
        width = self.attn.qkv.in_features
        return BlockShape(width, self.attn.num_heads, width // self.attn.num_heads)


class ReducingHubBlock(_HubBlock, Block):
    """`Block` that reduces tokens."""


class ReducingNestedTensorBlock(_HubBlock, NestedTensorBlock):
    """`NestedTensorBlock` that reduces tokens."""


class ReducingDinoVisionTransformer(ReducingModel, DinoVisionTransformer):
    """`DinoVisionTransformer` whose blocks reduce tokens."""

    has_class = True

    @property
    def num_prefix_tokens(self) -> int:
        return 1 + self.num_register_tokens

    def grid_of(self, size: tuple[int, int]) -> tuple[int, int]:
        return tuple(side // step for side, step in zip(size, self.patch_embed.patch_size))

    @property
    def own_grid(self) -> tuple[int, int]:
        return tuple(self.patch_embed.patches_resolution)

    def embed(self, x: Tensor) -> tuple[Tensor, Any]:
        return self.prepare_tokens_with_masks(x), None

    def embed_half(self, images: Tensor) -> Tensor:
        grid = self.grid_of(images.shape[-2:])
        empty = images.new_zeros(1, 1 + grid[0] * grid[1], self.embed_dim)
        places = self.interpolate_pos_encoding(empty, *images.shape[-2:])[:, 1:]
        return half_tokens(self, images, self.patch_embed.proj, places, grid, self.patch_embed.norm)

    def forward(self, x: Tensor, *, is_training: bool = False, masks: None = None) -> Any:
        """The class token through `head`, or with `is_training` what `forward_features` gives."""
        features = self.forward_features(x, masks)
        return features if is_training else self.head(features["x_norm_clstoken"])

    def forward_features(self, x: Tensor, masks: None = None) -> dict[str, Any]:
        """Tokens behind and in front of the final norm, under upstream's names; the mean of the patches is pooling's.

        Args:
            x: images [B, C, H, W].
            masks: refused: patches that are masked are what pre-training predicts.

        Raises:
            ValueError: masks, or a list of crops.
        """
        if masks is not None or not isinstance(x, Tensor):
            raise ValueError(
                f"{type(self).__name__}: masks and lists of crops belong to pre-training, which needs every patch; "
                "give images [B, C, H, W], or unpatch the model"
            )
        recipe, reads = self.tokenzoo_recipe, Reads(mean=True)  # upstream's classifiers take the mean of the patches
        for tokens in self.walk(x, trace=reads.weighs(recipe), dense=recipe.dense):  # noqa: B007 (the last one)
            pass
        before, after = tokens.x, self._finish(tokens)
        if recipe.dense:
            before = lift(before, recipe.lift_trace(tokens.trace), recipe.fill, lambda rows: rows)
        after = self.lift_features(after) if recipe.dense else encode(after, reads, recipe)
        first = self.num_protected
        return {
            "x_norm_clstoken": after[:, 0],
            "x_norm_regtokens": after[:, 1:first],
            "x_norm_patchtokens": after[:, first:],
            "x_prenorm": before,
            "masks": None,
        }

    def forward_head(self, x: Tensor | Tokens) -> Tensor:
        """The class token through `head`, of tokens from `forward_tokens`."""
        return self.head(self.pool(x))

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | list[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple[Any, ...]:
        """upstream's `get_intermediate_layers`, of all patches.

        Args:
            x: images [B, C, H, W].
            n: last n blocks, or the blocks named.
            reshape: maps [B, C, H, W] instead of tokens [B, N, C].
            return_class_token: pairs of patches and class token.
            norm: apply the final norm.
        """
        n = n if isinstance(n, int) else list(n)
        found = self.forward_intermediates(x, n, return_prefix_tokens=True, norm=norm, intermediates_only=True)
        maps = [y if reshape else y.flatten(2).transpose(1, 2) for y, _ in found]
        return tuple(zip(maps, (prefix[:, 0] for _, prefix in found))) if return_class_token else tuple(maps)

    def embed_macs(self, grid: tuple[int, int]) -> int:
        return conv_macs(self.patch_embed.proj) * grid[0] * grid[1]

    def head_macs(self, n: int, layout: Layout) -> int:
        return linear_macs(self.head)


def check(model: nn.Module) -> None:
    """Refuses settings of a model that reduction cannot serve.

    Raises:
        ValueError: blocks stand in chunks, as for training in shards.
    """
    if getattr(model, "chunked_blocks", False):
        raise ValueError(
            f"{type(model).__name__}.blocks stand in chunks, as for training in shards; create the model with "
            "block_chunks=0, as the hub does"
        )


@torch.no_grad()
def check_block(block: nn.Module) -> nn.Module | None:
    """An attention layer that is not exactly known; else the block has to be the sum of its parts, as spelled here.

    Raises:
        ValueError: it is not, as the installed version has it.
    """
    if type(block.attn) not in (Attention, MemEffAttention):
        return block.attn
    weight, training = block.attn.qkv.weight, [(module, module.training) for module in block.modules()]
    if weight.is_meta:
        return None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, block.attn.qkv.in_features, generator=generator).to(weight.device, weight.dtype)
    block.eval()  # the parts of a block in training may be left out by chance
    try:
        whole = block(x)
    finally:
        for module, was in training:
            module.training = was
    z = block.norm1(x)
    heads = _Layer.project(block.attn, z, None)._replace(dropout=0.0)
    parts = x + block.ls1(block.attn.proj(attend(heads)))
    parts = parts + block.ls2(block.mlp(block.norm2(parts)))
    bound = 1e-4 if weight.dtype == torch.float32 else 5e-2
    if not torch.allclose(whole, parts, rtol=bound, atol=bound * float(whole.abs().max())):
        raise ValueError(
            f"{type(block).__name__} of the installed dinov2 is not the sum of the parts that tokenzoo knows; use "
            "timm's vit_small_patch14_dinov2 or transformers' Dinov2Model with the same weights"
        )
    return None


FAMILY = register_family(
    Family(
        name="dinov2_hub",
        summary="facebookresearch/dinov2: the classes that torch.hub gives, with and without registers",
        models={DinoVisionTransformer: ReducingDinoVisionTransformer},
        blocks={Block: ReducingHubBlock, NestedTensorBlock: ReducingNestedTensorBlock},
        attentions={Attention: ReducingHubAttention, MemEffAttention: ReducingMemEffAttention},
        check=check,
        check_block=check_block,
        bypassed=lambda model: [("blocks", model.blocks, "hook the blocks one by one (model.blocks[i])")],
    )
)
