"""Three groups of tokens by the step size of a scan: some stay as they are, some are merged into, some disappear.

The step size is the gate of a selective scan: a large one lets a token overwrite the state, a small one lets the state
pass over it, so that the tokens with the smallest steps are missed least.

Source: Ma, Zhang, Su, Chen, Song, Zheng, Gao, "Training-free Token Reduction for Vision Mamba", 2025.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .bipartite import Pairs, set_pairs
from .ordered import sort_pairs


class Groups(NamedTuple):
    """Patch numbers of the three groups, scores falling inside each and from each to the next.

    Attributes:
        keep: stay untouched [B, K].
        target: may receive [B, T].
        source: are merged away [B, r].
    """

    keep: Tensor
    target: Tensor
    source: Tensor


def group_by_score(scores: Tensor, r: int, targets: int) -> Groups:
    """The r patches with the lowest scores are sources, the next ones targets, the best stay.

    Args:
        scores: [B, M].
        r: sources, below M.
        targets: 1 to M - r.
    """
    ranked = scores.argsort(dim=1, descending=True)
    sizes = (scores.shape[1] - targets - r, targets, r)
    return Groups(*ranked.split(sizes, dim=1))


def group_pairs(metric: Tensor, groups: Groups, num_prefix: int) -> Pairs:
    """Every source merges into its most similar target (cosine); what is left keeps its order.

    Args:
        metric: what likeness is measured on [B, N, D], prefix tokens in front.
        groups: of the patches, numbered without the prefix.
        num_prefix: tokens at the front that stay out of it.
    """
    keep, target, source = (group + num_prefix for group in groups)
    found = set_pairs(metric, source, target)
    front = torch.arange(num_prefix, device=keep.device).expand(keep.shape[0], -1)
    order = torch.cat([front, keep, target], dim=1)
    return sort_pairs(Pairs(order, source, found.slot + num_prefix + keep.shape[1]))
