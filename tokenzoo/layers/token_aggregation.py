"""CATANet's token aggregation block: attention in groups of alike tokens and to shared centres, as released."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.grouped import attend_in_groups
from ..ops.rows import add_rows, stable_order, take_rows


class _Keys(nn.Module):
    """Keys and values of the centres."""

    def __init__(self, dim: int, qk_dim: int) -> None:
        super().__init__()
        self.to_k, self.to_v = nn.Linear(dim, qk_dim, bias=False), nn.Linear(dim, dim, bias=False)


class Queries(_Keys):
    """Queries, keys and values of tokens, and the projection behind attention."""

    def __init__(self, dim: int, qk_dim: int) -> None:
        super().__init__(dim, qk_dim)
        self.to_q, self.proj = nn.Linear(dim, qk_dim, bias=False), nn.Linear(dim, dim, bias=False)


class _Depthwise(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.depthwise_conv = nn.Sequential(nn.Conv2d(dim, dim, 5, padding=2, groups=dim), nn.GELU())


class _ConvMlp(nn.Module):
    """Two linear layers with a depthwise convolution on the grid in between."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2, self.dwconv = nn.Linear(dim, hidden), nn.Linear(hidden, dim), _Depthwise(hidden)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        u = F.gelu(self.fc1(x))
        conv = self.dwconv.depthwise_conv(u.transpose(1, 2).unflatten(2, grid))
        return self.fc2(u + conv.flatten(2).transpose(1, 2))


class ConvMlpBranch(nn.Module):
    """The MLP behind attention, and its norm."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.norm, self.fn = nn.LayerNorm(dim), _ConvMlp(dim, hidden)


class TokenAggregation(nn.Module):
    """Maps [B, C, H, W] to maps; the number of tokens does not change.

    Names are those of the released code. Groups are cut by a stable sort, where theirs depends on how a sort breaks
    ties; a sequence shorter than two groups goes on in its mirror image, where theirs fails.

    Args:
        dim: channels.
        qk_dim: width of queries and keys of all heads.
        hidden: width inside the MLP.
        heads: heads.
        centres: shared centres.
        group_size: tokens per group.
        iterations: steps of the centres in training.
        decay: of their moving average.

    Source: Liu, Liu, Tang, Wu, "CATANet: Efficient Content-Aware Token Aggregation for Lightweight Image
    Super-Resolution", CVPR 2025, and the repository EquationWalker/CATANet.
    """

    def __init__(
        self, dim: int, qk_dim: int, hidden: int, heads: int, centres: int, group_size: int, iterations: int = 5,
        decay: float = 0.999,
    ) -> None:  # fmt: skip
        super().__init__()
        self.heads, self.group_size, self.iterations, self.decay = heads, group_size, iterations, decay
        self.norm, self.mlp = nn.LayerNorm(dim), ConvMlpBranch(dim, hidden)
        self.irca_attn, self.iasa_attn = _Keys(dim, qk_dim), Queries(dim, qk_dim)
        self.conv1x1 = nn.Conv2d(dim, dim, 1, bias=False)
        self.register_buffer("means", torch.randn(centres, dim))
        self.register_buffer("initted", torch.tensor(False))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)

    def chunk_means(self, x: Tensor) -> Tensor:
        """Centres of a layer that has none yet: means of stretches over the batch [K, C]."""
        count = len(self.means)
        pad = count - x.shape[1] % count
        return torch.cat([x, x[:, -pad:].flip(1)], dim=1).unflatten(1, (count, -1)).mean((0, 2))

    def step(self, x: Tensor, centres: Tensor) -> Tensor:
        """One step of the centres [K, C]: the direction of the sum of their tokens, over the batch.

        Args:
            x: tokens of unit length [B, N, C].
            centres: [K, C].
        """
        centres = F.normalize(centres, dim=-1)
        tokens = x.flatten(0, 1).unsqueeze(0)
        group = (tokens.detach() @ centres.detach().transpose(0, 1)).argmax(-1)
        sums = add_rows(torch.zeros_like(centres).unsqueeze(0), group, tokens)[0]
        there = torch.zeros_like(centres[:, :1]).index_fill(0, group.flatten(), 1.0) > 0
        return torch.where(there, F.normalize(sums, dim=-1), centres)

    def moved(self, x: Tensor) -> Tensor:
        """Centres that attention goes by: as they are stored, in training some steps on."""
        centres = self.means if bool(self.initted) else self.chunk_means(x)
        if not self.training:
            return centres
        unit = F.normalize(x, dim=-1)
        with torch.no_grad():
            for _ in range(self.iterations - 1):
                centres = self.step(unit, centres)
        return self.step(unit, centres)

    def order(self, x: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest centre of every token [B, N], and the tokens sorted by it."""
        with torch.no_grad():
            group = (F.normalize(x, dim=-1) @ F.normalize(centres, dim=-1).transpose(0, 1)).argmax(-1)
            return group, stable_order(group)

    def attention(self, x: Tensor, centres: Tensor) -> Tensor:
        """Attention in groups and to the centres, projected [B, N, C]."""

        def split(t: Tensor) -> Tensor:
            return t.unflatten(-1, (self.heads, -1)).transpose(-3, -2)

        order, own = self.order(x, centres)[1], self.iasa_attn
        q, k, v = (split(take_rows(t(x), order)) for t in (own.to_q, own.to_k, own.to_v))
        out = attend_in_groups(q, k, v, self.group_size)
        k, v = (split(t(centres)).expand(x.shape[0], -1, -1, -1) for t in (self.irca_attn.to_k, self.irca_attn.to_v))
        out = (out + F.scaled_dot_product_attention(q, k, v)).transpose(1, 2).flatten(2)
        return own.proj(take_rows(out, order.argsort(dim=1)))

    def forward(self, x: Tensor) -> Tensor:
        grid, rows = tuple(x.shape[2:]), x.flatten(2).transpose(1, 2)
        normed = self.norm(rows)
        centres = self.moved(normed)
        out = self.attention(normed, centres).transpose(1, 2).unflatten(2, grid)
        rows = rows + self.conv1x1(out).flatten(2).transpose(1, 2)
        rows = rows + self.mlp.fn(self.mlp.norm(rows), grid)
        if self.training:
            with torch.no_grad():
                kept = self.decay if bool(self.initted) else 0.0
                self.means.mul_(kept).add_(centres.detach() * (1 - kept))
                self.initted.fill_(True)
        return rows.transpose(1, 2).unflatten(2, grid)
