"""rmeeto: merge similar patches between the blocks of a scanning model, in the order of the scan."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..core.method import BlockShape, Step
from ..core.mixer_signals import MixerSignals
from ..core.mixins import Scanning, scanned_rows
from ..core.options import choice, number
from ..core.registry import register
from ..core.remove_count import RemoveCount
from ..core.tokens import Layout, Tokens
from ..core.traits import AFTER, Scans, Traits
from ..maps import KeepMap, MergeMap, TokenMap
from ..ops.matching.ordered import DISTANCES, alternate_pairs, sort_pairs
from ..ops.scan_order import from_scan, to_scan

METRICS = ("hidden", "B", "C", "delta")
# channels of each metric for C of the stream, as in all published models: 16 states, 2 C inside the mixer
_WIDTHS = {"hidden": lambda dim: dim, "B": lambda dim: 16, "C": lambda dim: 16, "delta": lambda dim: 2 * dim}


@register
@dataclass(frozen=True, kw_only=True)
class RMeeTo(Scanning, RemoveCount):
    """Averages the r most similar pairs of patches behind every second block, weighted by size, in the scan's order.

    Patches at even places pair up with patches at odd ones, the class token left out of the count. Small models lose
    much accuracy off the shelf; a few epochs of re-training with the unpatched model as teacher bring it back
    (`train_imagenet.py --kd-model-name unpatched`).

    Args:
        r: patches to remove per layer: an int, a list with one entry per layer (missing ones 0), or (r, slope).
            Published: 5 for Vim-T, 11 for Vim-S and Vim-B, the same in every layer. The released script removes in the
            last layer whatever is needed to end with 197 - 11 * compare tokens; a list says the same.
        interval: merge in front of the blocks whose index is a multiple of it, not of block 0: layers 1, 3, ... for 2.
        metric: what patches are alike by: "hidden" (the output of the mixer), or its "B", "C" or "delta" (step sizes),
            the mean over the directions of the scan.
        distance: "cosine", or the "l1" or "l2" distance of vectors of length one.
        ordered: patches stay in the order of the scan; False gives [unmerged even by falling likeness, odd].
        prune: drop the sources instead of merging them.
        released: as the released code: the class token moves in proportion to the number of tokens instead of staying
            between its neighbours, "delta" is taken before bias and softplus, and the metric of the backward direction
            is added in the order of its scan with its channels turned around.
        clip: merge fewer where r exceeds half of the patches, as released, instead of refusing.
        layers: blocks to act behind, in place of an interval. Patches merge once the block's mixer has been added to
            the stream, in front of the norm of the next block, by which the authors count: their block i is layer
            i - 1 here.

    Source: Shi et al., "Faster Vision Mamba is Rebuilt in Minutes via Merged Token Re-training", 2024.
    """

    interval: int = number(2, "give a number of blocks from 1, such as 2", least=1, whole=True)
    metric: str = choice("hidden", METRICS)
    distance: str = choice("cosine", DISTANCES)
    ordered: bool = True
    prune: bool = False
    released: bool = False

    name = "rmeeto"
    source = "Shi et al., 2024"
    kind = "merge"
    traits = Traits(
        place=AFTER, sizes=True, merges=lambda m: not m.prune,
        # patches stay in order, or are asked not to
        scans=Scans(reads=True, values=lambda m: m.metric != "hidden", ordered=True),
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None and self.interval != 2:
            raise ValueError(f"rmeeto: interval={self.interval} and layers={self.layers} both name blocks; give one")

    def default_layers(self, depth: int) -> tuple[int, ...]:
        return tuple(i - 1 for i in range(self.interval, depth, self.interval))

    def check(self, layout: Layout, model: str) -> None:
        if self.released and layout.num_prefix > 1:
            raise ValueError(
                f"rmeeto: released=True moves one class token, and {model} has {layout.num_prefix}; leave it out"
            )

    # ---- the map

    def map(self, tokens: Tokens, signals: MixerSignals, step: Step) -> TokenMap | None:
        r = tokens.length - step.tokens_out(tokens.length, tokens.layout)
        if r == 0:
            return None
        pairs = alternate_pairs(self.likeness(tokens, signals), r, tokens.layout.num_prefix, self.distance)
        pairs = sort_pairs(pairs) if self.ordered else pairs
        if self.prune:
            return KeepMap(pairs.order, tokens.length)
        return MergeMap.of_pairs(pairs, tokens.length, tokens.sizes())

    def likeness(self, tokens: Tokens, signals: MixerSignals) -> Tensor:
        """What tokens are compared by [B, N, D].

        Args:
            tokens: the tokens behind the mixer.
            signals: view of the scan that ran.

        Raises:
            ValueError: `released` for a scan that does not run forward and backward.
        """
        if self.metric == "hidden":
            return signals.hidden
        name = "raw_delta" if self.released and self.metric == "delta" else self.metric
        parts = [signals.scanned(name, direction) for direction in range(signals.directions)]
        if self.released:
            if len(parts) != 2:
                raise ValueError(
                    f"rmeeto: released=True averages a forward and a backward scan, this one runs {len(parts)} ways; "
                    "leave it out, or use metric='hidden'"
                )
            rows = scanned_rows(tokens)
            parts[1] = from_scan(to_scan(parts[1], rows).flip(1, 2), rows)
        return sum(parts) / len(parts)

    def scan_rows(self, tokens: Tokens, token_map: TokenMap, step: Step) -> tuple[int, ...] | Tensor | None:
        if not self.released or tokens.layout.num_prefix == 0:
            return None
        before, after = token_map.n_in, token_map.n_out
        if not self.ordered:  # the class token stands among the even patches alone
            even = before // 2
            before, after = even, even - (before - after)
        rows = scanned_rows(tokens)
        return rows * after // before if isinstance(rows, Tensor) else tuple(row * after // before for row in rows)

    def macs(self, n: int, n_out: int, shape: BlockShape, layout: Layout, step: Step) -> int:
        patches = n - layout.num_prefix
        score = (patches // 2) * (patches - patches // 2) * _WIDTHS[self.metric](shape.dim)
        return score + (0 if self.prune else (n - n_out) * shape.dim)
