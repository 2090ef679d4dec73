"""The prices of a model's tokens, read off the formulas of its blocks."""

from __future__ import annotations

from torch import nn

from ..adapters.inspect import describe
from ..adapters.registry import find_family
from ..adapters.wrappers import backbone_of
from ..core.prices import BlockPrice, Prices
from .rows import block_rows, read_costs


def prices_of(model: nn.Module) -> Prices:
    """Multiply-adds of a model by the tokens in its blocks, at its own image size.

    Args:
        model: a served model, patched or not.

    Raises:
        ValueError: multiply-adds are no such sum (stages, windows, scans, attention among channels).
    """
    backbone = backbone_of(model)
    family, info = find_family(backbone), describe(backbone)
    costs = read_costs(backbone, family, info)
    rows = block_rows(costs, None)
    layout = info.layout
    if not family.scans and not info.restarts:
        prices = Prices(
            tuple(BlockPrice(m.qk + m.v + m.out, m.pair, m.mlp) for m in (block.macs() for block in costs.blocks)),
            sum(row.macs for row in rows if row.block is None),
            layout.num_prefix,
            layout.num_patches,
        )
        if prices.unpatched == sum(row.macs for row in rows):
            return prices
    raise ValueError(
        f"a loss on multiply-adds needs blocks whose cost follows from the tokens in attention and MLP; that of "
        f"{type(backbone).__name__} does not (stages, windows, a scan, or attention among channels); use a plain "
        "transformer"
    )
