"""Vision Mamba (Vim): patch tokens and a class token in their middle, scanned forward and backward in every block.

Parameters are named as in the released weights. Blocks hand on two tensors: the output of the last mixer and the
residual stream before it, which stays in float32; the stream behind a block is their sum.

Source: Zhu, Liao, Zhang, Wang, Liu, Wang, "Vision Mamba: Efficient Visual Representation Learning with Bidirectional
State Space Model", ICML 2024. Stochastic depth there: 0.1.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import DropPath, lecun_normal_, trunc_normal_
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...layers.rms_norm import RMSNorm
from .._place import made_on
from .block import VimBlock, add_residual
from .embed import StridedEmbed, class_rows, fit_positions, insert_rows, num_class_tokens, split_rows, take_rows
from .mixer import VimMixer
from .timm_model import TimmInterface


class VisionMamba(TimmInterface):
    """Vision Mamba.

    Args:
        img_size: image size in pixels.
        patch_size: pixels per patch.
        stride: pixels from patch to patch; None for the patch size.
        in_chans: channels of the image.
        num_classes: classes; 0 has no classifier.
        global_pool: "token" (mean of the class tokens), "avg" (mean of the patch tokens) or "" (all tokens); None for
            "token" where there are class tokens, else "avg".
        embed_dim: channels of the tokens.
        depth: blocks.
        d_state: states a channel.
        d_conv: positions that the causal convolutions see.
        expand: inner channels of the mixers over `embed_dim`.
        cls_position: "middle", "first", "both" (first and last) or "none".
        bimamba_type: see `VimMixer`.
        if_divide_out: see `VimMixer`.
        drop_rate: dropout before the classifier.
        pos_drop_rate: dropout of embedded tokens.
        drop_path_rate: stochastic depth of the last addition.
        norm_eps: epsilon of the norms.
        dynamic_img_size: take images of any size, interpolating positions.
        scan_backend: see `tokenzoo.layers.scan.selective_scan`; None chooses.
        device: where parameters are made; None for torch's default.
        dtype: number format of the parameters; None for torch's default.

    Raises:
        ValueError: an unknown option, or class-token pooling without class tokens.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        stride: int | tuple[int, int] | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str | None = None,
        embed_dim: int = 192,
        depth: int = 24,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        cls_position: str = "middle",
        bimamba_type: str = "v2",
        if_divide_out: bool = True,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_eps: float = 1e-5,
        dynamic_img_size: bool = False,
        scan_backend: str | None = None,
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__()
        self.in_chans = in_chans
        self.embed_dim = self.num_features = self.head_hidden_size = embed_dim
        self.cls_position = cls_position
        self.num_class_tokens = self.num_prefix_tokens = num_class_tokens(cls_position)
        self.bimamba_type = bimamba_type
        self.dynamic_img_size = dynamic_img_size
        self.grad_checkpointing = False
        with made_on(device):
            self.patch_embed = StridedEmbed(
                img_size, patch_size, stride, in_chans, embed_dim, strict_img_size=not dynamic_img_size
            )
            for name in self._class_names():
                setattr(self, name, nn.Parameter(torch.zeros(1, 1, embed_dim)))
            length = self.patch_embed.num_patches + self.num_class_tokens
            self.pos_embed = nn.Parameter(torch.zeros(1, length, embed_dim))
            self.pos_drop = nn.Dropout(pos_drop_rate)
            options = {
                "d_state": d_state, "d_conv": d_conv, "expand": expand, "bimamba_type": bimamba_type,
                "if_divide_out": if_divide_out, "scan_backend": scan_backend,
            }  # fmt: skip
            # the first block adds nothing; a block's rate is for the output of the mixer before it
            rates = [0.0] + [drop_path_rate * i / max(1, depth - 1) for i in range(depth)]
            self.layers = nn.ModuleList(
                VimBlock(RMSNorm(embed_dim, norm_eps), VimMixer(embed_dim, **options), _drop_path(rates[i]))
                for i in range(depth)
            )
            self.drop_path = _drop_path(drop_path_rate)
            self.norm_f = RMSNorm(embed_dim, norm_eps)
            ratio = self.patch_embed.feat_ratio()
            self.feature_info = [
                {"module": f"layers.{i}", "num_chs": embed_dim, "reduction": ratio} for i in range(depth)
            ]
            self.head_drop = nn.Dropout(drop_rate)
            self._set_classifier(num_classes, global_pool)
            self.init_weights()
        self.to(dtype=dtype)

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks under the name that timm's transformers have for them."""
        return self.layers

    def _class_names(self) -> tuple[str, ...]:
        return ((), ("cls_token",), ("cls_token_head", "cls_token_tail"))[self.num_class_tokens]

    @torch.no_grad()
    def init_weights(self) -> None:
        """Published start, on top of the mixers' own."""
        lecun_normal_(self.patch_embed.proj.weight)
        nn.init.zeros_(self.patch_embed.proj.bias)
        for name in ("pos_embed", *self._class_names()):
            trunc_normal_(getattr(self, name), std=0.02)
        for block in self.layers:  # one residual branch a block
            block.mixer.out_proj.reset_parameters()
            block.mixer.out_proj.weight.div_(len(self.layers) ** 0.5)

    def _narrow(self, x: Tensor) -> Tensor:
        """The stream is wide; what leaves the model has the type of its weights."""
        return x.to(self.patch_embed.proj.weight.dtype)

    def embed_tokens(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> tokens [B, L, C] with class tokens and positions, as they enter the first block."""
        grid = self.patch_embed.dynamic_feat_size(x.shape[-2:])
        x = self.patch_embed(x)
        if self.num_class_tokens:
            tokens = torch.cat([getattr(self, name) for name in self._class_names()], dim=1)
            rows = class_rows(self.cls_position, grid[0] * grid[1])
            x = insert_rows(x, tokens.to(x.dtype).expand(x.shape[0], -1, -1), rows)
        positions = fit_positions(self.pos_embed, self.cls_position, self.patch_embed.grid_size, grid)
        return self.pos_drop(x + positions)

    def run_block(self, block: nn.Module, h: Tensor, res: Tensor | None) -> tuple[Tensor, Tensor]:
        """One block, recomputed in the backward pass if that is set."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, h, res, use_reentrant=False)
        return block(h, res)

    def final_norm(self, h: Tensor, res: Tensor | None) -> Tensor:
        """Normed tokens [B, L, C] from what the last block returns."""
        return self._narrow(self.norm_f(add_residual(self.drop_path(h), res)))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W] -> normed tokens [B, L, C], class tokens in their places."""
        h, res = self.embed_tokens(x), None
        for block in self.layers:
            h, res = self.run_block(block, h, res)
        return self.final_norm(h, res)

    def forward_head(self, x: Tensor, pre_logits: bool = False, rows: tuple[int, ...] | None = None) -> Tensor:
        """Logits [B, K] of normed tokens.

        Args:
            x: normed tokens [B, L, C].
            pre_logits: return pooled features [B, C].
            rows: where the class tokens are; None for where `forward_features` puts them in a sequence of this length.
        """
        if rows is None:
            rows = class_rows(self.cls_position, x.shape[1] - self.num_class_tokens)
        if self.global_pool:
            x = (take_rows(x, rows) if self.global_pool == "token" else split_rows(x, rows)[0]).mean(dim=1)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _drop_path(rate: float) -> nn.Module:
    return DropPath(rate) if rate > 0 else nn.Identity()
