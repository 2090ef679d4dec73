"""Methods with a learned row per token that they make, before attention; written once for all."""

from __future__ import annotations

from dataclasses import dataclass

from ..maps import MixMap, ReplaceMap, TokenMap
from ..ops.attention import full_precision
from .keep_rate import KeepRate
from .learned import Learned
from .schedule import Slots
from .signals import Signals
from .step import BlockShape, Step
from .tokens import Layout, Tokens
from .traits import BEFORE, Traits


@dataclass(frozen=True, kw_only=True)
class LearnedSlots(Learned, KeepRate):
    """Base of methods that put a fixed number of new tokens, made from all patches, in their place.

    A subclass makes the module, with `step.known.count` rows: called with patches [B, M, C] and which of them count
    [B, M] bool or None, it gives weights [B, K, M], which say what goes where, and the new tokens [B, K, C].
    """

    kind = "merge"
    traits = Traits(place=BEFORE, products=lambda m, before, after, layout: (before * after, before * after))
    schedule = Slots()
    gates = False
    released = {"cluster_layers.{stage}.": ""}

    def map(self, tokens: Tokens, signals: Signals, step: Step) -> TokenMap:
        prefix = tokens.layout.num_prefix
        with full_precision(tokens.x):
            weights, values = signals.module(tokens.x[:, prefix:], tokens.seen_patches)
        return ReplaceMap(MixMap(weights, prefix, knows_mask=True), values)

    def macs(self, n: int, n_out: int, shape: BlockShape, layout: Layout, step: Step) -> int:
        return 2 * (n - layout.num_prefix) * (n_out - layout.num_prefix) * shape.dim
