"""PPT: images that look at a few tokens are pruned, images that look everywhere merge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.method import BlockShape, Method, Step
from ..core.options import number
from ..core.registry import register
from ..core.schedule import Remove, quarters
from ..core.selection import importance_macs, with_prefix
from ..core.signals import Signals
from ..core.tokens import Layout, Tokens
from ..core.traits import Traits
from ..maps import MergeMap, TokenMap
from ..ops.attention import significance
from ..ops.matching.bipartite import bipartite_pairs, split_ranked

_LEAST = 1e-12


def shares_and_variance(scores: Tensor, counted: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scores of patches as shares of their sum [B, M], and the unbiased variance of these [B, 1].

    Args:
        scores: significance of every patch [B, M]; negative ones (differential attention) count as none.
        counted: [B, M] bool, False for padding and hidden patches; None counts all.
    """
    seen = torch.ones_like(scores, dtype=torch.bool) if counted is None else counted
    scores = scores.clamp(min=0) * seen
    share = scores / scores.sum(1, keepdim=True).clamp(min=_LEAST)
    count = seen.sum(1, keepdim=True)
    off = (share - share.sum(1, keepdim=True) / count.clamp(min=1)) * seen
    return share, off.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)


@register
@dataclass(frozen=True, kw_only=True)
class PPT(Method):
    """Removes r tokens of each image: the least significant ones are dropped, or the most similar pairs merge.

    Images whose significance (class attention times value norm, as shares) varies less than the threshold merge by
    ToMe's rule, the others are pruned; every image and block decides alone. Without a class token, significance is the
    mean attention received times the value norm.

    Args:
        threshold: variance of the shares below which an image merges; 0 always prunes, a large one never. Its scale
            depends on the number of patches: about 1e-5 to 1e-4 at 196.
        prop_attn: add the log size of a token to its attention logit, and weigh merges by size; without it all tokens
            count alike in every block, as released.

    Source: Wu, Zeng, Wang, Chen, "PPT: Token Pruning and Pooling for Efficient Vision Transformers", 2023.
    """

    r: int | tuple[Any, ...] | dict[str, Any] = 50
    threshold: float = number(7e-5, "0 always prunes, a large number never", least=0)
    prop_attn: bool = True
    clip: bool = False

    name = "ppt"
    source = "Wu et al., 2023"
    kind = "prune + merge"
    schedule = Remove(layers=quarters)
    traits = Traits(reads_maps=True, proportional=lambda m: m.prop_attn)

    def map(self, tokens: Tokens, signals: Signals, step: Step) -> TokenMap | None:
        n, prefix, valid, visible = tokens.length, tokens.layout.num_prefix, tokens.valid, tokens.visible
        r = n - step.tokens_out(n, tokens.layout)
        if r == 0:
            return None
        with torch.no_grad():
            scores = significance(signals.importance, signals.values)[:, prefix:]
            counted = valid if visible is None else visible  # what is visible is real
            variance = shares_and_variance(scores, None if counted is None else counted[:, prefix:])[1]
            last = -scores if visible is None else (-scores).masked_fill(~visible[:, prefix:], float("inf"))
            real = own = None
            if valid is not None:
                real, own = valid[:, prefix:], (tokens.valid_patches.unsqueeze(1) // 2).clamp(max=r)
            gone, kept, _ = split_ranked(last, r, real, own)
            merges = variance < self.threshold
            pairs = bipartite_pairs(signals.metric, r, prefix, valid, visible)
            order = torch.where(merges, pairs.order, with_prefix(kept.flip(1), prefix))
            src = torch.where(merges, pairs.src, gone + prefix)
            slot = torch.where(merges, pairs.slot, -1)
        weight = tokens.sizes() if self.prop_attn else None
        return MergeMap(order, src, slot, n, weight, valid=pairs.valid, drops=True)

    def macs(self, n: int, n_out: int, shape: BlockShape, layout: Layout, step: Step) -> int:
        scores = importance_macs(n, shape, layout) + n * shape.num_heads * shape.head_dim
        return scores + (n // 2) * (n - n // 2) * shape.head_dim + (n - n_out) * shape.dim
