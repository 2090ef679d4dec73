"""A reducing model whose blocks scan their tokens: what differs from models that attend."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ...core.recipe import Recipe
from ...core.tokens import Layout, Tokens
from ...ops.scan_order import from_scan, to_scan
from ..model import ReducingModel
from ..pooling import pool_plain
from .block import PLACES, ScanContext


class ScanModel(ReducingModel):
    """Mixin of scanning models; tokens carry the residual stream, prefix tokens in front, patches in scan order.

    A family's subclass gives `embed`, `scan_rows`, `drop_path_of` and `final_norm_of`.
    """

    def scan_rows(self, grid: tuple[int, int]) -> tuple[int, ...]:
        """Rows of the prefix tokens in the full sequence."""
        return ()

    def drop_path_of(self, index: int) -> nn.Module:
        """Stochastic depth of one block's mixer."""
        raise NotImplementedError

    has_class = False  # a class token is one place of the scan among others
    takes_added = False
    takes_gates = False

    def sequences(self, grid: tuple[int, int], recipe: Recipe | None) -> dict[int, Layout]:
        size = recipe is not None and recipe.track_size
        keep = recipe is not None and recipe.keeps_trace
        rows = self.scan_rows(grid)
        # positions are always tracked, they are the order of the scan
        layout = Layout(self.num_prefix_tokens, False, tuple(grid), size, True, keep_values=keep, scan_rows=rows)
        return {0: layout}

    def rope_of(self, rope: Any, index: int) -> ScanContext:
        """What one block needs besides tokens."""
        rules = [method.gap_rule for method in self.tokenzoo_recipe.methods if method.gap_rule is not None]
        return ScanContext(self.drop_path_of(index), rules[0] if rules else None)

    def features(self, tokens: Tokens) -> Tensor:
        """Normed tokens as one tensor in scan order, class tokens where a sequence of this length has them."""
        x = super().features(tokens)
        return to_scan(x, self._rows(x))

    def read(self, x: Tensor | Tokens) -> Tokens:
        return super().read(from_scan(x, self._rows(x)) if isinstance(x, Tensor) else x)

    def _rows(self, x: Tensor) -> tuple[int, ...]:
        """Where the head finds the prefix tokens in features [B, N, C]."""
        return self.scan_rows((1, x.shape[1] - self.num_prefix_tokens))

    def forward_features(self, x: Tensor) -> Tensor:
        """Normed tokens [B, N', C] in scan order, class tokens where the head expects them at this length.

        They are those that remain, or all of them where pooling weighs tokens by size or the recipe has dense=True.
        """
        return super().forward_features(x)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of images [B, C, H, W]."""
        return self.forward_head(self.forward_tokens(x))

    def forward_head(self, x: Tensor | Tokens, pre_logits: bool = False) -> Tensor:
        """Class scores, or pooled features.

        Args:
            x: `Tokens` from `forward_tokens`, or what `forward_features` returned.
            pre_logits: return pooled features [B, C].
        """
        tokens = self.read(x)
        if self.global_pool == "token":
            pooled = tokens.x[:, : tokens.layout.num_prefix].mean(1)
        elif self.global_pool:
            pooled = pool_plain(tokens, "avg", False, self.tokenzoo_recipe.mass_weighted_pool)
        else:
            pooled = to_scan(tokens.x, self._rows(tokens.x))
        pooled = self.head_drop(pooled)
        return pooled if pre_logits else self.head(pooled)


def check_recipe(model: nn.Module, recipe: Recipe) -> None:
    """Refuses recipes that a scanning model cannot follow.

    Raises:
        ValueError: places that these models lack, or two ways to decay.
    """
    name = type(model).__name__
    for method in recipe.methods:
        if method.place not in PLACES:
            raise ValueError(f"{method.name}: the place {method.place!r} does not exist in the blocks of {name}")
    if len({method.gap_rule for method in recipe.methods if method.gap_rule is not None}) > 1:
        raise ValueError(f"{name}: the recipe lets pruned positions decay in two ways; choose one rule for all methods")
