"""Groups of tokens whose new value is given, not computed from theirs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..rows import take_rows
from .base import TokenMap


class ReplaceMap(TokenMap):
    """Groups tokens as another map does and sets the last new tokens to given values (patches cut anew, say).

    Side data, the way back and quantities of another kind follow the grouping; only `apply` knows the values.

    Args:
        grouping: the map that says which tokens belong together, the groups with given values last.
        values: values of the last S new tokens [B, S, C].
    """

    linear = False

    def __init__(self, grouping: TokenMap, values: Tensor) -> None:
        self.grouping, self.values = grouping, values
        self.n_in, self.n_out, self.valid, self.drops = grouping.n_in, grouping.n_out, grouping.valid, grouping.drops
        self.whole = grouping.whole

    @property
    def heads(self) -> Tensor:
        return self.grouping.heads

    @property
    def assign(self) -> Tensor:
        return self.grouping.assign

    def apply(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.values.shape[-1]:
            raise ValueError(
                f"ReplaceMap holds values of {self.values.shape[-1]} channels, but was applied to {x.shape[-1]}; "
                "use grouping.apply for other quantities"
            )
        kept = take_rows(x, self.heads[:, : self.n_out - self.values.shape[1]])
        return torch.cat([kept, self.values.to(x.dtype)], dim=1)

    def pool(self, mass: Tensor) -> Tensor:
        return self.grouping.pool(mass)

    def matrix(self) -> Tensor:
        raise TypeError("ReplaceMap sets values that do not follow from the old ones: it has no matrix")
