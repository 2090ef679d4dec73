"""A cheap guess of an attention map, and the entries of it that are worth computing."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class MaskPredictor(nn.Module):
    """Low-rank guess of the attention of every head: queries against few mixtures of keys, spread back by a basis.

    Names and numbers are those of the released code, its scale by the number of heads and the absolute value of the
    basis included.

    Args:
        tokens: tokens of the sequence, class token in front included.
        head_dim: width of a head.
        heads: heads of the block.
        reduce_n: tokens per mixture.
        reduce_c: factor by which a head gets narrower.
        coefficients: mixtures of a query that count.
        coefficient_threshold: least coefficient that counts instead, None for `coefficients`.
        basis_threshold: entries of the basis up to this are none.

    Source: Wei, Duke, Jiang, Aarabi, Taylor, Shkurti, "Sparsifiner: Learning Sparse Instance-Dependent Attention for
    Efficient Vision Transformers", CVPR 2023, and the repository lim142857/Sparsifiner.
    """

    def __init__(
        self, tokens: int, head_dim: int, heads: int, reduce_n: int = 6, reduce_c: int = 2, coefficients: int = 8,
        coefficient_threshold: float | None = None, basis_threshold: float = 0.02,
    ) -> None:  # fmt: skip
        super().__init__()
        rank, width = max(1, tokens // reduce_n), max(1, head_dim // reduce_c)
        self.coefficients, self.coefficient_threshold = min(coefficients, rank), coefficient_threshold
        self.basis_threshold, self.scale = basis_threshold, heads**-0.5
        self.proj_n = nn.Parameter(torch.empty(tokens, rank))
        self.proj_back_n = nn.Parameter(torch.empty(tokens, rank))
        self.proj_c_q = nn.Linear(head_dim, width)
        self.proj_c_k = nn.Linear(head_dim, width)
        for parameter in (self.proj_n, self.proj_back_n):
            nn.init.trunc_normal_(parameter, std=0.02)

    def forward(
        self, q: Tensor, k: Tensor, places: Tensor | None = None, prefix: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Coefficients of the patches' queries [B, H, N - prefix, K], all of them, and the basis [B or 1, K, N].

        Args:
            q, k: [B, H, N, D].
            places: row of every token in the original sequence [B, N], -1 for one without; None while all are there.
            prefix: tokens in front, whose queries are left out.
        """
        down, up = self.proj_n.float(), self.proj_back_n.float()
        if places is None:
            down, up = down.unsqueeze(0), up.unsqueeze(0)
        else:
            there = (places >= 0).unsqueeze(-1)
            down, up = (rows[places.clamp(min=0)] * there for rows in (down, up))
        q, k = (t.to(self.proj_c_q.weight.dtype) for t in (q, k))
        narrow = self.proj_c_k(k).float().transpose(2, 3) @ down.unsqueeze(1)  # [B, H, D', K]
        guess = self.proj_c_q(q[:, :, prefix:]).float() @ narrow * self.scale
        return guess.softmax(-1), up.transpose(1, 2)

    def guess(self, coefficient: Tensor, basis: Tensor) -> Tensor:
        """The map in full, with gradient [B, H, N - prefix, N]."""
        return coefficient @ basis.unsqueeze(1)

    def sparse(self, coefficient: Tensor) -> Tensor:
        """Coefficients that count, the others 0."""
        if self.coefficient_threshold is not None:
            return coefficient * (coefficient > self.coefficient_threshold)
        best = coefficient.topk(self.coefficients, dim=-1)
        return torch.zeros_like(coefficient).scatter(-1, best.indices, best.values)

    def scores(self, coefficient: Tensor, basis: Tensor) -> Tensor:
        """The map that the mask is read off [B, H, N - prefix, N]."""
        basis = basis.abs()
        return self.sparse(coefficient) @ (basis * (basis > self.basis_threshold)).unsqueeze(1)


def best_entries(scores: Tensor, keep: float, total: int, columns: Tensor | None = None) -> Tensor:
    """The best entries of every row [..., N] bool; of equal ones the first, so that padding behind changes nothing.

    Args:
        scores: [B, H, R, N].
        keep: share of the entries to keep.
        total: entries that the share is of.
        columns: [B, N] bool, tokens that may be looked at; None for all. Rows keep no more than there are of them.
    """
    count = min(math.ceil(keep * total), scores.shape[-1])
    if columns is not None:
        scores = scores.masked_fill(~columns[:, None, None, :], float("-inf"))
    least = scores.topk(count, dim=-1).values[..., -1:]
    above, level = scores > least, scores == least  # most entries of a sparse guess are 0
    mask = above | (level & (level.cumsum(-1, dtype=torch.int32) <= count - above.sum(-1, keepdim=True)))
    return mask if columns is None else mask & columns[:, None, None, :]
