"""Relative strengths where the sequence begins anew inside the model: every part counts the tokens of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from .method import Method, Step
from .tokens import Layout


def dial_in_parts(method: Method, t: float, depth: int, layouts: Mapping[int, Layout]) -> Method:
    """A method at relative strength t in [0, 1] on a model whose sequence begins anew at some blocks.

    Counts that the method sets block by block are those of each part alone. One value for all blocks is that of the
    first part whose strongest setting all parts can follow.

    Args:
        method: the method.
        t: 0 removes nothing, 1 as much as it can.
        depth: blocks of the model.
        layouts: first block of every part and the sequence that it sees.
    """
    if method.layers == "others":
        return method.dial(t, depth, layouts[0])
    layers = sorted(method.resolve_layers(depth))
    parts: dict[int, list[int]] = {}
    for block in layers:
        parts.setdefault(max(first for first in layouts if first <= block), []).append(block)
    firsts = list(parts) or [0]
    if len(firsts) == 1:
        return method.dial(t, depth, layouts[firsts[0]])

    def dialled(t: float, first: int) -> Method:
        whole = method.dial(t, depth, layouts[first])
        alone = {i: replace(method, layers=tuple(blocks)).dial(t, depth, layouts[i]) for i, blocks in parts.items()}
        counts = {}
        for name in set(method.options()) - {"layers"}:
            values = [(getattr(part, name), len(parts[i])) for i, part in alone.items()]
            if _is_list(getattr(whole, name), len(layers)) and all(_is_list(*value) for value in values):
                counts[name] = tuple(entry for value, _ in values for entry in value)
        return replace(whole, **counts)

    reachable = (first for first in firsts if _is_reachable(dialled(1.0, first), depth, layouts))
    return dialled(t, next(reachable, firsts[0]))


def _is_list(value: object, length: int) -> bool:
    return isinstance(value, tuple) and len(value) == length


def _is_reachable(method: Method, depth: int, layouts: Mapping[int, Layout]) -> bool:
    """Whether every block has the tokens that the method asks of it."""
    strengths, layout, n = method.strengths(depth), layouts[0], 0
    try:
        for block in range(depth):
            if block in layouts:
                layout = layouts[block]
                n = layout.num_prefix + layout.num_patches
            if block in strengths:
                n = Step(method, block, strengths[block]).tokens_out(n, layout)
    except ValueError:
        return False
    return True
