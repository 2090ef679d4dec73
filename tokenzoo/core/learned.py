"""Methods that learn what to decide: their training form, what their decisions owe, and what these losses go by."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple, final

import torch.nn.functional as F
from torch import Tensor

from ..maps import GatedMergeMap, GateMap, Moves, NoteMap, TokenMap
from .gate import Decision, Gate
from .prices import Prices
from .step import Step
from .tokens import Tokens

__all__ = ["Decision", "Gate", "Learned", "Note", "Teaching"]


class Teaching(NamedTuple):
    """What losses go by besides decisions; a field is None where nobody asked for it, or nobody has it.

    Attributes:
        logits: what a teacher says about the same images [B, K].
        tokens: its normed patch tokens [B, H * W, C] in raster order.
        layers: its patch tokens [B, H * W, C] behind every block, before the final norm.
        answers: what the model itself says [B, K].
        target: class indices [B], or soft targets [B, K].
        prices: multiply-adds of the model by its tokens, for methods that are `priced`.
    """

    logits: Tensor | None = None
    tokens: Tensor | None = None
    layers: tuple[Tensor, ...] | None = None
    answers: Tensor | None = None
    target: Tensor | None = None
    prices: Prices | None = None


class Note(NamedTuple):
    """Anything else that a learned method notes in a block for its losses.

    Attributes:
        order: number of the method in its recipe.
        block: index of the block.
        value: a tensor, or a tuple or dict of tensors.
    """

    order: int
    block: int
    value: Any


class Learned:
    """Mixin of methods with a learned module and losses of their own; stands in front of the base class.

    `Method.module` makes the module of a block, `Method.map` reads it as `signals.module`. In training
    (`signals.training`) `map` returns `self.gated(...)`, else a map that really removes tokens.
    """

    owes: ClassVar[tuple[str, ...]] = ()  # names of the losses
    asks: ClassVar[tuple[str, ...]] = ()  # fields of `Teaching` that the losses cannot do without
    gates: ClassVar[bool] = True  # whether it trains with a GateMap, which needs a model that attends
    priced: ClassVar[bool] = False  # whether its losses look at `Teaching.prices`
    # beginning of a released name -> beginning of the name in the module of a block, see `tokenzoo.apply.released`;
    # {stage} counts the blocks that reduce, {block} all of them
    released: ClassVar[dict[str, str]] = {}

    def losses(self, records: tuple[Any, ...], teaching: Teaching) -> dict[str, Tensor]:
        """What its decisions in one forward pass add to the loss of training, by the names in `owes`.

        Args:
            records: its decisions and notes, in the order of the blocks.
            teaching: what a teacher offers, and what else is known of the pass.

        Returns:
            Scalars, weighted by the method's own options.
        """
        return {}

    def asked(self) -> tuple[str, ...]:
        """Fields of `Teaching` that the losses want with these options."""
        return self.asks

    @final
    def noted(self, value: Any, tokens: Tokens, step: Step, token_map: TokenMap | None = None) -> TokenMap:
        """A map with a `Note` for the losses; without a map, one that leaves the tokens alone.

        Args:
            value: what is noted.
            tokens: the tokens that `map` got.
            step: the step that `map` got.
            token_map: the map, None for none.
        """
        note = Note(step.order, step.block, value)
        if token_map is None:
            return NoteMap(tokens.x, note)
        token_map.decision = note
        return token_map

    @final
    def gated(
        self,
        gate: Tensor,
        tokens: Tokens,
        step: Step,
        share: float | None = None,
        scores: Tensor | None = None,
        sees_itself: bool = False,
        moves: Moves | None = None,
    ) -> GateMap:
        """The training form of keeping some patches, with its decision on record.

        Args:
            gate: [B, M] of the patches, 1 to keep and 0 to drop, with the gradient of the predictor
                (`torch.nn.functional.gumbel_softmax(..., hard=True)`, say).
            tokens: the tokens that `map` got.
            step: the step that `map` got.
            share: share of the patches to keep, for the record.
            scores: what the predictor said [B, M, ...], for the record.
            sees_itself: see `GateMap`.
            moves: which patches [B, M] merge into which; their gates are closed. None where none do.

        Raises:
            ValueError: gates of another shape.
        """
        prefix = tokens.layout.num_prefix
        if gate.shape != (tokens.x.shape[0], tokens.num_patches):
            raise step.error(
                f"gates have shape {tuple(gate.shape)}; give one per image and patch, "
                f"({tokens.x.shape[0]}, {tokens.num_patches}), prefix tokens left out"
            )
        gate = gate.float()
        decision = Decision(step.order, step.block, gate, tokens.left[:, prefix:], share, scores)
        gate = F.pad(gate, (prefix, 0), value=1.0)
        if moves is not None:
            return GatedMergeMap(gate, moves.behind(prefix), sees_itself, decision)
        return GateMap(gate, sees_itself, decision)


def needs_training(cls: type) -> bool:
    """Whether a method, as it comes, has modules that have to be trained (`learned=False` switches them off)."""
    return issubclass(cls, Learned) and bool(getattr(cls, "learned", True))
