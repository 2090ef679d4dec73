"""What one block does about tokens, and what it costs, as plain data."""

from __future__ import annotations

from typing import NamedTuple

from ..core.method import Step
from ..core.tokens import Layout

OUTSIDE = ("embed", "norm")  # places that a model sees to, in front of its blocks and behind its final norm


class BlockPlan(NamedTuple):
    """What one block does about tokens; the only thing patching adds to it.

    Attributes:
        index: index of the block.
        depth: blocks of the model, or the block behind the last one that sees the same sequence.
        steps: methods in the order in which they act.
        proportional: attention adds log sizes.
        layout: layout at the model's own image size, used when the block is called with a plain tensor.
        outside: steps of the recipe in front of block 0 and behind the final norm; every block holds them, since any
            of them can come to be the first or the last one.
        total: blocks of the model when it was patched.
        name: where the block is in the model that was patched, "encoder.layer.3".
    """

    index: int
    depth: int
    steps: tuple[Step, ...]
    proportional: bool
    layout: Layout
    outside: tuple[Step, ...] = ()
    total: int = 0
    name: str = "a block"

    def at(self, place: str) -> tuple[Step, ...]:
        """The steps at one place."""
        if not self.steps and place not in OUTSIDE:
            return ()  # most blocks of most recipes, asked many times a pass
        return tuple(s for s in (self.outside if place in OUTSIDE else self.steps) if s.method.place == place)


class BlockMacs(NamedTuple):
    """Multiply-adds of a block by what they scale with.

    Attributes:
        qk: per token that is projected to queries and keys.
        v: per token that is projected to values.
        pair: per (query, key) pair.
        out: per token that leaves attention (output projection, gate).
        mlp: per token of the MLP.
    """

    qk: int
    v: int
    pair: int
    out: int
    mlp: int
