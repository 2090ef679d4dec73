"""LookupViT, a reproduction: most work is done on a small grid of compressed tokens, whose size is chosen at run time.

Neither code nor weights were published. Recalled of the paper and not checked: the class token stands with the
compressed ones, norms of queries and keys, the hidden width of half the channels for lookup tokens, the transposed map
scaled to sum to one, grids that are drawn in training. Its parameters, and its costs beyond
"about half", are not known.

Source: Koner, Jain, Jain, Tresp, Paul, "LookupViT: Compressing visual information to a limited number of tokens",
ECCV 2024.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed, resample_abs_pos_embed, to_2tuple, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..layers.lookup_block import LookupBlock
from ._config import config
from ._place import made_on

Grid = tuple[int, int]


def _resized(x: Tensor, old: Grid, new: Grid) -> Tensor:
    """Tokens [B, N, C] of a grid, bilinearly interpolated for another one."""
    if old == new:
        return x
    # weights of each place by what interpolation makes of it alone: one product, whose strides no compiler gets wrong
    places = torch.eye(old[0] * old[1], device=x.device).unflatten(1, (1, *old))
    weights = F.interpolate(places, new, mode="bilinear", align_corners=False).flatten(1)  # [N, M]
    return weights.t().to(x.dtype) @ x


class LookupViT(nn.Module):
    """A transformer with two sets of tokens.

    Args:
        img_size: image size in pixels, whole patches.
        patch_size: pixels per lookup token.
        in_chans: channels of the image.
        num_classes: classes; 0 has no classifier.
        global_pool: "token" (class token), "avg" (compressed tokens); "" only without classes.
        embed_dim: channels.
        depth: blocks.
        num_heads: heads.
        mlp_ratio: hidden width for compressed tokens over channels.
        lookup_ratio: hidden width for lookup tokens over channels.
        token_grid: grid of compressed tokens in evaluation, one number or (high, wide).
        train_grids: grids that a training step draws one of; empty for always `token_grid`.
        dense: the last block updates lookup tokens as well, which no classifier reads; for dense features.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block.
        device: where parameters are made; None for torch's default.
        dtype: number format of the parameters; None for torch's default.

    Raises:
        ValueError: a grid larger than that of patches, no whole patches, heads or a pooling that do not fit.
    """

    def __init__(
        self, img_size: int | Grid = 224, patch_size: int | Grid = 16, in_chans: int = 3, num_classes: int = 1000,
        global_pool: str = "token", embed_dim: int = 768, depth: int = 12, num_heads: int = 12, mlp_ratio: float = 4.0,
        lookup_ratio: float = 0.5, token_grid: int | Grid = 5, train_grids: Sequence[int | Grid] = (5, 7, 10),
        dense: bool = False, drop_rate: float = 0.0, drop_path_rate: float = 0.0, device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.img_size, patch = to_2tuple(img_size), to_2tuple(patch_size)
        if any(side % p for side, p in zip(self.img_size, patch, strict=True)):
            raise ValueError(f"LookupViT: {self.img_size} pixels are not a whole number of {patch} patches; resize")
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f"LookupViT: {embed_dim} channels do not split into {num_heads} heads; choose a divisor")
        self.grid_size: Grid = (self.img_size[0] // patch[0], self.img_size[1] // patch[1])
        self.token_grid = self._checked(token_grid)
        self.train_grids = tuple(self._checked(grid) for grid in train_grids)
        every = (self.token_grid, *self.train_grids)
        self.table_grid: Grid = (max(grid[0] for grid in every), max(grid[1] for grid in every))
        self.in_chans, self.embed_dim, self.grad_checkpointing = in_chans, embed_dim, False
        self.num_features = self.head_hidden_size = embed_dim
        with made_on(device):
            self.patch_embed = PatchEmbed(None, patch, in_chans, embed_dim)
            self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
            self.pos_embed = nn.Parameter(torch.zeros(1, self.grid_size[0] * self.grid_size[1], embed_dim))
            self.token_pos = nn.Parameter(torch.zeros(1, self.table_grid[0] * self.table_grid[1], embed_dim))
            self.blocks = nn.ModuleList(
                LookupBlock(
                    embed_dim, num_heads, mlp_ratio, lookup_ratio, drop_path_rate * i / max(1, depth - 1),
                    writes=dense or i < depth - 1,
                )
                for i in range(depth)
            )  # fmt: skip
            self.norm, self.head_drop = nn.LayerNorm(embed_dim, eps=1e-6), nn.Dropout(drop_rate)
            self._set_classifier(num_classes, global_pool)
            for table in (self.cls_token, self.pos_embed, self.token_pos):
                trunc_normal_(table, std=0.02)
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    trunc_normal_(module.weight, std=0.02)
                    nn.init.zeros_(module.bias)
        self.feature_info = [
            {"module": f"blocks.{i}", "num_chs": embed_dim, "reduction": max(patch)} for i in range(depth)
        ]
        self.to(dtype=dtype)

    def _checked(self, grid: int | Grid) -> Grid:
        high, wide = to_2tuple(grid)
        if not (1 <= high <= self.grid_size[0] and 1 <= wide <= self.grid_size[1]):
            raise ValueError(
                f"LookupViT: a grid of {(high, wide)} compressed tokens does not fit into {self.grid_size} patches; "
                "give sides from 1 to these"
            )
        return int(high), int(wide)

    def _set_classifier(self, num_classes: int, global_pool: str) -> None:
        if global_pool not in ("token", "avg", "") or (num_classes > 0 and not global_pool):
            raise ValueError(f"LookupViT: global_pool={global_pool!r} with {num_classes} classes; give token or avg")
        self.num_classes, self.global_pool = num_classes, global_pool
        self.head = nn.Linear(self.embed_dim, num_classes) if num_classes > 0 else nn.Identity()

    # ---- timm's conventions

    def set_token_grid(self, grid: int | Grid) -> None:
        """Evaluates with this grid of compressed tokens from now on; any up to that of patches runs."""
        self.token_grid = self._checked(grid)

    def set_input_size(self, img_size: int | Grid) -> None:
        """Takes images of another size (pixels, one number or high, wide) from now on; positions are interpolated."""
        size, patch = to_2tuple(img_size), self.patch_embed.patch_size
        new = (size[0] // patch[0], size[1] // patch[1])
        if any(side % p for side, p in zip(size, patch, strict=True)) or any(
            new[i] < self.table_grid[i] for i in (0, 1)
        ):
            raise ValueError(
                f"LookupViT: {size} pixels are no whole patches of {patch} with room for {self.table_grid} compressed "
                "tokens; choose another size"
            )
        with torch.no_grad():
            fitted = _resized(self.pos_embed, self.grid_size, new).clone()
        self.pos_embed = nn.Parameter(fitted, requires_grad=self.pos_embed.requires_grad)
        self.img_size, self.grid_size = size, new

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay, besides norms and biases."""
        return {"cls_token", "pos_embed", "token_pos"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of parameter groups for layer-wise learning rates."""
        stem = r"^cls_token|^pos_embed|^token_pos|^patch_embed"
        return {"stem": stem, "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The classifier."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier.

        Args:
            num_classes: classes; 0 has none.
            global_pool: new pooling; None keeps the present one, or takes "token" where classes need one.
        """
        if global_pool is None:
            global_pool = self.global_pool or ("token" if num_classes > 0 else "")
        self._set_classifier(num_classes, global_pool)
        self.head.to(device=self.cls_token.device, dtype=self.cls_token.dtype).train(self.training)

    def forward_intermediates(
        self, x: Tensor, indices: int | list[int] | None = None, norm: bool = False, stop_early: bool = False,
        output_fmt: str = "NCHW", intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:  # fmt: skip
        """Lookup tokens behind chosen blocks, as maps; without `dense` the last block hands on what it was given.

        Args:
            x: images [B, C, H, W].
            indices: blocks; a number takes the last ones, None all.
            norm: refused: the norm at the end is that of compressed tokens.
            stop_early: do not run blocks behind the last chosen one.
            output_fmt: "NCHW".
            intermediates_only: return the maps alone.

        Raises:
            ValueError: another format, or `norm`.
        """
        if output_fmt != "NCHW" or norm:
            raise ValueError("LookupViT: intermediates are maps in NCHW without a norm; leave both options alone")
        wanted, last = feature_take_indices(len(self.blocks), indices)
        compressed, lookup = self._embed(x, None)
        maps = []
        for index, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            compressed, lookup = block(compressed, lookup)
            if index in wanted:
                maps.append(lookup.transpose(1, 2).unflatten(2, self.grid_size))
        return maps if intermediates_only else (self.norm(compressed), maps)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drops the blocks behind the last chosen one, norm and classifier where asked; returns the chosen blocks."""
        wanted, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return wanted

    # ---- forward

    def _embed(self, x: Tensor, grid: int | Grid | None) -> tuple[Tensor, Tensor]:
        """Compressed tokens [B, 1 + M, C], class token first, and lookup tokens [B, N, C]."""
        if tuple(x.shape[2:]) != self.img_size:
            raise ValueError(
                f"LookupViT: an image of {tuple(x.shape[2:])} pixels does not match the model's {self.img_size}; "
                "resize it, or call model.set_input_size"
            )
        if grid is not None:
            chosen = self._checked(grid)
        elif self.training and self.train_grids:
            chosen = self.train_grids[int(torch.randint(len(self.train_grids), (), device="cpu"))]
        else:
            chosen = self.token_grid
        tokens = self.patch_embed(x)
        compressed = _resized(tokens, self.grid_size, chosen) + _resized(self.token_pos, self.table_grid, chosen)
        return torch.cat([self.cls_token.expand(x.shape[0], -1, -1), compressed], dim=1), tokens + self.pos_embed

    def forward_features(self, x: Tensor, grid: int | Grid | None = None) -> Tensor:
        """Normed compressed tokens [B, 1 + M, C] of images.

        Args:
            x: images [B, C, H, W].
            grid: grid of compressed tokens; None for `token_grid`, or in training for one of `train_grids`.
        """
        compressed, lookup = self._embed(x, grid)
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                compressed, lookup = checkpoint(block, compressed, lookup, use_reentrant=False)
            else:
                compressed, lookup = block(compressed, lookup)
        return self.norm(compressed)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features -> pooled features (pre_logits) or logits."""
        x = x[:, 0] if self.global_pool == "token" else x[:, 1:].mean(1) if self.global_pool == "avg" else x
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor, grid: int | Grid | None = None) -> Tensor:
        """Logits; arguments as of `forward_features`."""
        return self.forward_head(self.forward_features(x, grid))


_SIZES = {"lookupvit_small": (384, 6), "lookupvit_base": (768, 12)}  # channels, heads
default_cfgs = generate_default_cfgs(
    {name: config(fixed_input_size=True, first_conv="patch_embed.proj") for name in _SIZES}
)


def _fit(state_dict: dict[str, Tensor], model: LookupViT) -> dict[str, Tensor]:
    """Positions of square grids for the grids of the model."""
    fitted = dict(state_dict)
    for name, grid in (("pos_embed", model.grid_size), ("token_pos", model.table_grid)):
        if name in fitted and fitted[name].shape != getattr(model, name).shape:
            fitted[name] = resample_abs_pos_embed(fitted[name], grid, num_prefix_tokens=0)
    return fitted


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any]) -> LookupViT:
    dim, heads = _SIZES[variant]
    options = {"embed_dim": dim, "num_heads": heads, "dense": bool(kwargs.get("features_only")), **kwargs}
    feature_cfg = {"out_indices": 3, "feature_cls": "getter"}
    return build_model_with_cfg(
        LookupViT, variant, pretrained, feature_cfg=feature_cfg, pretrained_filter_fn=_fit, **options
    )


@register_model
def lookupvit_small(pretrained: bool = False, **kwargs: Any) -> LookupViT:
    """LookupViT-S, a reproduction: 5 x 5 compressed tokens at 224, other grids at run time."""
    return _create("lookupvit_small", pretrained, kwargs)


@register_model
def lookupvit_base(pretrained: bool = False, **kwargs: Any) -> LookupViT:
    """LookupViT-B, a reproduction: 5 x 5 compressed tokens at 224, other grids at run time."""
    return _create("lookupvit_base", pretrained, kwargs)
