"""timm's naflexvit.py: SigLIP 2 NaFlex, RADIO and ViTs for images of any size.

Read from timm 1.0.19 to 1.0.31. Differences from upstream: as in vit/model.py and eva/model.py. Batches of patches
(`patches`, `patch_coord`, `patch_valid`) are served with padding as `Tokens.valid`: padding is no key, is chosen by no
method, is not pooled, and comes out as zeros, where timm gives what it computed for it. Where the images of such a
batch have grids of their own, methods that look at places on a grid refuse it by name, and intermediates are carried
back to all patches, in their order. A mask of the user's comes on top of `patch_valid`, where timm lets it replace it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.models.eva import EvaBlock
from timm.models.naflexvit import NaFlexVit
from torch import Tensor, nn

from ...core.recipe import Recipe
from ...core.tokens import Layout, Tokens
from ...ops.layer_macs import conv_macs, linear_macs
from ..backbone import Family
from ..eva.attention import REDUCING_ATTENTIONS as ROTARY
from ..eva.model import ReducingEvaBlock, RotaryModel
from ..eva.rope import Rope, check_rebuild, waves_of
from ..masks import four_dims, refuse_uneven, visible_tokens
from ..vit.attention import REDUCING_ATTENTIONS as PLAIN
from ..vit.model import BLOCKS, VitModel
from ..vit.model import bypassed as bypassed_by_vit
from .packed import Packed


class ReducingNaFlexVit(RotaryModel, VitModel, NaFlexVit):
    """`NaFlexVit` whose blocks reduce tokens."""

    @property
    def has_class(self) -> bool:
        return self.has_class_token

    @property
    def patch_embed(self) -> nn.Module:
        """What cuts images into patches, under the name that other ViTs have for it."""
        return self.embeds

    @property
    def own_grid(self) -> tuple[int, int]:
        """Patches of the image size that the model was made for; of 224 pixels where it was made for none."""
        size = self.embeds.default_img_size
        return tuple(self.embeds.pos_embed_grid_size or self.embeds.dynamic_feat_size(size or (224, 224)))

    def embed_macs(self, grid: tuple[int, int]) -> int:
        proj = self.embeds.proj
        return (linear_macs(proj) if self.embeds.is_linear else conv_macs(proj)) * grid[0] * grid[1]

    # ---- images

    def embed(self, x: Tensor) -> tuple[Tensor, Any]:
        values, grid = self.embeds(x)
        table = None if self.rope is None else self.rope.get_embed(shape=grid)
        return self.norm_pre(values), self._ropes(table, grid)

    def _ropes(self, table: Any, grid: tuple[int, int] | None) -> Any:
        """Rotary tables as blocks get them: one for all, or in mixed mode one per block."""
        if table is None:
            return None
        waves = None
        if self.tokenzoo_recipe.merged_positions == "mean":
            if grid is None:
                raise ValueError(
                    f"merged_positions='mean': the images of this batch have grids of their own, which "
                    f"{type(self).__name__} cannot place mean coordinates on; use merged_positions='destination'"
                )
            waves = waves_of(self.rope, tuple(grid))
        if not self.rope_is_mixed:
            return Rope.of(table, self.num_protected, waves)
        own = [None if waves is None else waves._replace(freqs=waves.freqs[:, i]) for i in range(len(self.blocks))]
        return tuple(Rope.of(part, self.num_protected, each) for part, each in zip(table, own))

    def layout(self, grid: tuple[int, int], rope: Any = None) -> Layout:
        return super().layout(grid, rope[0] if type(rope) is tuple else rope)

    def rope_of(self, rope: Any, index: int) -> Any:
        return rope[index] if type(rope) is tuple else rope

    # ---- batches of patches

    def start(self, x: Any, mask: Tensor | None, trace: bool, dense: bool) -> tuple[Tokens, Any]:
        if not isinstance(x, Packed):
            return super().start(x, mask, trace, dense)
        dense = dense or self.pools_all or self.tokenzoo_recipe.keeps_trace
        for step in self.blocks[0].tokenzoo.at("embed"):
            raise step.error("looks at images, but was given patches; call the model with images [B, C, H, W]")
        values = self.embeds(x.patches, patch_coord=x.coord, patch_valid=x.valid)[0]
        table = None if self.rope is None else self._generate_rope_naflex(values, x.coord)
        rope = self._ropes(table, x.grid)
        layout = self.layout(x.grid or (1, x.length), rope)._replace(keep_values=dense, own_grids=x.grid is None)
        valid = None if x.valid is None else F.pad(x.valid, (layout.num_prefix, 0), value=True)
        visible = None
        if mask is not None:
            layout = layout._replace(track_positions=True)
            mask = four_dims(mask, values.shape[1])
            visible = visible_tokens(mask, values.shape[0], layout.num_prefix)
            visible = visible if valid is None else visible & valid
            steps = [step for block in self.blocks for step in block.tokenzoo.steps]
            refuse_uneven(mask, visible, layout.num_prefix, steps, self)
        values = self.norm_pre(values)
        return Tokens(values, layout, valid=valid, trace=() if trace or dense else None, visible=visible), rope

    def _packed(self, x: Any, coord: Tensor | None, valid: Tensor | None, mask: Tensor | None) -> tuple[Any, Any]:
        """What was given, as the pass takes it, and the mask."""
        if isinstance(x, dict):
            coord, valid = x.get("patch_coord", coord), x.get("patch_valid", valid)
            x, mask = x["patches"], x.get("attn_mask", mask)
        return (x if coord is None else Packed.of(self, x, coord, valid)), mask

    # ---- features and head

    def forward_features(
        self,
        patches: Any,
        patch_coord: Tensor | None = None,
        patch_valid: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """As for other models; of a batch of patches a dict with `patches` and their `patch_valid`, as timm has it."""
        x, mask = self._packed(patches, patch_coord, patch_valid, attn_mask)
        if not isinstance(x, Packed):
            return super().forward_features(x, mask, is_causal)
        weighs, dense = self.head_reads().weighs(self.tokenzoo_recipe), self.tokenzoo_recipe.dense
        tokens = self.forward_tokens(x, mask, trace=weighs, is_causal=is_causal, dense=dense)
        found, first = self.features(tokens), tokens.layout.num_prefix
        if found.shape[1] == tokens.length:
            valid = tokens.valid
        else:  # all patches in their places, so padding is where it was; more rows than patches all count
            valid = F.pad(x.valid, (first, 0), value=True) if x.valid is not None else None
            valid = valid if found.shape[1] == first + x.length else None
        real = found.new_ones(found.shape[:2], dtype=torch.bool) if valid is None else valid
        return {"patches": found, "patch_valid": real[:, first:]}

    def forward_head(
        self, patches: Tensor | Tokens, pre_logits: bool = False, patch_valid: Tensor | None = None
    ) -> Tensor:
        """Class scores, from `Tokens` or from what `forward_features` returned."""
        tokens = self.read(patches)
        if patch_valid is not None:
            real = F.pad(patch_valid.bool(), (tokens.length - patch_valid.shape[1], 0), value=True)
            tokens = tokens._replace(valid=real if tokens.valid is None else real & tokens.valid)
        x = self.head_drop(self.fc_norm(self.pool(tokens)))
        return x if pre_logits else self.head(x)

    def forward(
        self,
        x: Any,
        patch_coord: Tensor | None = None,
        patch_valid: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Class scores of images [B, C, H, W], or of a batch of patches."""
        x, mask = self._packed(x, patch_coord, patch_valid, attn_mask)
        return super().forward(x, mask, is_causal)

    def forward_intermediates(
        self,
        x: Any,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        patch_coord: Tensor | None = None,
        patch_valid: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """As for other models; of a batch of patches in NLC alone, carried back to all patches, padding as zeros.

        Raises:
            ValueError: maps of images that have grids of their own.
        """
        x, mask = self._packed(x, patch_coord, patch_valid, attn_mask)
        given = dict(indices=indices, return_prefix_tokens=return_prefix_tokens, norm=norm, stop_early=stop_early)
        given |= dict(intermediates_only=intermediates_only, attn_mask=mask, is_causal=is_causal)
        if not isinstance(x, Packed):
            return super().forward_intermediates(x, output_fmt=output_fmt, output_dict=output_dict, **given)
        if output_fmt == "NCHW":
            raise ValueError(
                f"{type(self).__name__}: output_fmt='NCHW' of a batch of patches, whose images have grids of their "
                "own; use output_fmt='NLC' and patch_coord"
            )
        found = super().forward_intermediates(x, output_fmt="NCHW", output_dict=True, **given)
        rows = [y.flatten(2).transpose(1, 2) for y in found["image_intermediates"]]
        if x.valid is not None:
            rows = [y * x.valid.unsqueeze(2).to(y.dtype) for y in rows]
        found["image_intermediates"] = rows
        if output_dict:
            every = torch.ones(x.coord.shape[:2], dtype=torch.bool, device=x.coord.device)
            return found | {"patch_valid": every if x.valid is None else x.valid}
        prefixes = found.get("image_intermediates_prefix")
        out = rows if prefixes is None else list(zip(rows, prefixes))
        return out if intermediates_only else (found["image_features"], out)


def check(model: nn.Module) -> None:
    """Refuses settings of a model that reduction cannot serve.

    Raises:
        ValueError: patch dropout is on.
    """
    if model.patch_drop is not None:
        raise ValueError(
            f"{type(model).__name__}.patch_drop drops random patches before block 0; set model.patch_drop = None (or "
            "create the model with patch_drop_rate=0) before patching"
        )


def check_recipe(model: nn.Module, recipe: Recipe) -> None:
    """Refuses recipes that these models cannot follow.

    Raises:
        ValueError: a method in front of block 0 needs images of half the size embedded; rotary tables have to be
            rebuilt from mean coordinates but cannot be.
    """
    for method in recipe.methods:
        if method.place == "embed":
            raise ValueError(
                f"{method.name} embeds images at half the size, which {type(model).__name__}'s "
                f"{type(model.embeds).__name__} does not do; use a model with a patch embedding of its own"
            )
    if recipe.merged_positions == "mean" and model.rope is not None:
        check_rebuild(model.rope, FAMILY.view(model).own_grid)


def bypassed(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """Modules that are never called as a whole, and what to do instead."""
    return bypassed_by_vit(model)


FAMILY = Family(
    name="naflexvit",
    summary="timm naflexvit.py: SigLIP 2 NaFlex, RADIO, ViTs for images of any size, batches of patches with padding",
    tried="timm 1.0.19 to 1.0.31",
    models={NaFlexVit: ReducingNaFlexVit},
    blocks={**BLOCKS, EvaBlock: ReducingEvaBlock},
    attentions={**PLAIN, **ROTARY},
    check=check,
    check_recipe=check_recipe,
    bypassed=bypassed,
)
