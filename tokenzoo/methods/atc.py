"""ATC: tokens merge bottom-up, the nearest two clusters first."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..core.graphs import may_look
from ..core.keep_rate import KeepRate
from ..core.method import BlockShape, Step
from ..core.options import choice
from ..core.registry import register
from ..core.schedule import kept_of, kept_patches
from ..core.selection import own_counts, real_rows
from ..core.signals import Signals
from ..core.tokens import Layout, Tokens
from ..core.traits import Traits
from ..maps import TokenMap, group_map
from ..ops.cells.agglomerate import LINKAGES, agglomerate
from ..ops.distances import squared_distances

_FAR = 1e6  # cosine distances are at most 2


@register
@dataclass(frozen=True, kw_only=True)
class ATC(KeepRate):
    """Averages clusters of patches that agglomerative clustering makes of the keys, at a few blocks; training-free.

    Distances are cosines between keys; all pairs of patches are compared, in one map per block that reduces. Pairs of
    clusters that are each other's nearest merge at once, which gives the same tree as one merge after the other.
    Outside of graphs the host looks after each round whether the clusters stand: a few rounds. Compiled and exported
    graphs cannot look: they unroll as many rounds as patches leave, which is exact, but long where many leave at once.

    Args:
        linkage: distance of two clusters: "single" (nearest members), "average" or "complete" (farthest members).
        prop_attn: add the log size of a token to its attention logit.

    Source: Haurum, Escalera, Taylor, Moeslund, "Agglomerative Token Clustering", ECCV 2024.
    """

    linkage: str = choice("average", LINKAGES)
    prop_attn: bool = True

    name = "atc"
    source = "Haurum et al., ECCV 2024"
    kind = "merge"
    traits = Traits(sizes=True, proportional=lambda m: m.prop_attn)

    def map(self, tokens: Tokens, signals: Signals, step: Step) -> TokenMap | None:
        prefix, patches = tokens.layout.num_prefix, tokens.num_patches
        count = kept_patches(tokens.length, step, tokens.layout)
        if count == patches:
            return None  # so it is for every image, however many of its tokens are padding
        with torch.no_grad():
            apart = squared_distances(F.normalize(signals.metric[:, prefix:].float(), dim=2)) / 2
            if tokens.visible is not None:  # hidden patches merge first, and with visible ones last
                seen = tokens.visible[:, prefix:]
                one, other = seen.unsqueeze(1), seen.unsqueeze(2)
                apart = torch.where(one & other, apart, torch.where(one | other, _FAR, -1.0))
            own = own_counts(kept_of(step, tokens.layout), tokens)
            merges = patches - count
            if own is not None:
                real = tokens.valid[:, prefix:]
                apart = apart.masked_fill(~(real.unsqueeze(1) & real.unsqueeze(2)), float("inf"))
                merges = real.sum(1, keepdim=True) - own
            head = agglomerate(apart, merges, patches - count, self.linkage, may_look(tokens.x))
            here = torch.arange(patches, device=head.device).expand_as(head)
            is_head = head == here
            if own is not None:
                is_head = is_head & real
            slot = (is_head.long().cumsum(1) - 1).gather(1, head) + prefix
            front = torch.arange(prefix, device=head.device).expand(head.shape[0], -1)
            assign = torch.cat([front, slot if own is None else torch.where(real, slot, -1)], dim=1)
            heads = torch.cat([torch.ones_like(front, dtype=torch.bool), is_head], dim=1)
        return group_map(assign, heads, prefix + count, tokens.sizes(), real_rows(own, count, prefix))

    def macs(self, n: int, n_out: int, shape: BlockShape, layout: Layout, step: Step) -> int:
        return (n - layout.num_prefix) ** 2 * shape.head_dim + (n - n_out) * shape.dim
