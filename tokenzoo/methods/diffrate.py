"""DiffRate: searched numbers of tokens to prune and to merge in every block."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.method import BlockShape, Method, Step
from ..core.options import option
from ..core.registry import register
from ..core.schedule import even_removal, keep_count, spread
from ..core.selection import importance_macs, own_counts, real_rows, with_prefix
from ..core.signals import Signals
from ..core.tokens import Layout, Tokens
from ..core.traits import Traits
from ..maps import PartialMap, TokenMap
from ..ops.attention import full_precision
from ..ops.matching.ranked import ranked_partners

Left = int | float | None


def _left(name: str, field: str, value: Any) -> Any:
    """Tokens that are left, as a count, a share or None, for all layers or one per layer."""
    for each in value if isinstance(value, tuple) else (value,):
        if each is not None and (isinstance(each, bool) or not isinstance(each, (int, float))):
            raise TypeError(f"{name}: {field}={value!r}; give a count, a share, None, or one of these per layer")
        if each is not None and not (each >= 2 if isinstance(each, int) else 0 < each <= 1):
            raise ValueError(f"{name}: {field}={each} is neither a count of at least 2 nor a share in (0, 1]")
    return value


@register
@dataclass(frozen=True, kw_only=True)
class DiffRate(Method):
    """Drops the tokens of least class attention in every block, and merges the next ones into those most like them.

    Counts come from schedules that the authors searched with frozen weights (configs/diffrate holds theirs); a schedule
    need not fall, a number above what is left has no effect. A merged token is the plain mean of its group; to its size
    sources add as much of theirs as they are alike (negative cosines, which would make sizes shrink, count as 0).
    Without a class token, tokens are ranked by the mean attention they receive.

    Args:
        prune: tokens left after pruning, prefix tokens included: a count, a share of the patches that enter the block,
            None for no pruning, or one of these per layer.
        merge: the same after merging.
        mass_pool: average pooling weighs tokens by size (the MAE variant).

    Source: Chen, Shao, Xu, Lin, Zhang, Zhao, Luo, Qiao, Ji, "DiffRate: Differentiable Compression Rate for Efficient
    Vision Transformers", ICCV 2023.
    """

    prune: Left | tuple[Left, ...] = option(0.95, _left)
    merge: Left | tuple[Left, ...] = option(0.95, _left)
    prop_attn: bool = True
    mass_pool: bool = False

    name = "diffrate"
    source = "Chen et al., ICCV 2023"
    kind = "prune + merge"
    traits = Traits(reads_maps=True, proportional=lambda m: m.prop_attn, mass_pool=lambda m: m.mass_pool)

    def strengths(self, depth: int) -> dict[int, tuple[Left, Left]]:
        layers = self.resolve_layers(depth)
        prune, merge = (spread(getattr(self, name), layers, f"diffrate: {name}") for name in ("prune", "merge"))
        return {i: (prune[i], merge[i]) for i in layers if {prune[i], merge[i]} - {None, 1.0}}

    def count(self, n: int, step: Step, layout: Layout) -> tuple[int, int]:
        """Patches that are left after pruning and after merging."""
        left = [n - layout.num_prefix]
        for each in step.strength:
            own = n if each is None else each
            own = keep_count(own, left[0]) if isinstance(own, float) else own - layout.num_prefix
            left.append(min(left[-1], own))
        return left[1], left[2]

    def tokens_out(self, n: int, step: Step, layout: Layout) -> int:
        left = step.count(n, layout)[1]
        if left < 1 <= n - layout.num_prefix:
            raise step.error(
                f"prune={step.strength[0]} and merge={step.strength[1]} leave none of {n - layout.num_prefix} patches "
                f"beside {layout.num_prefix} prefix tokens, which counts include; raise them"
            )
        return layout.num_prefix + left

    def dial(self, t: float, depth: int, layout: Layout) -> Method:
        n, prune, merge = layout.num_prefix + layout.num_patches, [], []
        for r in even_removal(t, layout.num_patches - 2, len(self.resolve_layers(depth))):
            r = min(r, n - layout.num_prefix - 2)
            prune.append(n - r // 2)
            n -= r
            merge.append(n)
        return replace(self, prune=tuple(prune), merge=tuple(merge))

    def map(self, tokens: Tokens, signals: Signals, step: Step) -> TokenMap | None:
        n, layout, prefix = tokens.length, tokens.layout, tokens.layout.num_prefix
        if step.tokens_out(n, layout) == n:
            return None
        kept, stays = step.count(n, layout)
        visible = None if tokens.visible is None else tokens.visible[:, prefix:]
        own: list[Tensor | None] = [None, None]
        if tokens.valid is not None:
            own = [own_counts(lambda m, at=at: step.count(prefix + m, layout)[at], tokens) for at in (0, 1)]
        with torch.no_grad(), full_precision(tokens.x):
            scores, units = signals.importance, F.normalize(tokens.x[:, prefix:].float(), dim=-1)
            real = None if tokens.valid is None else tokens.valid[:, prefix:]
            order, partner, cosine = ranked_partners(scores[:, prefix:], units, kept, stays, real, *own, visible)
            heads, src = with_prefix(order[:, :stays], prefix), order[:, stays:] + prefix
            slot = torch.where(partner >= 0, partner + prefix, -1)
            part = torch.ones_like(scores).scatter(1, src, cosine.clamp(min=0)).unsqueeze(-1)
        valid = real_rows(own[1], stays, prefix)
        return PartialMap(heads, src, slot, n, part, valid=valid, drops=kept < n - prefix)

    def macs(self, n: int, n_out: int, shape: BlockShape, layout: Layout, step: Step) -> int:
        kept, stays = step.count(n, layout)
        return importance_macs(n, shape, layout) + (kept - stays) * (stays + 1) * shape.dim if n > n_out else 0
