"""Decoders that give every token class scores: linear, batch norm + linear, and Segmenter's mask transformer.

Parameter names are the published ones, so that released checkpoints load. A head takes tokens [B, N, C] in any number
and order, which is what lets it run on reduced tokens; `valid` [B, N] is False for rows that only fill up a batch.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ..ops.layer_macs import conv_macs, linear_macs
from ..ops.projections import is_plain


class LinearHead(nn.Module):
    """One linear layer per token (keys `head.weight`, `head.bias`).

    Args:
        dim: channels of a token.
        num_classes: K.

    Source: Strudel et al., "Segmenter", ICCV 2021 (its linear decoder).
    """

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Class maps [B, N, K] of tokens [B, N, C]; padding gets scores that nobody reads."""
        return self.head(x)

    def macs(self, num_tokens: int) -> int:
        """Multiply-adds for one image with this many tokens."""
        return num_tokens * linear_macs(self.head)


class BNLinearHead(nn.Module):
    """Batch norm over channels and a 1 x 1 convolution (keys `bn.*`, `conv_seg.*`).

    Args:
        dim: channels of a token (of all layers together where several are concatenated).
        num_classes: K.

    Source: Oquab et al., "DINOv2", TMLR 2024 (its linear segmentation heads).
    """

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(dim)
        self.conv_seg = nn.Conv2d(dim, num_classes, kernel_size=1)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Class maps [B, N, K] of tokens [B, N, C]; padding gets scores that nobody reads."""
        x = self.bn(x.transpose(1, 2))
        conv = self.conv_seg
        if not is_plain(conv, nn.Conv2d):
            return conv(x.unsqueeze(3)).squeeze(3).transpose(1, 2)
        return F.conv1d(x, conv.weight.flatten(1).unsqueeze(-1), conv.bias).transpose(1, 2)

    def macs(self, num_tokens: int) -> int:
        """Multiply-adds for one image with this many tokens."""
        return num_tokens * conv_macs(self.conv_seg)


class MaskTransformer(nn.Module):
    """Class embeddings attend together with the tokens; a token's scores are its cosines with them.

    Args:
        dim: channels of the backbone's tokens.
        num_classes: K.
        depth: transformer blocks.
        num_heads: heads of a block; None for one per 64 channels.
        decoder_dim: width of the decoder; None for `dim`.
        mlp_dim: hidden width of the MLP; None for four times the width.
        drop_path: stochastic depth of the last block.
        eps: of the layer norms, 1e-5 as released.

    Source: Strudel, Garcia, Laptev, Schmid, "Segmenter: Transformer for Semantic Segmentation", ICCV 2021.
    """

    def __init__(
        self,
        dim: int,
        num_classes: int,
        depth: int = 2,
        num_heads: int | None = None,
        decoder_dim: int | None = None,
        mlp_dim: int | None = None,
        drop_path: float = 0.0,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        width = decoder_dim or dim
        num_heads = num_heads or max(1, width // 64)
        if width % num_heads:
            raise ValueError(f"MaskTransformer: {num_heads} heads do not divide a width of {width}; set num_heads")
        self.num_classes = num_classes

        norm = partial(nn.LayerNorm, eps=eps)
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]
        ratio = (mlp_dim or 4 * width) / width
        self.blocks = nn.ModuleList(
            Block(width, num_heads, mlp_ratio=ratio, qkv_bias=True, drop_path=rate, norm_layer=norm) for rate in rates
        )
        self.cls_emb = nn.Parameter(torch.randn(1, num_classes, width) * 0.02)
        self.proj_dec = nn.Linear(dim, width)
        self.proj_patch = nn.Parameter(width**-0.5 * torch.randn(width, width))
        self.proj_classes = nn.Parameter(width**-0.5 * torch.randn(width, width))
        self.decoder_norm = norm(width)
        self.mask_norm = norm(num_classes)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Class maps [B, N, K] of tokens [B, N, C]; valid [B, N] is False for padding, which nothing attends to."""
        x = self.proj_dec(x)
        x = torch.cat([x, self.cls_emb.expand(x.shape[0], -1, -1)], dim=1)
        mask = None
        if valid is not None:
            # additive: attention without the fused kernel would add a boolean one as 0 and 1
            mask = x.new_zeros(valid.shape).masked_fill(~valid, float("-inf"))
            mask = F.pad(mask, (0, self.num_classes))[:, None, None, :]
        for block in self.blocks:
            x = block(x) if mask is None else block(x, attn_mask=mask)
        x = self.decoder_norm(x)
        patches = F.normalize(x[:, : -self.num_classes] @ self.proj_patch, dim=-1)
        classes = F.normalize(x[:, -self.num_classes :] @ self.proj_classes, dim=-1)
        return self.mask_norm(patches @ classes.transpose(1, 2))

    def macs(self, num_tokens: int) -> int:
        """Multiply-adds for one image with this many tokens."""
        width, classes = self.cls_emb.shape[2], self.num_classes
        n = num_tokens + classes
        linear = linear_macs(self.blocks)
        attention = 2 * len(self.blocks) * n * n * width
        projections = n * width * width + num_tokens * classes * width
        return num_tokens * linear_macs(self.proj_dec) + n * linear + attention + projections


HEADS: dict[str, type[nn.Module]] = {"linear": LinearHead, "bn_linear": BNLinearHead, "mask": MaskTransformer}
