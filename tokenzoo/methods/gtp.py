"""GTP: patches of little value hand shares of themselves to their neighbours in a graph, and go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.fusing import mean_of_rest
from ..core.map_scores import SELECTIONS, selection_scores
from ..core.method import BlockShape, Method, Step
from ..core.mixins import Attended, Beside, Companion, OwnAttention, Remembering
from ..core.neighbours import alike_table, linked
from ..core.options import choice, number
from ..core.registry import register
from ..core.schedule import RemoveAll
from ..core.selection import keep_patches, own_counts, ranked, real_rows, with_prefix
from ..core.signals import Signals
from ..core.tokens import Layout, Tokens
from ..core.traits import Traits
from ..maps import KeepMap, PropagateMap, TokenMap
from ..ops.attention import Heads
from ..ops.map_reading import attend_and_read, attend_sparsely


@register
@dataclass(frozen=True, kw_only=True)
class GTP(Companion, OwnAttention, Remembering, Method):
    """Drops r patches in every block after handing shares of them to their neighbours in a graph; training-free.

    Patches are linked that touch on the grid, are alike in front of the first block, or both (as lists of neighbours).

    Args:
        r: patches to remove per block: an int, a list, (r, slope).
        selection: which patches stay, by the published names: attention to itself times attention received ("Mixed"),
            these alone ("Diag", "IMG") or added ("Sum"), class attention ("CLS"); "CosSim" compares stored maps.
        propagation: "graph"; "mean" appends the mean of the dropped patches instead, "none" drops them.
        graph: "mixed", "spatial" or "semantic".
        neighbours: alike patches of each, without a class token one more (as released); all where there are fewer.
        alpha: share that a neighbour takes, before the degrees of both divide it.
        token_scale: sizes take the same shares (their sum changes), and their logarithms are added to the logits.
        sparsity: share of the entries of a head's attention map that stay, in (0, 1]; below 1 the whole map is written
            out and sorted, which saves nothing and costs time and memory: for accuracy alone.

    Source: Xu, Wang, Chen, Li, Zhang, "GTP-ViT: Efficient Vision Transformers via Graph-based Token Propagation", WACV
    2024.
    """

    r: int | tuple[Any, ...] | dict[str, Any] = 8
    selection: str = choice("MixedAttnMax", SELECTIONS)
    propagation: str = choice("graph", ("graph", "mean", "none"))
    graph: str = choice("mixed", ("mixed", "spatial", "semantic"))
    neighbours: int = number(8, "give a number of patches", least=1, whole=True)
    alpha: float = number(0.1, "0 drops patches without a trace", least=0)
    token_scale: bool = True
    sparsity: float = number(1.0, "1 keeps the whole map", above=0, most=1)
    clip: bool = False

    name = "gtp"
    source = "Xu et al., WACV 2024"
    kind = "prune + propagate"
    schedule = RemoveAll()
    traits = Traits(
        reads_maps=True, positions=True, proportional=lambda m: m.token_scale and m.propagation == "graph",
        merges=lambda m: m.propagation == "mean", mixes=lambda m: m.propagation != "none",
        remembers=lambda m: m.propagation == "graph" and m.graph != "spatial",
        products=lambda m, before, after, layout: (after * (before - after) * (m.propagation == "graph"), 0),
        attends=lambda m: m.sparsity < 1 or m.selection[:3] not in ("CLS", "Cos"),
    )  # fmt: skip

    def check(self, layout: Layout, model: str) -> None:
        if self.selection.startswith("CLS") and not layout.has_class:
            raise ValueError(f"gtp: {self.selection!r} reads the class token, which {model} lacks; use 'MixedAttnMax'")

    def check_recipe(self, methods: tuple[Method, ...], depth: int) -> None:
        for other in methods if self.sparsity < 1 else ():
            if other.place in ("around", "ahead", "queries"):
                raise ValueError(f"gtp: sparsity={self.sparsity} cuts what {other.name} acts in; set it to 1")

    def tokens_out(self, n: int, step: Step, layout: Layout) -> int:
        left = super().tokens_out(n, step, layout)
        return left + (self.propagation == "mean" and left < n)

    def remember(self, tokens: Tokens, step: Step) -> Tensor:
        return alike_table(tokens, self.neighbours + (not tokens.layout.has_class), self.graph != "semantic")

    def attend(self, heads: Heads, bias: Tensor | None, tokens: Tokens, beside: Beside) -> Attended | None:
        asking = tokens.valid if tokens.visible is None else tokens.visible
        if self.sparsity < 1:
            return Attended(*attend_sparsely(heads, bias, self.sparsity, asking))
        found = attend_and_read(heads, bias) if asking is None else None
        return None if found is None else Attended(*found)

    def map(self, tokens: Tokens, signals: Signals, step: Step) -> TokenMap | None:
        n, prefix, patches = tokens.length, tokens.layout.num_prefix, tokens.num_patches
        r = n - super().tokens_out(n, step, tokens.layout)
        if r == 0:
            return None
        scores = selection_scores(self.selection, signals, prefix)
        kept = lambda m: max(min(m, 1), m - r)  # noqa: E731
        if self.propagation == "none":
            return keep_patches(scores, tokens, kept)
        order = ranked(scores, tokens).argsort(dim=1, descending=True)
        own, stay, going = own_counts(kept, tokens), order[:, : patches - r], order[:, patches - r :]
        valid, idx = real_rows(own, patches - r, prefix), with_prefix(stay, prefix)
        if self.propagation == "mean":
            return mean_of_rest(KeepMap(idx, n, valid), tokens)
        if own is not None:  # those behind the last one that stays; padding has no place, and gives nothing
            going = order.gather(1, (own + torch.arange(r, device=own.device)).clamp(max=patches - 1))
        weight = linked(tokens, stay, going, self.graph != "semantic", tokens.remembered(step.scorer))
        return PropagateMap(idx, n, going + prefix, self.alpha * F.pad(weight, (0, 0, prefix, 0)), valid)

    def macs(self, n: int, n_out: int, shape: BlockShape, layout: Layout, step: Step) -> int:
        name, patches = self.selection, n - layout.num_prefix
        total = 0 if self.sparsity < 1 else (1 if name.startswith("CLS") else n) * n * shape.entry
        total += n * patches if name.startswith("CosSim") else 0
        if self.propagation != "graph":
            return total + (n * shape.dim if self.propagation == "mean" else 0)
        first = self.remembers and patches == layout.num_patches
        return total + n_out * (n - n_out) * shape.dim + (patches * patches * shape.dim if first else 0)
