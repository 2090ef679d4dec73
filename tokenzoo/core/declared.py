"""What a method declares in its `traits`, as the rest of the library asks for it."""

from __future__ import annotations

from typing import Any, ClassVar

from .step import Step
from .tokens import Layout
from .traits import Place, Traits


class Declared:
    """Reads traits: values stand as they are, functions are asked with the method.

    A method overrides nothing of this; it writes `traits = Traits(...)`.
    """

    kind: ClassVar[str]
    traits: ClassVar[Traits]

    def _of(self, value: Any) -> Any:
        return value(self) if callable(value) else value

    def _scan(self, name: str) -> Any:
        return None if self.traits.scans is None else self._of(getattr(self.traits.scans, name))

    @property
    def acts_at(self) -> Place:
        """Where in a block the method acts."""
        return self._of(self.traits.place)

    @property
    def place(self) -> str:
        """Its name, one of `traits.PLACES`."""
        place = self.traits.place  # asked for often in every block: no call more than it takes
        return place(self).name if callable(place) else place.name

    @property
    def matches_once(self) -> bool:
        """Whether one map per block serves all branches that the method acts around."""
        return self.acts_at.once

    @property
    def merges_stream(self) -> bool:
        """Whether the residual stream merges, in front of the norm of a branch."""
        return self.acts_at.stream

    @property
    def replaces_attention(self) -> bool:
        """Whether the method is another form of attention."""
        return self.acts_at.replaces_attention

    @property
    def uses_size(self) -> bool:
        """Whether token sizes have to be kept."""
        return self.traits.sizes or self.proportional or self.mass_weighted_pool

    @property
    def proportional(self) -> bool:
        """Whether attention adds log sizes to the keys (proportional attention)."""
        return self._of(self.traits.proportional)

    @property
    def mass_weighted_pool(self) -> bool:
        """Whether average pooling weighs tokens by size."""
        return self._of(self.traits.mass_pool)

    @property
    def uses_positions(self) -> bool:
        """Whether the original place of each token has to be kept."""
        return self.traits.positions

    @property
    def reads_attention(self) -> bool:
        """Whether the decision looks at queries or keys."""
        return self.traits.reads_attention

    @property
    def reads_maps(self) -> bool:
        """Whether the decision looks at attention between tokens."""
        return self._of(self.traits.reads_maps)

    @property
    def merges(self) -> bool:
        """Whether tokens come to stand for several patches."""
        declared = self._of(self.traits.merges)
        return "merge" in self.kind or "fuse" in self.kind if declared is None else declared

    @property
    def drops(self) -> bool:
        """Whether tokens may be left without a new one of their own (kept ones stay as they are)."""
        return "prune" in self.kind

    def drops_in(self, step: Step) -> bool:
        """`drops` in one block."""
        return self.drops if self.traits.either is None else self.traits.either(self, step)

    def merges_in(self, step: Step) -> bool:
        """`merges` in one block."""
        return self.merges if self.traits.either is None else not self.traits.either(self, step)

    @property
    def fuses(self) -> bool:
        """Whether one token more stands for all that are left out."""
        return "fuse" in self.kind

    @property
    def mixes(self) -> bool:
        """Whether values of tokens are mixed."""
        declared = self._of(self.traits.mixes)
        return self.kind not in ("prune", "sample") if declared is None else declared

    @property
    def serves_scans(self) -> bool:
        """Whether the method works on models that scan their tokens."""
        return self.traits.scans is not None

    @property
    def reads_scan(self) -> bool:
        """Whether it works on no others."""
        return bool(self._scan("reads"))

    @property
    def keeps_scan_values(self) -> bool:
        """Whether the mixer has to hand out the values of its scan."""
        values = self._scan("values")
        return self.reads_scan if values is None else values

    @property
    def keeps_order(self) -> bool:
        """Whether maps leave patches in the order of the scan by themselves."""
        return bool(self._scan("ordered"))

    @property
    def gap_rule(self) -> str | None:
        """How pruned positions let the state of a scan decay; None: not at all."""
        return self._scan("gap_rule")

    @property
    def scores_tokens(self) -> bool:
        """Whether the method carries a score of every token from block to block."""
        return self.traits.carries

    @property
    def remembers(self) -> bool:
        """Whether something of the tokens that enter the first block it acts in stays at hand."""
        return self._of(self.traits.remembers)

    @property
    def attends(self) -> bool:
        """Whether the method may run attention itself."""
        return self._of(self.traits.attends)

    @property
    def opens_span(self) -> bool:
        """Whether a later method may rebuild the tokens that this one reduces."""
        return self.traits.opens_span

    @property
    def closes_span(self) -> bool:
        """Whether the method rebuilds the tokens in front of the last open span, inside the model."""
        return self._of(self.traits.closes_span)

    @property
    def keeps_trace(self) -> bool:
        """Whether the forward pass has to remember its maps."""
        return self._of(self.traits.keeps_trace)

    @property
    def decodes_reduced(self) -> bool:
        """Whether the method was published with decoders that run on the reduced tokens."""
        return self._of(self.traits.decodes_reduced)

    def products(self, before: int, after: int, layout: Layout) -> tuple[int, int]:
        """Multiply-adds per channel of a map that is a product with matrices, and of its way back; else zeros.

        Args:
            before: tokens in front of the map.
            after: tokens behind it.
            layout: the sequence.
        """
        return (0, 0) if self.traits.products is None else self.traits.products(self, before, after, layout)

    @property
    def data_dependent(self) -> bool:
        """Whether token counts depend on the images."""
        return self._of(self.traits.data_dependent)

    @property
    def static_option(self) -> str:
        """The option that makes shapes static where they depend on the images."""
        return self.traits.static

    @property
    def pads(self) -> bool:
        """Whether images may keep different counts, so that padding rows follow."""
        return self._of(self.traits.pads)

    def tokens_inside(self, n: int, step: Step, layout: Layout) -> int:
        """Tokens inside the branches that the method acts around when n are outside, prefix included."""
        return self.tokens_out(n, step, layout) if self.place == "around" else n
