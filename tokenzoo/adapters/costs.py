"""Multiply-adds of one reducing block, by formula."""

from __future__ import annotations

from ..core.method import BlockShape, Step
from ..core.tokens import Layout
from .block import BlockMacs


def block_cost(
    macs: BlockMacs, shape: BlockShape, steps: list[tuple[Step, int, int]], n: int, layout: Layout
) -> tuple[int, int, int]:
    """(tokens out, multiply-adds, the part that reduction costs) of one block that n tokens enter.

    Args:
        macs: what the block costs without methods.
        shape: its sizes.
        steps: what acts in it, tokens before and after each.
        n: tokens that enter.
        layout: the sequence.
    """
    reduction = 0
    by_place: dict[str, list[tuple[Step, int, int]]] = {}
    for step, before, after in steps:
        by_place.setdefault(step.method.place, []).append((step, before, after))
        reduction += step.method.macs(before, after, shape, layout, step)

    def through(place: str, n: int) -> int:
        return by_place[place][-1][2] if place in by_place else n

    for step, before, _ in (*by_place.get("before", ()), *by_place.get("around", ())):
        if step.method.reads_attention:
            reduction += macs.qk * before  # projected for the decision alone
    n = through("before", through("embed", n))
    merged = through("ahead", n)
    kept = through("queries", merged)
    inside = inside_branch("attention", by_place.get("around", []), n, layout)
    if inside is not None:
        total = (macs.qk + macs.v + macs.pair * inside + macs.out) * inside
    else:
        pairs = n * n if "ahead" in by_place else kept * n
        total = macs.qk * n + macs.v * merged + macs.pair * pairs + macs.out * kept
    between = through("between", kept)
    inside = inside_branch("mlp", by_place.get("around", []), between, layout)
    total += macs.mlp * (between if inside is None else inside)
    return through("norm", through("after", between)), total + reduction, reduction


def inside_branch(branch: str, around: list[tuple[Step, int, int]], n: int, layout: Layout) -> int | None:
    """Tokens inside a branch that n tokens enter, None where nothing merges around it."""
    steps = [step for step, _, _ in around if branch in step.branches]
    for step in steps:
        n = step.method.tokens_inside(n, step, layout)
    return n if steps else None
