"""PiToMe: merge tokens of large clusters, protect those that stand alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..core.method import BlockShape, Method, Step
from ..core.options import choice, number, numbers, option
from ..core.registry import register
from ..core.schedule import Keep, kept_of, spread
from ..core.selection import groups_with_prefix, own_counts, real_rows
from ..core.signals import Signals
from ..core.tokens import Layout, Tokens
from ..core.traits import Traits
from ..maps import MergeMap, TokenMap, group_map
from ..ops.attention import full_precision
from ..ops.matching.energy import cluster_energy, energy_groups, energy_pairs

_HALF = {"first": lambda i, half: i < half, "last": lambda i, half: i >= half, "all": lambda i, half: True,
         "none": lambda i, half: False}  # fmt: skip


@register
@dataclass(frozen=True, kw_only=True)
class PiToMe(Method):
    """Merges tokens in order of their energy, which is large in large clusters; tokens that stand alone are protected.

    Half of the blocks are softer: energy orders the tokens, every second one proposes, the best proposals merge.

    Args:
        keep_rate: share of the patches that stays in each block, in [0.5, 1]; one value or one per layer.
        margin: cosine above which tokens count as alike: a number falls in a line from block 0 to 0 behind the last
            block (authors: 0.75 for DeiT and MAE, 0.9 for AugReg and BLIP, 0.95 for CLIP), or one per layer.
        alpha: scale of the energy below the margin.
        ordered: half of the blocks that is softer: "first" (DeiT), "last" (MAE), "all" or "none" (CLIP).
        metric: likeness is that of "keys" (mean over heads) or of the "tokens" themselves (CLIP, BLIP).
        energy: "elu", or "gaussian", the form for text: a normal density, and the r highest tokens merge into the next
            r instead of every second one into the others.
        prop_attn: add the log size of a token to its attention logit (off as released).
        mass_pool: average pooling weighs tokens by size (the MAE variant).

    Source: Tran, Nguyen, Le, et al., "Accelerating Transformers with Spectrum-Preserving Token Merging", NeurIPS 2024.
    """

    keep_rate: float | tuple[float, ...] = 0.9125
    margin: float | tuple[float, ...] = option(0.75, numbers("cosines such as 0.75"))
    alpha: float = number(1.0, "give a factor such as 1", least=0)
    ordered: str = choice("first", tuple(_HALF))
    metric: str = choice("keys", ("keys", "tokens"))
    energy: str = choice("elu", ("elu", "gaussian"))
    prop_attn: bool = False
    mass_pool: bool = False

    name = "pitome"
    source = "Tran et al., NeurIPS 2024"
    kind = "merge"
    schedule = Keep(layers=None, rounding=lambda rate, n: n - int(n - n * rate), share=0.5)
    traits = Traits(sizes=True, proportional=lambda m: m.prop_attn, mass_pool=lambda m: m.mass_pool)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.energy == "gaussian" and max(self.margin if isinstance(self.margin, tuple) else (self.margin,)) >= 1:
            raise ValueError(f"pitome: margin={self.margin}; energy='gaussian' has width 1 - margin, give one below 1")

    def strengths(self, depth: int) -> dict[int, tuple[float, None, float, bool]]:
        """(Rate, no count, margin, whether the softer form) of every block that merges."""
        layers = self.resolve_layers(depth)
        falling = spread(self.margin, layers, "pitome: margin")
        if not isinstance(self.margin, tuple):
            falling = {i: self.margin - self.margin * i / depth for i in layers}
        soft = _HALF[self.ordered]
        rates = self.schedule.strengths(self, layers)
        return {i: (*rate, falling[i], soft(i, (depth + 1) // 2)) for i, rate in rates.items()}

    def map(self, tokens: Tokens, signals: Signals, step: Step) -> TokenMap | None:
        prefix, n_out = tokens.layout.num_prefix, step.tokens_out(tokens.length, tokens.layout)
        if n_out == tokens.length:
            return None
        metric = (signals.metric if self.metric == "keys" else tokens.x)[:, prefix:]
        _, _, margin, soft = step.strength
        gaussian = self.energy == "gaussian"
        visible = None if tokens.visible is None else tokens.visible[:, prefix:]
        counted = visible
        with torch.no_grad(), full_precision(tokens.x):
            real = own = valid = None
            if tokens.valid is not None:
                real, kept = tokens.valid_patches.unsqueeze(1), own_counts(kept_of(step, tokens.layout), tokens)
                own, valid = real - kept, real_rows(kept, n_out - prefix, prefix)
                counted = tokens.valid[:, prefix:] if visible is None else visible
            units = F.normalize(metric.float(), dim=-1)
            energy = cluster_energy(units, margin, self.alpha, gaussian, counted)
            split = "all" if soft else "halves" if gaussian else "alternate"
            if counted is None:
                pairs = energy_pairs(units, energy, tokens.length - n_out, split, prefix)
                return MergeMap.of_pairs(pairs, tokens.length, tokens.sizes())
            if visible is not None:
                energy = energy.masked_fill(~visible, float("inf"))
            if valid is not None:
                energy = energy.masked_fill(~tokens.valid[:, prefix:], float("-inf"))
            assign, head = energy_groups(units, energy, tokens.length - n_out, split, real, own, visible)
        return group_map(*groups_with_prefix(assign, head, prefix), n_out, tokens.sizes(), valid)

    def macs(self, n: int, n_out: int, shape: BlockShape, layout: Layout, step: Step) -> int:
        patches, r, width = n - layout.num_prefix, n - n_out, shape.head_dim if self.metric == "keys" else shape.dim
        if r == 0:
            return 0
        pairs = (patches // 2) * (patches - patches // 2) if step.strength[3] else r * r
        return (patches * patches + pairs) * width + r * shape.dim
