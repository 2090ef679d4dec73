"""Hooks that few methods need, each in a mixin of its own."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from ..maps import TokenMap
from ..ops.attention import Heads
from ..ops.map_reading import MapStatistics
from .step import BlockShape, Step
from .tokens import Layout, Tokens, TraceStep


def scanned_rows(tokens: Tokens) -> tuple[int, ...] | Tensor:
    """Where the prefix tokens are in the scanned sequence."""
    return tokens.layout.scan_rows if tokens.rows is None else tokens.rows


class Scanning:
    """Mixin of methods that say where prefix tokens go in the sequence that is scanned."""

    def scan_rows(self, tokens: Tokens, token_map: TokenMap, step: Step) -> tuple[int, ...] | Tensor | None:
        """Where the prefix tokens go in the scanned sequence, None to stay between their neighbours.

        Args:
            tokens: the tokens before the map; `tokens.rows` is where they are.
            token_map: the map.
            step: this method in this block.
        """
        return None


class Restoring:
    """Mixin of methods that have options for the way back to the full grid."""

    def lift_trace(self, trace: tuple[TraceStep, ...]) -> tuple[TraceStep, ...]:
        """The trace as the way back to the full grid should read it."""
        return trace


class Companion:
    """Mixin of methods that work with some other methods of their recipe, and not with others."""

    def check_recipe(self, methods: tuple[Any, ...], depth: int) -> None:
        """Refuses recipes that the method cannot be part of.

        Args:
            methods: all methods of the recipe in order, this one included.
            depth: blocks of the model.
        """


class Remembering:
    """Mixin of methods that keep something of the tokens in front of their first block, with the trait `remembers`."""

    def remember(self, tokens: Tokens, step: Step) -> Tensor:
        """What stays at hand of the tokens that enter the first block [B, ...]; for methods with the trait `remembers`.

        Maps leave it alone, so it speaks of original places. Later blocks read it as `tokens.remembered(step.scorer)`.

        Args:
            tokens: what enters the block.
            step: this method in this block.
        """
        raise NotImplementedError(f"{type(self).__name__} remembers something: define remember(tokens, step)")


class Beside(NamedTuple):
    """What else there is where a method runs attention itself.

    Attributes:
        z: what the layer reads [B, N, C].
        step: this method in this block.
        module: its learned module there, None without.
        training: whether the block is in training mode.
        first: heads of the layers in front of this one, where several stand side by side.
    """

    z: Tensor
    step: Step
    module: nn.Module | None = None
    training: bool = False
    first: int = 0


class Attended(NamedTuple):
    """What a method that runs attention itself gives.

    Attributes:
        out: [B, N, H * Dv].
        seen: what was read of the map on the way, None for nothing.
        note: for the losses of a learned method, which gets it as `core.learned.Note`; None for nothing.
    """

    out: Tensor
    seen: MapStatistics | None = None
    note: Any = None


class OwnAttention:
    """Mixin of methods that may run attention themselves, with the trait `attends`."""

    def attend(self, heads: Heads, bias: Tensor | None, tokens: Tokens, beside: Beside) -> Attended | None:
        """Output of one attention layer and what was read of its map, None to leave it to the layer.

        For methods between attention and MLP with the trait `attends`; what was read is `signals.map_statistics`.

        Args:
            heads: the projected heads.
            bias: bias of the logits, see `ops.attention.attend`.
            tokens: the tokens that attend.
            beside: what else there is.
        """
        return None

    def pairs(self, n: int, layout: Layout, step: Step) -> int:
        """Pairs of query and key that are computed where n tokens attend, prefix included."""
        return n * n


class Shaped:
    """Mixin of methods whose learned modules need to know more of a block than its channels."""

    def module_of(self, shape: BlockShape, layout: Layout, step: Step) -> nn.Module | None:
        """The learned module of one block, in place of `Method.module`; None for a block without.

        Args:
            shape: channels, heads and their width.
            layout: the sequence that the block belongs to, at the model's own image size.
            step: see `Method.module`.
        """
        raise NotImplementedError(f"{type(self).__name__} makes modules by shape: define module_of(...)")


HOOKS = {
    Scanning: "scan_rows", Restoring: "lift_trace", Companion: "check_recipe", Remembering: "remember",
    OwnAttention: "attend", Shaped: "module_of",
}  # fmt: skip
