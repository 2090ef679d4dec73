"""One method acting in one block, and the sizes of a block that formulas need."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..maps import TokenMap
from .graphs import why_counts_are_unknown
from .raster import in_raster_order
from .resolved import Resolved
from .signals import Signals
from .tokens import Layout, Tokens


class Step(NamedTuple):
    """One method acting in one block.

    Attributes:
        method: the method.
        block: index of the block.
        strength: the method's own measure for this block (tokens to remove, share to keep, ...).
        key: name of the method's learned module inside the block, None for methods without parameters.
        scorer: number of the method among those of the recipe that carry scores or remember something, see
            `Tokens.seen_by` and `Tokens.remembered`.
        known: counts at the model's own image size; None outside of a patched block.
        order: number of the method in its recipe.
    """

    method: Any
    block: int
    strength: Any
    key: str | None = None
    scorer: int = 0
    known: Resolved | None = None
    order: int = 0

    def tokens_out(self, n: int, layout: Layout) -> int:
        """Tokens after the step when `n` come in, prefix included; raises ValueError if the strength is unreachable.

        Around branches, the sequence keeps its length.
        """
        if self.known is not None and self.known.holds(layout) and n == self.known.n:
            return self.known.n_out
        left = self.method.tokens_out(n, self, layout)
        return n if self.method.place == "around" else left

    def decide(self, tokens: Tokens, signals: Signals | None) -> TokenMap | None:
        """The map that the method decides here, None to leave the tokens alone.

        Tokens that a mask hides weigh nothing in it beside visible ones.

        Raises:
            ValueError: counts depend on the images, and these cannot be looked at.
        """
        # asked for in this order, a compiled graph does not depend on the options that `data_dependent` looks at
        if (why := why_counts_are_unknown(tokens.x)) is not None and self.method.data_dependent:
            fixed = self.method.static_option
            raise self.error(
                f"keeps as many tokens as the images ask for, {why}; set a fixed budget"
                + (f", such as {fixed}" if fixed else "")
            )
        if tokens.layout.own_grids and self.method.uses_positions:
            raise self.error(
                "looks at places on one patch grid, but the images of this batch have grids of their own; give images "
                "of one size, without padding, or use a method that looks at values alone"
            )
        token_map = self.method.map(tokens.seen_by(self.scorer), signals, self)
        if token_map is None or token_map.notes:
            return token_map
        decided = token_map
        if tokens.visible is not None:
            decided = decided.masked(tokens.visible)
        if tokens.layout.raster and not self.branches:
            decided = in_raster_order(decided, tokens)
        if decided is not token_map and token_map.decision is not None:
            decided.decision = token_map.decision
        return decided

    def count(self, n: int, layout: Layout) -> Any:
        """`Method.count` of n tokens, prefix included."""
        if self.known is not None and self.known.holds(layout):
            if n == self.known.n:
                return self.known.count
            if n < len(self.known.fewer):
                return self.known.fewer[n]
        return self.method.count(n, self, layout)

    def resolved(self, n: int, n_out: int, layout: Layout, padded: bool) -> Step:
        """The same step with its counts worked out.

        Args:
            n: tokens that enter, prefix included.
            n_out: tokens that leave.
            layout: the sequence.
            padded: images can have fewer real tokens than n.
        """
        plain = self._replace(known=None)
        fewer = tuple(self.method.count(i, plain, layout) for i in range(n)) if padded else ()
        known = Resolved(n, tuple(layout.grid), n_out, self.method.count(n, plain, layout), fewer)
        return self._replace(known=known)

    @property
    def branches(self) -> tuple[str, ...]:
        """Branches that the method acts around."""
        return self.method.acts_at.branches

    def error(self, message: str) -> ValueError:
        """A ValueError that names the method and the block."""
        return ValueError(f"{self.method.name} at block {self.block}: {message}")


class BlockShape(NamedTuple):
    """Sizes of a block that cost formulas need.

    Attributes:
        dim: channels of the residual stream.
        num_heads: query heads (of both halves in differential attention).
        head_dim: width of a query.
        mixing: multiply-adds of mixing the logits of one pair over heads that talk; 0 for all others.
    """

    dim: int
    num_heads: int
    head_dim: int
    mixing: int = 0

    @property
    def entry(self) -> int:
        """Multiply-adds of reading one entry of the maps of all heads."""
        return self.num_heads * self.head_dim + self.mixing
