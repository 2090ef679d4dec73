"""LookupViT's block: few tokens take the costly path, many the cheap one, and one attention map serves both ways."""

from __future__ import annotations

from timm.layers import DropPath, Mlp
from timm.models.vision_transformer import Attention
from torch import Tensor, nn


class TwoWayAttention(nn.Module):
    """Attention of compressed tokens to lookup tokens, whose map carries values back as well.

    On the way back the map is transposed and each lookup token's weights are scaled to sum to one. Logarithms of the
    map are handed on, so that a token which no one looks at divides nothing by zero.

    Args:
        dim: channels.
        heads: heads.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        self.q_norm, self.k_norm = (nn.LayerNorm(dim // heads, eps=1e-6) for _ in range(2))
        self.v_back, self.proj_back = None, None

    def add_way_back(self) -> None:
        """Makes the layers that `infuse` needs; a last block whose lookup tokens nobody reads has none."""
        self.v_back, self.proj_back = (nn.Linear(self.proj.in_features, self.proj.in_features) for _ in range(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)  # [B, H, N, D]

    def gather(self, compressed: Tensor, lookup: Tensor) -> tuple[Tensor, Tensor]:
        """What compressed tokens read [B, M, C], and the logarithm of the map [B, H, M, N].

        Args:
            compressed: [B, M, C].
            lookup: [B, N, C].
        """
        q = self.q_norm(self.q(compressed).unflatten(2, (self.heads, -1))).transpose(1, 2)
        k = self.k_norm(self.k(lookup).unflatten(2, (self.heads, -1))).transpose(1, 2)
        logs = (q * self.scale @ k.transpose(2, 3)).log_softmax(dim=3)
        out = logs.exp().to(q.dtype) @ self._split(self.v(lookup)).to(q.dtype)
        return self.proj(out.transpose(1, 2).flatten(2)), logs

    def infuse(self, compressed: Tensor, logs: Tensor) -> Tensor:
        """What lookup tokens read through the same map [B, N, C].

        Args:
            compressed: [B, M, C].
            logs: from `gather`.
        """
        v = self._split(self.v_back(compressed))
        back = logs.transpose(2, 3).contiguous().softmax(dim=3).to(v.dtype)  # exp(logs) over its sum
        return self.proj_back((back @ v).transpose(1, 2).flatten(2))


class LookupBlock(nn.Module):
    """Gather, refine, infuse, and a small MLP for lookup tokens.

    Args:
        dim: channels.
        heads: heads.
        mlp_ratio: hidden width for compressed tokens over `dim`.
        lookup_ratio: hidden width for lookup tokens over `dim`.
        drop_path: stochastic depth.
        writes: update lookup tokens; False in a last block whose lookup tokens nobody reads.

    Source: Koner, Jain, Jain, Tresp, Paul, "LookupViT: Compressing visual information to a limited number of tokens",
    ECCV 2024; no code was published.
    """

    def __init__(
        self, dim: int, heads: int, mlp_ratio: float = 4.0, lookup_ratio: float = 0.5, drop_path: float = 0.0,
        writes: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.writes = writes
        self.norm_compressed, self.norm_lookup, self.norm1, self.norm2 = (nn.LayerNorm(dim, eps=1e-6) for _ in range(4))
        self.exchange, self.attn = TwoWayAttention(dim, heads), Attention(dim, heads, qkv_bias=True)
        self.mlp, self.drop_path = Mlp(dim, int(dim * mlp_ratio)), DropPath(drop_path)
        if writes:
            self.exchange.add_way_back()
            self.norm_back, self.norm3 = (nn.LayerNorm(dim, eps=1e-6) for _ in range(2))
            self.lookup_mlp = Mlp(dim, int(dim * lookup_ratio))

    def forward(self, compressed: Tensor, lookup: Tensor) -> tuple[Tensor, Tensor]:
        """Both sets [B, M, C] and [B, N, C], updated."""
        read, logs = self.exchange.gather(self.norm_compressed(compressed), self.norm_lookup(lookup))
        compressed = compressed + self.drop_path(read)
        compressed = compressed + self.drop_path(self.attn(self.norm1(compressed)))
        compressed = compressed + self.drop_path(self.mlp(self.norm2(compressed)))
        if self.writes:
            lookup = lookup + self.drop_path(self.exchange.infuse(self.norm_back(compressed), logs))
            lookup = lookup + self.drop_path(self.lookup_mlp(self.norm3(lookup)))
        return compressed, lookup
