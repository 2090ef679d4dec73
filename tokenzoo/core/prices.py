"""Multiply-adds as a function of how many tokens are left, with gradient: what losses on a budget go by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .gate import Decision


class BlockPrice(NamedTuple):
    """Multiply-adds of one block of one image.

    Attributes:
        token: per token that attends (projections).
        pair: per pair of tokens that attend.
        mlp: per token of the MLP.
    """

    token: int
    pair: int
    mlp: int


class Prices(NamedTuple):
    """Multiply-adds of a model by the tokens in its blocks; those of deciding and merging are left out.

    Attributes:
        blocks: of every block.
        rest: in front of the blocks and behind them.
        prefix: prefix tokens.
        patches: patches of the unpatched model.
    """

    blocks: tuple[BlockPrice, ...]
    rest: int
    prefix: int
    patches: int

    @property
    def unpatched(self) -> int:
        """Multiply-adds of the model without reduction."""
        n = self.prefix + self.patches
        return self.rest + sum(b.token * n + b.pair * n * n + b.mlp * n for b in self.blocks)

    def share(self, attending: Sequence[Tensor], inside: Sequence[Tensor]) -> Tensor:
        """Share of the unpatched multiply-adds, in the shape of the counts, float32.

        Args:
            attending: patches that attend in every block.
            inside: patches in the MLP of every block.
        """
        total = torch.full_like(attending[0], self.rest / self.unpatched, dtype=torch.float32)
        for block, n, m in zip(self.blocks, attending, inside):
            n, m = n.float() + self.prefix, m.float() + self.prefix
            total = total + (block.token * n + block.pair * n * n + block.mlp * m) / self.unpatched
        return total

    def spent(self, records: Sequence[Decision], before: bool = False) -> Tensor:
        """Share of the unpatched multiply-adds that every image costs behind these decisions [B].

        Args:
            records: decisions of one forward pass, in the order of the blocks.
            before: they were made in front of attention; else between attention and MLP.
        """
        decided = {record.block: record for record in records}
        left = records[0].before.sum(1)
        attending, inside = [], []
        for index in range(len(self.blocks)):
            record, entered = decided.get(index), left
            left = left if record is None else record.after.sum(1)
            attending.append(left if before else entered)
            inside.append(left)
        return self.share(attending, inside)
