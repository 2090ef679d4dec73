"""timm's gemma4_vit.py: the vision towers of Gemma 4, and classifiers around them.

Read from timm 1.0.31. Differences from upstream: as in tower.py. Queries, keys and values are normed, then queries and
keys rotated by rows gathered for the tokens that are left; the pooler of soft tokens gets all patches in their places.
Batches of patches (`patch_coord`) are refused.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from timm.models.gemma4_vit import Gemma4Attention, Gemma4Block, Gemma4VitClassifier, Gemma4VitEncoder
from torch import Tensor, nn

from ...core.method import BlockShape
from ...core.recipe import Recipe
from ...ops.attention import Heads
from ...ops.layer_macs import linear_macs
from ...ops.rows import split_dim
from ..attending import AttentionLayer
from ..backbone import Family
from ..block import BlockMacs
from ..eva.model import RotaryBlock
from ..eva.rope import Rope, waves_of
from ..hooked import Aside
from .tower import Classifier, Encoder, Tower, bypassed


def _rotate(x: Tensor, rows: Tensor | None) -> Tensor:
    """Rotates x [B, H, N, D] by rows [..., N, 2D] of sines and cosines, each half of the channels for one axis."""
    if rows is None:
        return x
    sin, cos = rows.chunk(2, dim=-1)
    first, second = split_dim(x, -1, 2, 2, -1).unbind(-2)
    turned = torch.stack([-second, first], dim=-2).flatten(-3)
    return (x * cos + turned * sin).to(x.dtype)


class ReducingGemma4Attention(AttentionLayer, Gemma4Attention):
    """`Gemma4Attention` inside a block that reduces tokens."""

    def _heads(self, layer: nn.Module, norm: nn.Module, z: Tensor) -> Tensor:
        return norm(split_dim(layer(z), 2, -1, self.head_dim)).transpose(1, 2)

    def _shared(self, x: Tensor) -> Tensor:
        return x if self.num_kv_groups == 1 else x.repeat_interleave(self.num_kv_groups, dim=1)

    def project(self, z: Tensor, rows: Tensor | None, with_values: bool = True) -> Heads:
        q = _rotate(self._heads(self.q_proj, self.q_norm, z), rows)
        k = self._shared(_rotate(self._heads(self.k_proj, self.k_norm, z), rows))
        v = self.project_values(z) if with_values else None
        dropout = self.attn_drop.p if self.training else 0.0
        return Heads(q, k, v, 1.0, fused=self.fused_attn, dropout=dropout, drop=self.attn_drop)

    def project_values(self, z: Tensor) -> Tensor:
        return self._shared(self._heads(self.v_proj, self.v_norm, z))

    def output(self, out: Tensor, z: Tensor | None) -> Tensor:
        return self.proj_drop(self.o_proj(out))


class ReducingGemma4Block(RotaryBlock, Gemma4Block):
    """Block with norms in front of both branches and behind them."""

    def attention_input(self, x: Tensor) -> Tensor:
        return self.norm1(x)

    def attention_branch(self, outs: list[Tensor]) -> Tensor:
        return self.drop_path(self.norm2(outs[0]))

    def mlp_input(self, x: Tensor) -> Tensor:
        return self.norm3(x)

    def mlp_branch(self, z: Tensor) -> Tensor:
        return self.drop_path(self.norm4(self.mlp(z)))

    def shape(self) -> BlockShape:
        width = self.attn.num_heads * self.attn.head_dim
        return BlockShape(linear_macs(self.attn.o_proj) // width, self.attn.num_heads, self.attn.head_dim)

    def macs(self) -> BlockMacs:
        attn = self.attn
        q, k, v, out = (linear_macs(layer) for layer in (attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj))
        return BlockMacs(q + k, v, 2 * attn.num_heads * attn.head_dim, out, linear_macs(self.mlp))

    def forward(
        self,
        x: Any,
        rope_cos: Tensor | None = None,
        rope_sin: Tensor | None = None,
        attn_mask: Tensor | None = None,
        rope: Rope | None = None,
        is_causal: bool = False,
        aside: Aside | None = None,
    ) -> Any:
        if rope_cos is not None:  # called by hand, with timm's own tables of every image [B, N, D]
            table = torch.cat([rope_sin, rope_cos], dim=-1).unsqueeze(1)
            rope = Rope.of(table, self.tokenzoo.layout.num_prefix)
        return super().forward(x, rope, attn_mask, is_causal, aside)


class _Gemma4(Tower):
    maps = False
    reads_positions = True

    @property
    def projector(self) -> nn.Module | None:
        return self.tower.pooler if self.tower.global_pool == "soft" else None

    @property
    def final_norm(self) -> nn.Module:
        """There is none behind the blocks."""
        return nn.Identity()

    @property
    def pooling(self) -> str:
        return "avg" if self.global_pool == "avg" and self.projector is None else ""

    @property
    def own_grid(self) -> tuple[int, int]:
        """Patches of the image size in the model's configuration, of 768 pixels without one: any size is taken."""
        return self.grid_of((getattr(self, "default_cfg", None) or {}).get("input_size", (3, 768, 768))[1:])

    def grid_of(self, size: tuple[int, int]) -> tuple[int, int]:
        return tuple(side // patch for side, patch in zip(size, self.tower.patch_size))

    def embed(self, x: Tensor) -> tuple[Tensor, Any]:
        self._refuse_patches(x, None)
        self.tower._assert_raw_img_conformant(x)
        values, places, _ = self.tower.patch_embed(x)
        cos, sin = (part[0] for part in self.tower.rotary_emb(values, places[:1]))
        return values, Rope.of(torch.cat([sin, cos], dim=-1), self.num_protected)

    def cells(self, grid: tuple[int, int]) -> int:
        return grid[0] * grid[1] // self.tower.pooling_kernel_size**2

    def project(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        high, wide = grid
        index = torch.arange(high * wide, device=x.device)
        places = torch.stack([index % wide, index.div(wide, rounding_mode="floor")], dim=1).expand(x.shape[0], -1, -1)
        x, _ = self.tower.pooler(x, places, None)
        return x if self.tower.std_bias is None else (x - self.tower.std_bias) * self.tower.std_scale

    def projector_macs(self, grid: tuple[int, int]) -> int:
        return self.cells(grid) * grid[0] * grid[1] * self.embed_dim  # a product with one row per cell

    def embed_macs(self, grid: tuple[int, int]) -> int:
        """The projection, and positions looked up by a product with a row per place, as the source does it."""
        embed = self.tower.patch_embed
        places = 2 * embed.position_embedding_size * embed.embed_dim
        return (linear_macs(embed.input_proj) + places) * grid[0] * grid[1]

    def forward(self, x: Any, patch_coord: Any = None, patch_valid: Any = None, attn_mask: Any = None) -> Tensor:
        """As the unpatched model, of images [B, C, H, W]."""
        self._refuse_patches(x, patch_coord)
        return self.forward_head(self.forward_tokens(x, attn_mask))

    def forward_features(
        self, x: Any, patch_coord: Any = None, patch_valid: Any = None, attn_mask: Any = None
    ) -> Tensor:
        """Tokens after the last block; see `ReducingModel.forward_features`."""
        self._refuse_patches(x, patch_coord)
        return super().forward_features(x, attn_mask)

    def forward_intermediates(self, x: Any, patch_coord: Any = None, patch_valid: Any = None, **kwargs: Any) -> Any:
        """As for other models; the arguments behind `patch_valid` by name."""
        self._refuse_patches(x, patch_coord)
        return super().forward_intermediates(x, **kwargs)

    def _refuse_patches(self, x: Any, patch_coord: Any) -> NoReturn | None:
        if isinstance(x, dict) or x.dim() != 4 or patch_coord is not None:
            raise ValueError(
                f"{type(self).__name__}: a batch of packed patches, each with places and padding of its own, leaves no "
                "grid that methods and the pooler of soft tokens could share; give images [B, C, H, W], or use a "
                "NaFlexVit"
            )


class ReducingGemma4VitEncoder(_Gemma4, Encoder, Gemma4VitEncoder):
    """`Gemma4VitEncoder` whose blocks reduce tokens."""


class ReducingGemma4VitClassifier(_Gemma4, Classifier, Gemma4VitClassifier):
    """`Gemma4VitClassifier` whose blocks reduce tokens."""

    num_prefix_tokens = 0  # only the encoder says so itself


def check_recipe(model: nn.Module, recipe: Recipe) -> None:
    """Refuses recipes that these models cannot follow.

    Raises:
        ValueError: rotary tables would have to be rebuilt from mean coordinates; a method in front of block 0 needs
            images of half the size embedded.
    """
    tower = getattr(model, "encoder", model)
    for method in recipe.methods:
        if method.place == "embed":
            raise ValueError(
                f"{method.name} embeds images at half the size, which {type(tower.patch_embed).__name__} does not do; "
                "use a model with a patch embedding of its own"
            )
    if recipe.merged_positions == "mean":
        waves_of(tower.rotary_emb, (1, 1))


FAMILY = Family(
    name="gemma4_vit",
    summary="timm gemma4_vit.py: Gemma 4 towers, with and without their pooler of soft tokens, on images",
    tried="timm 1.0.31",
    models={Gemma4VitEncoder: ReducingGemma4VitEncoder, Gemma4VitClassifier: ReducingGemma4VitClassifier},
    blocks={Gemma4Block: ReducingGemma4Block},
    attentions={Gemma4Attention: ReducingGemma4Attention},
    check_recipe=check_recipe,
    bypassed=bypassed,
)
