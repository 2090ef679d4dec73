"""reconstruct: give every patch back after a stretch of blocks on cluster centres."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..core.method import BlockShape, Method, Step
from ..core.mixins import Companion, Restoring
from ..core.options import centres, choice, number, option
from ..core.registry import register
from ..core.schedule import Schedule
from ..core.signals import Signals
from ..core.tokens import Layout, Tokens, TraceStep
from ..core.traits import AFTER, Place, Traits
from ..maps import RestoreMap, TokenMap


@register
@dataclass(frozen=True, kw_only=True)
class Reconstruct(Companion, Restoring, Method):
    """Rebuilds the tokens in front of the last clustering, as mixes of the nearest centres; training-free.

    The weights come from the distances between tokens and centres at the time of clustering. Reductions that came in
    between are undone as well: merged tokens are copied back, dropped ones get the value they had.

    Args:
        layers: after which block to rebuild (an index), or "norm" (features, after the final norm) or "maps" (the
            decoder of a dense model runs on the centres, and its class maps are rebuilt).
        k: centres that a token mixes (all where there are fewer), -1 for all; ties at the k-th are all kept.
        temperature: inverse temperature of the mix; None for that of the clustering.
        norm: weights of a token have this norm 1: "l1" (a mean, advised for features) or "l2" (as released); "copy"
            reads the one nearest centre instead of a mix.

    Source: Liang, Yuan, Ding et al., "Expediting Large-Scale Vision Transformer for Dense Prediction without
    Fine-tuning", NeurIPS 2022.
    """

    layers: int | str | tuple[int, ...] | None = "norm"
    k: int = option(20, centres)
    temperature: float | None = number(None, "None takes that of the clustering", above=0, none=True)
    norm: str = choice("l1", ("l1", "l2", "copy"))

    name = "reconstruct"
    source = "Liang et al., NeurIPS 2022"
    kind = "restore"
    schedule = Schedule(layer_names=("norm", "maps"))
    traits = Traits(
        place=lambda m: Place(m.layers) if isinstance(m.layers, str) else AFTER,
        closes_span=lambda m: m.layers != "maps", keeps_trace=lambda m: m.layers != "maps",
        decodes_reduced=lambda m: m.layers == "maps",
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.layers is None or (isinstance(self.layers, str) and self.layers not in self.schedule.layer_names):
            raise ValueError(f"reconstruct: layers={self.layers!r}; give a block index, 'norm' or 'maps'")
        super().__post_init__()
        if isinstance(self.layers, tuple) and len(self.layers) != 1:
            raise ValueError(f"reconstruct: layers={self.layers!r}; name one block, 'norm' or 'maps'")

    def strengths(self, depth: int) -> dict[int, Any]:
        return {self.resolve_layers(depth)[0]: None}

    def check_recipe(self, methods: tuple[Method, ...], depth: int) -> None:
        (block,) = self.resolve_layers(depth)
        openings = [m for m in methods if m.opens_span]
        first = min((i for m in openings for i in m.resolve_layers(depth)), default=None)
        if first is None:
            raise ValueError(
                "reconstruct has nothing to rebuild: the recipe clusters nowhere; give [{'method': 'cluster', ...}, "
                "'reconstruct']"
            )
        if first > block:
            raise ValueError(f"reconstruct at block {block} comes before the clustering at block {first}; swap them")

    def tokens_out(self, n: int, step: Step, layout: Layout) -> int:
        return n  # the recipe knows how many there were; "maps" rebuilds nothing inside the model

    def map(self, tokens: Tokens, signals: Signals | None, step: Step) -> TokenMap | None:
        trace = tokens.trace or ()
        start = self._start(trace)
        if self.place == "maps" or start is None:
            return None
        undone = self._configured(trace[start:])
        return RestoreMap(start, tuple(s.map for s in undone), tuple(s.before for s in undone))

    @staticmethod
    def _start(trace: tuple[TraceStep, ...]) -> int | None:
        """Index of the last step that opens a span, None if nothing was clustered."""
        return max((i for i, s in enumerate(trace) if s.map.opens_span), default=None)

    def _configured(self, trace: tuple[TraceStep, ...]) -> tuple[TraceStep, ...]:
        options = {"k": self.k, "temperature": self.temperature, "norm": self.norm}
        return tuple(s._replace(map=s.map.with_lift(**options)) for s in trace)

    def lift_trace(self, trace: tuple[TraceStep, ...]) -> tuple[TraceStep, ...]:
        start = self._start(trace)
        return trace if start is None else (*trace[:start], *self._configured(trace[start:]))

    def dial(self, t: float, depth: int, layout: Layout) -> Method:
        return self  # the strength is that of the clustering

    def macs(self, n: int, n_out: int, shape: BlockShape, layout: Layout, step: Step) -> int:
        # distances of all tokens to all centres, then the mix
        return 2 * (n - layout.num_prefix) * (n_out - layout.num_prefix) * shape.dim if n_out != n else 0
