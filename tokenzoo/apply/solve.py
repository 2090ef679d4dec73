"""Solving for a budget: the strength whose multiply-adds are nearest to a share of the unpatched model's."""

from __future__ import annotations

from torch import nn

from ..adapters.backbone import BackboneInfo, Family
from ..core.recipe import Recipe
from ..cost.rows import block_rows, read_costs


def check_share(share: float) -> None:
    """Refuses what is no share."""
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
        raise ValueError(f"flops={share!r}; give a share of the unpatched multiply-adds in (0, 1], such as 0.6")


def solve_flops(
    backbone: nn.Module, family: Family, recipe: Recipe, info: BackboneInfo, share: float, at_most: bool = False
) -> Recipe:
    """The recipe at the strength whose multiply-adds are nearest to a share of the unpatched model's.

    Args:
        backbone: the unpatched model.
        family: the family that serves it.
        recipe: methods whose strength is solved for, all at the same relative strength.
        info: layout at the resolution that counts.
        share: target in (0, 1].
        at_most: nothing above the share, however near it is.

    Raises:
        ValueError: the share is outside (0, 1], or below what the methods can reach.
    """
    check_share(share)
    costs = read_costs(backbone, family, info)
    base = sum(row.macs for row in block_rows(costs, None))

    def reached(t: float) -> tuple[Recipe, float]:
        dialled = recipe.dial(t, info.depth, info.layout, info.restarts)
        return dialled, sum(row.macs for row in block_rows(costs, dialled)) / base

    def distance(found: tuple[Recipe, float]) -> tuple[bool, float]:
        return at_most and found[1] > share, abs(found[1] - share)

    (weakest, high), (strongest, low) = reached(0.0), reached(1.0)
    if share < low - (0 if at_most else 0.005):
        raise ValueError(
            f"flops={share} cannot be reached: at full strength {', '.join(m.name for m in recipe.methods)} leaves "
            f"{low:.3f} of the multiply-adds; act in earlier layers or ask for more"
        )
    best = min((weakest, high), (strongest, low), key=distance)
    bottom, top = 0.0, 1.0
    for _ in range(20 if at_most else 40):  # a millionth of the strength decides no count
        middle = (bottom + top) / 2
        found = reached(middle)
        best = min(best, found, key=distance)
        bottom, top = (middle, top) if found[1] > share else (bottom, middle)
    return best[0]
