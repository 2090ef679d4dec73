"""What a method is: options, the blocks it acts in, how many tokens it leaves, and the map it decides."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from ..maps import TokenMap
from .graphs import why_counts_are_unknown
from .resolved import Resolved
from .signals import Signals
from .tokens import Layout, Tokens, TraceStep

# in the order in which they act; "embed" before block 0, "norm" after the final norm and "maps" on a decoder's output
# are outside of the blocks
PLACES = ("embed", "before", "around", "ahead", "queries", "between", "after", "norm", "maps")


class Step(NamedTuple):
    """One method acting in one block.

    Attributes:
        method: the method.
        block: index of the block.
        strength: the method's own measure for this block (tokens to remove, share to keep, ...).
        key: name of the method's learned module inside the block, None for methods without parameters.
        scorer: number of the method among those of the recipe that carry scores, see `Tokens.seen_by`.
        known: counts at the model's own image size; None outside of a patched block.
    """

    method: Method
    block: int
    strength: Any
    key: str | None = None
    scorer: int = 0
    known: Resolved | None = None

    def tokens_out(self, n: int, layout: Layout) -> int:
        """Tokens after the step when `n` come in, prefix included; raises ValueError if the strength is unreachable."""
        if self.known is not None and self.known.holds(layout) and n == self.known.n:
            return self.known.n_out
        return self.method.tokens_out(n, self, layout)

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
        token_map = self.method.map(tokens.seen_by(self.scorer), signals, self)
        return token_map if token_map is None or tokens.visible is None else token_map.masked(tokens.visible)

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

    def error(self, message: str) -> ValueError:
        """A ValueError that names the method and the block."""
        return ValueError(f"{self.method.name} at block {self.block}: {message}")


class BlockShape(NamedTuple):
    """Sizes of a block that cost formulas need.

    Attributes:
        dim: channels of the residual stream.
        num_heads: query heads (of both halves in differential attention).
        head_dim: width of a query.
    """

    dim: int
    num_heads: int
    head_dim: int


@dataclass(frozen=True, kw_only=True)
class Method:
    """Base of all methods: a frozen dataclass of options, with one function that decides the map.

    A subclass names its place and source, turns its options into one strength a block (`strengths`), says how many
    tokens remain (`tokens_out`, plain integers), and decides the map (`map`). It never names a backbone.

    Args:
        layers: blocks to act in; None for the method's default; "others" for the blocks no other method of the recipe
            names.
    """

    layers: tuple[int, ...] | str | None = None

    name: ClassVar[str] = ""
    source: ClassVar[str] = ""
    kind: ClassVar[str] = ""
    uses_positions: ClassVar[bool] = False
    static_option: ClassVar[str] = ""  # what makes shapes static where they depend on the images

    def __post_init__(self) -> None:
        layers = self.layers
        if isinstance(layers, int) and not isinstance(layers, bool):
            layers = (layers,)
        if layers is not None and layers != "others":
            if isinstance(layers, str) or not isinstance(layers, Sequence) or any(type(i) is not int for i in layers):
                raise TypeError(f"{self.name}: layers={self.layers!r}; give indices such as (3, 6, 9) or 'others'")
            if len(set(layers)) != len(layers):
                raise ValueError(f"{self.name}: layers={tuple(layers)} names a block twice")
            layers = tuple(layers)
        object.__setattr__(self, "layers", layers)

    # ---- where and how much

    @property
    def place(self) -> str:
        """Where in a block the method acts, one of `PLACES`."""
        return "between"

    @property
    def uses_size(self) -> bool:
        """Whether token sizes have to be kept."""
        return self.proportional or self.mass_weighted_pool

    @property
    def proportional(self) -> bool:
        """Whether attention adds log sizes to the keys (proportional attention)."""
        return False

    @property
    def mass_weighted_pool(self) -> bool:
        """Whether average pooling weighs tokens by size."""
        return False

    @property
    def reads_attention(self) -> bool:
        """Whether the decision looks at queries or keys (before attention, these have to be projected for it)."""
        return False

    @property
    def merges(self) -> bool:
        """Whether tokens come to stand for several patches."""
        return "merge" in self.kind or "fuse" in self.kind

    @property
    def drops(self) -> bool:
        """Whether tokens may be left without a new one of their own (kept ones stay as they are)."""
        return "prune" in self.kind

    @property
    def fuses(self) -> bool:
        """Whether one token more stands for all that are left out."""
        return "fuse" in self.kind

    @property
    def mixes(self) -> bool:
        """Whether values of tokens are mixed, so that a mask has to treat all patches alike that it does not hide."""
        return self.kind not in ("prune", "sample")

    @property
    def branches(self) -> tuple[str, ...]:
        """Branches that a method at the place "around" merges for: "attention", "mlp"."""
        return ()

    @property
    def matches_once(self) -> bool:
        """Whether a method at the place "around" decides one map a block, from the block's input, for all branches."""
        return False

    @property
    def merges_stream(self) -> bool:
        """Whether a method at the place "around" merges the residual stream, in front of the norm of a branch."""
        return False

    @property
    def replaces_attention(self) -> bool:
        """Whether a method at the place "around" is another form of attention: it wants a branch that is only that."""
        return False

    @property
    def serves_scans(self) -> bool:
        """Whether the method works on models that scan their tokens (it looks at no attention and changes none)."""
        return False

    @property
    def reads_scan(self) -> bool:
        """Whether the decision looks into a scan, so that the method works on models that scan only."""
        return False

    @property
    def keeps_scan_values(self) -> bool:
        """Whether the mixer has to hand out the values of its scan; by default for every method that reads the scan."""
        return self.reads_scan

    @property
    def keeps_order(self) -> bool:
        """Whether maps leave patches in the order of the scan by themselves; else they are put into it."""
        return False

    @property
    def gap_rule(self) -> str | None:
        """How pruned positions let the state of a scan decay, see `layers.scan.gaps.stretch`; None: not at all."""
        return None

    def scan_rows(self, tokens: Tokens, token_map: TokenMap, step: Step) -> tuple[int, ...] | Tensor | None:
        """Where the prefix tokens go in the sequence that is scanned, None to stay between their neighbours.

        Args:
            tokens: the tokens before the map; `tokens.rows` is where they are.
            token_map: the map.
            step: this method in this block.
        """
        return None

    @property
    def scores_tokens(self) -> bool:
        """Whether the method carries a score of every token from block to block."""
        return False

    def score(self, tokens: Tokens, signals: Signals, token_map: TokenMap | None, step: Step) -> Tensor | None:
        """Scores of all tokens after the attention of a block [B, N] float32; only for methods that `scores_tokens`.

        Args:
            tokens: all tokens, with the scores of the block before.
            signals: lazy view of the attention that ran.
            token_map: the map to the tokens that attended, None when all did.
            step: this method in this block.
        """
        raise NotImplementedError(f"{type(self).__name__} scores tokens: define score(...)")

    def tokens_inside(self, n: int, step: Step, layout: Layout) -> int:
        """Tokens inside the branches of a method at the place "around" when n are outside, prefix included."""
        return n

    @property
    def opens_span(self) -> bool:
        """Whether a later method may rebuild the tokens that this one reduces."""
        return False

    @property
    def closes_span(self) -> bool:
        """Whether the method rebuilds the tokens in front of the last open span, inside the model."""
        return False

    @property
    def decodes_reduced(self) -> bool:
        """Whether the method was published with decoders that run on the reduced tokens, class maps copied back."""
        return False

    @property
    def keeps_trace(self) -> bool:
        """Whether the forward pass has to remember its maps (reconstruction inside the model)."""
        return False

    def lift_trace(self, trace: tuple[TraceStep, ...]) -> tuple[TraceStep, ...]:
        """The trace as the way back to the full grid should read it; the place for options of that way."""
        return trace

    def check_recipe(self, methods: tuple[Method, ...], depth: int) -> None:
        """Refuses recipes that the method cannot be part of.

        Args:
            methods: all methods of the recipe in order, this one included.
            depth: blocks of the model.
        """

    @property
    def data_dependent(self) -> bool:
        """Whether token counts depend on the images (shapes are not static)."""
        return False

    @property
    def pads(self) -> bool:
        """Whether images may keep different counts, so that padding rows follow."""
        return False

    def default_layers(self, depth: int) -> tuple[int, ...]:
        """Blocks to act in when the user names none."""
        return tuple(range(depth))

    def resolve_layers(self, depth: int) -> tuple[int, ...]:
        """The blocks to act in, checked against the depth of the model."""
        layers = self.default_layers(depth) if self.layers is None else self.layers
        for index in layers:
            if not 0 <= index < depth:
                raise ValueError(f"{self.name}: layers names block {index}, but the model has blocks 0 to {depth - 1}")
        return tuple(layers)

    def strengths(self, depth: int) -> dict[int, Any]:
        """Strength per block index, blocks without reduction left out."""
        raise NotImplementedError(f"{type(self).__name__} does not say how strong it is: define strengths(depth)")

    def tokens_out(self, n: int, step: Step, layout: Layout) -> int:
        """Tokens after the step, prefix included (the largest possible count if it depends on the images)."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it leaves: define tokens_out(...)")

    def count(self, n: int, step: Step, layout: Layout) -> Any:
        """The rule of one block for n tokens, prefix included, as plain integers (patches to keep, cells, ...).

        For methods whose strength is no count: maps, and `tokens_out`, read it through `step.count`. Not checked.
        """
        return None

    # ---- the map

    def map(self, tokens: Tokens, signals: Signals, step: Step) -> TokenMap | None:
        """Decides the map for these tokens; None leaves them alone.

        Args:
            tokens: the tokens at the method's place.
            signals: lazy view of the block's attention.
            step: this method in this block.
        """
        raise NotImplementedError(f"{type(self).__name__} decides no map: define map(tokens, signals, step)")

    def check(self, layout: Layout, model: str) -> None:
        """Refuses models that the method cannot work on; called before anything is patched.

        Args:
            layout: token layout of the model.
            model: name of its class, for the message.
        """

    def module(self, dim: int, step: Step) -> nn.Module | None:
        """The learned module of one block, None for methods without parameters."""
        return None

    # ---- cost and strength

    def macs(self, n: int, n_out: int, shape: BlockShape, layout: Layout, step: Step) -> int:
        """Multiply-adds of deciding and applying the map, for one image."""
        return 0

    def dial(self, t: float, depth: int, layout: Layout) -> Method:
        """The same method at relative strength t: 0 removes nothing, 1 as much as it can.

        Args:
            t: 0 to 1.
            depth: blocks of the model.
            layout: token layout at the resolution that counts.
        """
        raise ValueError(f"{self.name} has no strength that flops=... could solve for; set its own options instead")

    # ---- options as plain data

    @classmethod
    def options(cls) -> dict[str, Any]:
        """Option names and their defaults."""
        return {f.name: f.default for f in dataclasses.fields(cls)}

    def to_dict(self) -> dict[str, Any]:
        """The options that differ from their defaults, as JSON-safe values, with the method's name first."""
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        changed = {key: plain(value) for key, value in given.items() if value != self.options()[key]}
        return {"method": self.name, **changed}


def plain(value: Any) -> Any:
    """Tuples as lists, deeply: what JSON and YAML can hold."""
    if isinstance(value, (tuple, list)):
        return [plain(v) for v in value]
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    return value
