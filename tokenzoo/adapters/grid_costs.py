"""Multiply-adds of the way to the grid and back around layers that look at neighbours, by formula."""

from __future__ import annotations

from ..core.method import Step
from .flow import Acting, Flow

_SEEN = 25  # cells that a token gives a share to where tokens are clustered softly


def count_dropped(step: Step, before: int, after: int) -> int:
    """Tokens without one that stands for them; where images differ, all are looked at."""
    if not step.method.drops_in(step):
        return 0
    if step.method.pads:
        return before
    return before - after + (step.method.fuses and before != after)


def way_back(trace: tuple[Acting, ...], dim: int, width: int, flow: Flow) -> int:
    """Multiply-adds of giving every place a value of some width, where the residual stream has dim channels."""
    macs, recipe = 0, flow.recipe
    for step, before, after in trace:
        if step.method.opens_span:
            macs += before * after * (dim + width)  # distances to the centres, and the mix
        elif back := step.method.products(before, after, flow.layout)[1]:
            macs += back * width
        elif recipe is not None and recipe.fill.kind == "nearest":
            macs += count_dropped(step, before, after) * after * dim
    return macs


def to_grid_and_back(trace: tuple[Acting, ...], dim: int, width: int, flow: Flow) -> int:
    """`way_back`, and of giving the tokens what a layer made of the values."""
    macs, recipe = way_back(trace, dim, width, flow), flow.recipe
    products = [step.method.products(before, after, flow.layout)[0] for step, before, after in trace]
    kept = all(step.method.drops_in(step) and not step.method.merges_in(step) for step, _, _ in trace)
    if kept and not any(products):
        return macs
    nearest = recipe is not None and recipe.fill.kind == "nearest"
    if not any(step.method.opens_span or (nearest and count_dropped(step, n, out)) for step, n, out in trace) and (
        not any(products)
    ):
        return macs + trace[0][1] * width  # one weighted sum over all places
    for (step, before, after), product in zip(trace, products):
        if step.method.opens_span:
            macs += before * min(after, _SEEN) * width
        elif product:
            macs += product * width
        elif step.method.merges_in(step):
            macs += (before if step.method.fuses else before - after) * width
    return macs
