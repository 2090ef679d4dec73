"""Some tokens run through a block and the others go around it, all of them weighed by a router."""

from __future__ import annotations

from torch import Tensor

from ..ops.rows import take_rows
from .keep import KeepMap


class RoutedMap(KeepMap):
    """Around the branches of a block: kept tokens attend among themselves, the others keep their values, weighed.

    With weights w: a kept token gets x + attention, then + w * MLP; a skipped one w * x in all (p-MoD's symmetric
    weighting). The way back of both branches together does that; the map itself selects rows.

    Args:
        idx: old index of every kept token [B, N'].
        n_in: N.
        weight: [B, N], with gradient; 1 for prefix tokens.
        x: values of the residual stream in front of the block [B, N, C].
        valid: as for `KeepMap`.
        branch: the branch whose way back this is.

    Source: Zhang, Meng, Lu et al., "p-MoD: Building Mixture-of-Depths MLLMs via Progressive Ratio Decay", ICCV 2025.
    """

    def __init__(
        self, idx: Tensor, n_in: int, weight: Tensor, x: Tensor, valid: Tensor | None = None, branch: str = "attention"
    ) -> None:
        super().__init__(idx, n_in, valid)
        self.weight, self.x, self.branch = weight, x, branch

    def of_branch(self, branch: str) -> RoutedMap:
        return RoutedMap(self.idx, self.n_in, self.weight, self.x, self.valid, branch)

    def back(self, y: Tensor) -> Tensor:
        weight = self.weight.unsqueeze(-1)
        if self.branch == "mlp":
            return self.lift((take_rows(weight, self.idx) * y).to(y.dtype))
        return self.lift(y, ((weight - 1) * self.x).to(y.dtype))
