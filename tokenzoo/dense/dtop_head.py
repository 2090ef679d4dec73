"""DToP's segmentation head: one query a class attends to the tokens, and its attention logits are the masks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.rows import split_dim


class MaskAttention(nn.Module):
    """Attention of queries to tokens that also hands out its logits.

    Args:
        dim: channels.
        num_heads: heads.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, queries: Tensor, tokens: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What the queries read [B, K, D], and the logits [B, K, N], mean over heads, of padding too."""

        def heads(x: Tensor) -> Tensor:
            return split_dim(x, 2, self.num_heads, -1).transpose(1, 2)

        q, k, v = heads(self.q(queries)), heads(self.k(tokens)), heads(self.v(tokens))
        logits = q @ k.transpose(2, 3) * self.scale
        weights = logits if valid is None else logits.masked_fill(~valid[:, None, None], float("-inf"))
        out = (weights.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return self.proj(out), logits.mean(1)


class MaskDecoderLayer(nn.Module):
    """Self-attention of the queries, attention to the tokens, MLP; norms come after each."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        self.multihead_attn = MaskAttention(dim, num_heads)
        self.linear1 = nn.Linear(dim, 4 * dim)
        self.linear2 = nn.Linear(4 * dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(self, queries: Tensor, tokens: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Queries [B, K, D] and mask logits [B, K, N]."""
        queries = self.norm1(queries + self.self_attn(queries, queries, queries, need_weights=False)[0])
        read, masks = self.multihead_attn(queries, tokens, valid)
        queries = self.norm2(queries + read)
        return self.norm3(queries + self.linear2(F.relu(self.linear1(queries)))), masks


class DToPHead(nn.Module):
    """One query per class, decoded on tokens in any number and order; parameter names as released.

    Args:
        dim: channels of the backbone's tokens.
        num_classes: K.
        width: channels of the decoder; None for half of `dim`.
        num_heads: heads of the decoder; None for one per 64 channels.
        depth: decoder layers.

    Source: Tang, Zhang, Liu, Liu, Liu, "Dynamic Token Pruning in Plain Vision Transformers for Semantic
    Segmentation", ICCV 2023 (heads of Zhang et al., "SegViT", NeurIPS 2022).
    """

    def __init__(
        self, dim: int, num_classes: int, width: int | None = None, num_heads: int | None = None, depth: int = 3
    ) -> None:
        super().__init__()
        width = width or dim // 2
        num_heads = num_heads or max(1, width // 64)
        if width % num_heads:
            raise ValueError(f"DToPHead: {num_heads} heads do not divide a width of {width}; set num_heads")
        self.num_classes = num_classes
        self.input_proj = nn.Linear(dim, width)
        self.proj_norm = nn.LayerNorm(width)
        self.q = nn.Embedding(num_classes, width)
        self.class_embed = nn.Linear(width, 2)
        self.decoder = nn.ModuleDict(
            {"layers": nn.ModuleList(MaskDecoderLayer(width, num_heads) for _ in range(depth))}
        )

    def forward(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Presence of every class in the image, and mask logits.

        Args:
            x: tokens [B, N, C].
            valid: [B, N] bool, False for padding.

        Returns:
            Presence [B, K] in 0..1 and mask logits [B, K, N]; a token's score is presence * sigmoid(logit).
        """
        tokens = self.proj_norm(self.input_proj(x))
        queries, masks = self.q(torch.arange(self.num_classes, device=x.device)), torch.empty(0)
        queries = queries.expand(x.shape[0], -1, -1)
        for layer in self.decoder["layers"]:
            queries, masks = layer(queries, tokens, valid)
        return self.class_embed(queries).softmax(-1)[..., 0], masks
