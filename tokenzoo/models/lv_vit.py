"""LV-ViT: a ViT with a convolutional stem, scaled residuals, and a second classifier that reads every patch token.

The model is timm's VisionTransformer, and its blocks are timm's own: the divisor of the residual branches stands where
timm has LayerScale. Parameters are named as in the released weights.

Source: Jiang et al., "All Tokens Matter: Token Labeling for Training Better Vision Transformers", NeurIPS 2021.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any, NamedTuple

import torch
from timm.layers import trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, named_apply, register_model
from timm.models.vision_transformer import Attention, VisionTransformer, init_weights_vit_timm
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ._config import config
from ._embed import fit_positions
from .lv_vit_mix import box_mask, random_box
from .lv_vit_stem import STEMS

_NORM = partial(nn.LayerNorm, eps=1e-5)


class Divide(nn.Module):
    """Divides by a constant."""

    def __init__(self, divisor: float):
        super().__init__()
        self.divisor = divisor

    def forward(self, x: Tensor) -> Tensor:
        return x / self.divisor

    def extra_repr(self) -> str:
        """The divisor."""
        return str(self.divisor)


class TrainOutput(NamedTuple):
    """What token labelling trains on.

    Attributes:
        logits: of the class token [B, K].
        dense_logits: of the patch tokens [B, N, K], None without a dense head.
        box: rows (first, behind the last) and columns of patches that came from the flipped batch: (top, left,
            bottom, right), all 0 for none.
    """

    logits: Tensor
    dense_logits: Tensor | None
    box: tuple[int, int, int, int]


class LVViT(VisionTransformer):
    """VisionTransformer whose logits are the class token's plus half the best of all patch tokens'.

    Args:
        img_size: image size in pixels.
        patch_size: pixels per token.
        p_emb: stem: "4_2", "4_2_128" or "naive".
        skip_lam: divisor of both branches of every block.
        return_dense: have a classifier of patch tokens, `aux_head`.
        mix_token: paste a box of the flipped batch over every image's patches in `forward_train`.
        mlp_ratio: hidden channels of the MLPs over their inputs'.
        qkv_bias: bias of queries, keys and values.
        norm_layer: norm of the blocks, by default with the released models' epsilon of 1e-5.
        num_classes: classes; 0 has no classifiers.
        head_dim: channels of a head; None for `embed_dim` over the heads. No released model sets it.
        vit_options: any other option of timm's VisionTransformer.

    Raises:
        ValueError: an unknown stem, or `head_dim` where it cannot be set.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        p_emb: str = "4_2",
        skip_lam: float = 1.0,
        return_dense: bool = True,
        mix_token: bool = False,
        mlp_ratio: float = 3.0,
        qkv_bias: bool = False,
        norm_layer: Any = _NORM,
        num_classes: int = 1000,
        head_dim: int | None = None,
        **vit_options: Any,
    ):
        if p_emb not in STEMS:
            raise ValueError(f"LVViT: p_emb={p_emb!r} is not a stem; choose one of {', '.join(STEMS)}")
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            norm_layer=norm_layer,
            num_classes=num_classes,
            embed_layer=STEMS[p_emb],
            **vit_options,
        )
        if head_dim is not None:
            self._set_head_dim(head_dim, norm_layer, vit_options)
        self.return_dense = return_dense
        self.mix_token = mix_token
        if skip_lam != 1:
            for block in self.blocks:
                block.ls1, block.ls2 = Divide(skip_lam), Divide(skip_lam)
        self._set_dense_head(num_classes)

    def _set_head_dim(self, head_dim: int, norm_layer: Any, options: dict[str, Any]) -> None:
        """Gives every block timm's attention anew, its heads of their own width."""
        if head_dim < 1:
            raise ValueError(f"LVViT: head_dim={head_dim} is not a width; give at least 1, or None")
        if "attn_head_dim" not in inspect.signature(Attention).parameters:
            raise ValueError(f"LVViT: head_dim={head_dim} needs a newer timm, whose Attention takes attn_head_dim")
        given = {"qk_norm": "qk_norm", "scale_attn_norm": "scale_norm", "proj_bias": "proj_bias"}
        given |= {"attn_drop_rate": "attn_drop", "proj_drop_rate": "proj_drop", "device": "device", "dtype": "dtype"}
        shared = {ours: options[name] for name, ours in given.items() if name in options}
        for block in self.blocks:
            old = getattr(block, "attn", None)
            if type(old) is not Attention:
                raise ValueError(
                    f"LVViT: head_dim={head_dim} is for timm's Attention, not {type(old).__name__}; leave attn_layer "
                    "and block_fn alone, or head_dim"
                )
            block.attn = Attention(
                self.embed_dim, old.num_heads, attn_head_dim=head_dim, qkv_bias=old.qkv.bias is not None,
                norm_layer=norm_layer, **shared,
            )  # fmt: skip
            named_apply(init_weights_vit_timm, block.attn)

    def _set_dense_head(self, num_classes: int) -> None:
        self.aux_head = None
        if self.return_dense and num_classes > 0:
            like = self.blocks[0].norm1.weight
            self.aux_head = nn.Linear(self.embed_dim, num_classes, device=like.device, dtype=like.dtype)
            trunc_normal_(self.aux_head.weight, std=0.02)
            nn.init.zeros_(self.aux_head.bias)
            self.aux_head.train(self.training)

    def init_weights(self, mode: str = "", **options: Any) -> None:
        """Published start: truncated normal linear layers, positions and class token, zero biases."""
        super().init_weights(mode, **options)
        if self.cls_token is not None:
            trunc_normal_(self.cls_token, std=0.02)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces both classifiers.

        Args:
            num_classes: classes; 0 has none.
            global_pool: new pooling, None keeps the present one.
        """
        super().reset_classifier(num_classes, global_pool)
        self._set_dense_head(num_classes)

    def dense_logits(self, x: Tensor) -> Tensor | None:
        """Logits of the patch tokens [B, N, K] from all normed tokens [B, P + N, C]; None without a dense head."""
        if self.aux_head is None:
            return None
        return self.aux_head(x[:, self.num_prefix_tokens :])

    def combine_logits(self, logits: Tensor, dense_logits: Tensor | None, valid: Tensor | None = None) -> Tensor:
        """The published rule: class logits plus half the best of the patch tokens, class by class.

        Args:
            logits: of the class token [B, K].
            dense_logits: of the patch tokens [B, N, K], None for none.
            valid: False for patch tokens that are padding [B, N], None for none.
        """
        if dense_logits is None:
            return logits
        if valid is not None:
            dense_logits = dense_logits.masked_fill(~valid.unsqueeze(-1), float("-inf"))
        return logits + 0.5 * dense_logits.amax(dim=1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Normed tokens [B, P + N, C] -> pooled features (pre_logits) or logits by the published rule [B, K]."""
        out = self.head_drop(self.fc_norm(self.pool(x)))  # as in the base, whose method TorchScript would not find
        if pre_logits:
            return out
        out = self.head(out)
        return self.combine_logits(out, self.dense_logits(x)) if self.global_pool else out

    def forward_train(self, x: Tensor, generator: torch.Generator | None = None) -> TrainOutput:
        """Both kinds of logits, for `tokenzoo.training.token_label.TokenLabelLoss`.

        With `mix_token`, and in training, a random box of patches comes from the flipped batch; the dense logits of
        that box are flipped back.

        Args:
            x: images [B, C, H, W].
            generator: source of the box, on the CPU.

        Raises:
            ValueError: the model has no classifier.
        """
        if self.num_classes == 0:
            raise ValueError("LVViT.forward_train needs classifiers; create the model with num_classes > 0")
        grid = self.patch_embed.dynamic_feat_size(x.shape[-2:])
        tokens = self.patch_embed(x)
        box = random_box(grid, generator) if self.mix_token and self.training else (0, 0, 0, 0)
        inside = box_mask(grid, box, x.device)
        shape = (1, -1, 1) if tokens.dim() == 3 else (1, *grid, 1)
        tokens = torch.where(inside.view(shape), tokens.flip(0), tokens)
        tokens = self.norm_pre(self.patch_drop(self._pos_embed(tokens)))
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, use_reentrant=False)
            else:
                tokens = block(tokens)
        tokens = self.norm(tokens)
        dense = self.dense_logits(tokens)
        if dense is not None:
            dense = torch.where(inside.view(1, -1, 1), dense.flip(0), dense)
        return TrainOutput(super().forward_head(tokens), dense, box)


# name -> options, image size, and the share of the image that is cut out at evaluation
_SIZES: dict[str, tuple[dict[str, Any], int, float]] = {
    "lvvit_tiny": ({"embed_dim": 240, "depth": 12, "num_heads": 4}, 224, 0.9),
    "lvvit_small": ({"embed_dim": 384, "depth": 16, "num_heads": 6, "skip_lam": 2.0}, 224, 0.9),
    "lvvit_medium": ({"embed_dim": 512, "depth": 20, "num_heads": 8, "skip_lam": 2.0}, 224, 1.0),
    "lvvit_large": ({"embed_dim": 768, "depth": 24, "num_heads": 12, "skip_lam": 3.0, "p_emb": "4_2_128"}, 448, 1.0),
}
default_cfgs = generate_default_cfgs({
    name: config(
        input_size=(3, side, side), fixed_input_size=True, crop_pct=crop, first_conv="patch_embed.conv1",
        classifier=("head", "aux_head"),
    )
    for name, (_, side, crop) in _SIZES.items()
})  # fmt: skip


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any]) -> LVViT:
    feature_cfg = {"out_indices": 3, "feature_cls": "getter"}
    options = {"mix_token": True, **_SIZES[variant][0], **kwargs}
    return build_model_with_cfg(
        LVViT, variant, pretrained, feature_cfg=feature_cfg, pretrained_filter_fn=fit_positions, **options
    )


@register_model
def lvvit_tiny(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """LV-ViT-T: 8.5 M parameters, 2.9 GMACs at 224."""
    return _create("lvvit_tiny", pretrained, kwargs)


@register_model
def lvvit_small(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """LV-ViT-S: 26.2 M parameters, 6.6 GMACs at 224."""
    return _create("lvvit_small", pretrained, kwargs)


@register_model
def lvvit_medium(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """LV-ViT-M: 55.8 M parameters, 12.7 GMACs at 224."""
    return _create("lvvit_medium", pretrained, kwargs)


@register_model
def lvvit_large(pretrained: bool = False, **kwargs: Any) -> LVViT:
    """LV-ViT-L for images of 448: 150.5 M parameters, 155.1 GMACs."""
    return _create("lvvit_large", pretrained, kwargs)
