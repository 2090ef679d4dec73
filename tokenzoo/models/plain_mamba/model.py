"""PlainMamba: blocks of selective scans over a grid of tokens that keeps its resolution throughout.

No class token; the features are the mean of all tokens. Parameters are named as in the released backbones.

Source: Yang et al., "PlainMamba: Improving Non-Hierarchical Mamba in Visual Recognition", BMVC 2024.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .._config import config
from .._place import made_on
from .block import PlainMambaBlock
from .checkpoint import fit_weights, official_names, resize_positions
from .stem import PlainMambaStem
from .timm_model import TimmInterface


class PlainMamba(TimmInterface):
    """PlainMamba for images of any size: positions are interpolated where the grid is not that of `img_size`.

    Args:
        img_size: image size in pixels that the positions are for.
        patch_size: pixels per token, even.
        in_chans: channels of the image.
        num_classes: classes; 0 has no classifier.
        global_pool: "avg", or "" for a classifier of every token.
        embed_dim: channels C.
        depth: blocks.
        stem_convs: 3 x 3 convolutions of the stem.
        depthwise_layers: blocks with a depthwise convolution of the stream.
        d_state: channels of the state.
        expand: inner channels of the mixers over C.
        conv_size: side of the mixers' convolutions.
        bias: bias of the mixers' outer projections.
        conv_bias: bias of the mixers' convolutions.
        tap_norms: blocks whose maps leave `forward_intermediates` under a norm of their own, `norm_layer<i>`, as in
            released models for dense prediction; the last block's map then leaves under the last norm.
        scan_backend: see `tokenzoo.layers.scan.selective_scan`; None chooses.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block.
        device: where parameters are made; None for torch's default.
        dtype: number format of the parameters; None for torch's default.

    Raises:
        ValueError: an unknown pooling, or blocks that are not there.
    """

    num_prefix_tokens = 0

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 192,
        depth: int = 24,
        stem_convs: int = 1,
        depthwise_layers: tuple[int, ...] = (),
        d_state: int = 16,
        expand: int = 2,
        conv_size: int = 7,
        bias: bool = True,
        conv_bias: bool = True,
        tap_norms: tuple[int, ...] = (),
        scan_backend: str | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        for option, chosen, end in (("depthwise_layers", depthwise_layers, depth), ("tap_norms", tap_norms, depth - 1)):
            if any(not 0 <= index < end for index in chosen):
                raise ValueError(f"PlainMamba: {option}={tuple(chosen)} must be blocks from 0 to {end - 1}")
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.grad_checkpointing = False
        with made_on(device):
            self.patch_embed = PlainMambaStem(img_size, patch_size, in_chans, embed_dim, stem_convs)
            self.pos_embed = nn.Parameter(torch.empty(1, self.patch_embed.num_patches, embed_dim))
            trunc_normal_(self.pos_embed, std=0.02)
            mixer = {
                "d_state": d_state, "expand": expand, "conv_size": conv_size, "bias": bias, "conv_bias": conv_bias,
                "scan_backend": scan_backend,
            }  # fmt: skip
            self.layers = nn.ModuleList(
                PlainMambaBlock(embed_dim, drop_path_rate * i / max(1, depth - 1), i in depthwise_layers, **mixer)
                for i in range(depth)
            )
            self.ln1 = nn.LayerNorm(embed_dim, eps=1e-6)
            self.tap_norms = tuple(tap_norms)
            for index in self.tap_norms:
                self.add_module(f"norm_layer{index}", nn.LayerNorm(embed_dim, eps=1e-6))
            reduction = self.patch_embed.feat_ratio()
            self.feature_info = [
                {"module": f"layers.{i}", "num_chs": embed_dim, "reduction": reduction} for i in range(depth)
            ]
            self.head_drop = nn.Dropout(drop_rate)
            self._set_classifier(num_classes, global_pool)
        self.to(dtype=dtype)

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks under the name that timm's transformers have for them."""
        return self.layers

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads weights under the names that they have here, or under those of released checkpoints.

        Args:
            state_dict: weights by name.
            strict: all names must be there, and no others.
            assign: take the tensors themselves.
        """
        if any(key.startswith("backbone.") for key in state_dict):
            state_dict = official_names(state_dict)
        return super().load_state_dict(state_dict, strict, assign)

    # ---- forward

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Images [B, C, H, W] -> tokens with positions in raster order [B, L, C], and their grid (high, wide)."""
        tokens = self.patch_embed(x)
        grid = self.patch_embed.dynamic_feat_size(x.shape[-2:])
        positions = resize_positions(self.pos_embed, self.patch_embed.grid_size, grid)
        return tokens + positions, grid

    def _run(self, block: nn.Module, x: Tensor, grid: tuple[int, int]) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, grid, use_reentrant=False)
        return block(x, grid)

    def _tap(self, x: Tensor, index: int, norm: bool) -> Tensor:
        """Tokens as they leave a block for a reader outside."""
        if index in self.tap_norms:
            return self.get_submodule(f"norm_layer{index}")(x)
        last = bool(self.tap_norms) and index == len(self.feature_info) - 1
        return self.ln1(x) if norm or last else x

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """What leaves chosen blocks.

        Args:
            x: images [B, C, H, W].
            indices: blocks; a number takes the last ones, None all.
            norm: normalise by the last norm; blocks in `tap_norms` have their own, and always use it.
            stop_early: do not run blocks behind the last chosen one.
            output_fmt: "NCHW" for maps, "NLC" for tokens.
            intermediates_only: return the maps alone.

        Returns:
            The maps, or (normed tokens behind the last block that ran, maps).

        Raises:
            ValueError: another format.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"PlainMamba: output_fmt={output_fmt!r}; choose 'NCHW' or 'NLC'")
        wanted, last = feature_take_indices(len(self.layers), indices)
        x, grid = self.embed(x)
        taps = []
        for index, block in enumerate(self.layers[: last + 1] if stop_early else self.layers):
            x = self._run(block, x, grid)
            if index in wanted:
                taps.append(self._tap(x, index, norm))
        if output_fmt == "NCHW":
            taps = [tap.transpose(1, 2).unflatten(2, grid).contiguous() for tap in taps]
        return taps if intermediates_only else (self.ln1(x), taps)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] -> normed tokens in raster order [B, L, `embed_dim`]."""
        x, grid = self.embed(x)
        for block in self.layers:
            x = self._run(block, x, grid)
        return self.ln1(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Normed tokens -> pooled features (pre_logits) or logits."""
        x = self.head_drop(x.mean(dim=1) if self.global_pool else x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


default_cfgs = generate_default_cfgs({
    name: config(crop_pct=0.875, first_conv="patch_embed.stem.0")
    for name in ("plain_mamba_l1", "plain_mamba_l2", "plain_mamba_l3")
})  # fmt: skip


def _create(variant: str, pretrained: bool, args: dict[str, Any]) -> PlainMamba:
    feature_cfg = {"out_indices": 3, "feature_cls": "getter"}
    return build_model_with_cfg(
        PlainMamba, variant, pretrained, feature_cfg=feature_cfg, pretrained_filter_fn=fit_weights, **args
    )


@register_model
def plain_mamba_l1(pretrained: bool = False, **kwargs: Any) -> PlainMamba:
    """PlainMamba-L1: 7.6 M parameters, 3.0 GMACs at 224 with all four scans counted."""
    args = {"embed_dim": 192, "depth": 24, "stem_convs": 1, "depthwise_layers": (0,)}
    return _create("plain_mamba_l1", pretrained, {**args, **kwargs})


@register_model
def plain_mamba_l2(pretrained: bool = False, **kwargs: Any) -> PlainMamba:
    """PlainMamba-L2: 26.1 M parameters, 8.1 GMACs at 224 with all four scans counted."""
    args = {"embed_dim": 384, "depth": 24, "stem_convs": 2}
    return _create("plain_mamba_l2", pretrained, {**args, **kwargs})


@register_model
def plain_mamba_l3(pretrained: bool = False, **kwargs: Any) -> PlainMamba:
    """PlainMamba-L3: 51.0 M parameters, 14.4 GMACs at 224 with all four scans counted."""
    args = {"embed_dim": 448, "depth": 36, "stem_convs": 2}
    return _create("plain_mamba_l3", pretrained, {**args, **kwargs})
