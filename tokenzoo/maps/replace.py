"""Groups of tokens whose new value is given, not computed from theirs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.rows import take_rows
from .base import TokenMap


class ReplaceMap(TokenMap):
    """Groups tokens as another map does and sets the last new tokens to given values (patches cut anew, say).

    Side data, the way back and quantities of another kind follow the grouping; only `apply` knows the values.

    Args:
        grouping: the map that says which tokens belong together, the groups with given values last.
        values: values of the last S new tokens [B, S, C].
        computed: [B, S] bool, groups that get the mean of their members after all; None for no group.
    """

    linear = False

    def __init__(self, grouping: TokenMap, values: Tensor, computed: Tensor | None = None) -> None:
        self.grouping, self.values, self.computed = grouping, values, computed
        self.n_in, self.n_out, self.valid, self.drops = grouping.n_in, grouping.n_out, grouping.valid, grouping.drops
        self.whole = grouping.whole

    @property
    def heads(self) -> Tensor:
        return self.grouping.heads

    @property
    def assign(self) -> Tensor:
        return self.grouping.assign

    def masked(self, visible: Tensor) -> ReplaceMap:
        # a given value holds what is hidden in its group: mixed groups get the mean of their visible members
        count, seen = self.values.shape[1], visible.unsqueeze(-1).float()
        mixed = (self.pool(seen) > 0) & (self.pool(1 - seen) > 0)
        return ReplaceMap(self.grouping.masked(visible), self.values, mixed[:, self.n_out - count :, 0])

    def apply(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.values.shape[-1]:
            raise ValueError(
                f"ReplaceMap holds values of {self.values.shape[-1]} channels, but was applied to {x.shape[-1]}; "
                "use grouping.apply for other quantities"
            )
        alone, values = self.n_out - self.values.shape[1], self.values.to(x.dtype)
        if self.computed is not None:
            means = self.grouping.apply(x)[:, alone:]
            values = torch.where(self.computed.unsqueeze(-1), means, values)
        return torch.cat([take_rows(x, self.heads[:, :alone]), values], dim=1)

    def means(self, x: Tensor) -> Tensor:
        return self.grouping.means(x)  # the values that the map sets are those of the tokens it was made for

    def lift(self, y: Tensor, dropped: Tensor | None = None) -> Tensor:
        return self.grouping.lift(y, dropped)

    def membership(self) -> Tensor:
        return self.grouping.membership()

    def pool(self, mass: Tensor) -> Tensor:
        return self.grouping.pool(mass)

    def matrix(self) -> Tensor:
        raise TypeError("ReplaceMap sets values that do not follow from the old ones: it has no matrix")
