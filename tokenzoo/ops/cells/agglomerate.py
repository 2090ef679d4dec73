"""Agglomerative clustering: the nearest two clusters merge until as many are left as asked.

Merges happen in rounds: all pairs of clusters that are each other's nearest at once. For single, average and complete
linkage this gives the tree that merging one pair at a time gives (no merge brings clusters nearer to a third one), and
the lowest merges of the tree are the clusters. Rounds are few on real tokens; in the worst case each has one merge.
"""

from __future__ import annotations

import torch
from torch import Tensor

LINKAGES = ("single", "average", "complete")
_NEVER = float("inf")


def agglomerate(distances: Tensor, merges: Tensor | int, most: int, linkage: str, early: bool) -> Tensor:
    """Head of the cluster of every token, the first of its members [B, N].

    Args:
        distances: symmetric [B, N, N]; inf to tokens that take no part.
        merges: merges of every image, [B, 1] or one number.
        most: the largest of them.
        linkage: distance of clusters: that of the nearest two members, the mean over pairs, or the farthest two.
        early: stop as soon as no further merge counts, which takes a look of the host at every round; else `most`
            rounds run.
    """
    batch, n = distances.shape[0], int(distances.shape[1])  # the tracer hands sizes out as tensors
    index = torch.arange(n, device=distances.device)
    here = index.expand(batch, -1)
    rows = torch.arange(batch, device=distances.device).unsqueeze(1)
    itself = index.unsqueeze(1) == index
    apart = distances.float().masked_fill(itself, _NEVER)
    size, reached = torch.ones_like(apart[..., 0]), torch.full_like(apart[..., 0], -_NEVER)
    # of every token that a cluster took in: by whom, at what distance, and when
    into, height, when = here, torch.full_like(size, _NEVER), torch.zeros_like(here)
    for number in range(most):
        nearest, partner = apart.min(2)
        if early and number:
            settled = (height <= nearest.amin(1, keepdim=True)) & (into != here)
            if bool((settled.sum(1, keepdim=True) >= merges).all()):
                break
        mutual = (partner.gather(1, partner) == here) & (nearest < _NEVER)
        taken = mutual & (partner < here)
        # two clusters that become one are as far as this, and no nearer than what is in them
        level = torch.maximum(nearest, torch.maximum(reached, reached.gather(1, partner)))
        into, height = torch.where(taken, partner, into), torch.where(taken, level, height)
        when = torch.where(taken, number, when)
        other = torch.where(mutual, partner, here)
        apart = _joined(apart, other, size, rows, linkage)
        size = torch.where(mutual, size + size.gather(1, other), size)
        reached = torch.where(mutual, level, reached)
        gone = into != here
        for outside in (gone.unsqueeze(1), gone.unsqueeze(2), itself):
            apart = apart.masked_fill_(outside, _NEVER)
    first = when * n + index
    lower = height.unsqueeze(1) < height.unsqueeze(2)
    tied = (height.unsqueeze(1) == height.unsqueeze(2)) & (first.unsqueeze(1) < first.unsqueeze(2))
    counts = ((lower | tied).sum(2) < merges) & (into != here)
    head = torch.where(counts, into, here)
    for _ in range(max(1, (n - 1).bit_length())):  # every look doubles how far it goes
        head = head.gather(1, head)
    return head


def _joined(apart: Tensor, other: Tensor, size: Tensor, rows: Tensor, linkage: str) -> Tensor:
    """Distances where every cluster and its partner, itself where it has none, are one."""
    joined = apart
    share = (size / (size + size.gather(1, other))).unsqueeze(2)
    for _ in range(2):  # rows, then columns
        partners = joined[rows, other]
        if linkage == "single":
            joined = torch.minimum(joined, partners)
        elif linkage == "complete":
            joined = torch.maximum(joined, partners)
        else:  # no inf - inf where both are no clusters any more
            joined = torch.where(partners == joined, joined, partners.lerp(joined, share))
        joined = joined.transpose(1, 2).contiguous()
    return torch.maximum(joined, joined.transpose(1, 2)) if linkage == "average" else joined  # exactly symmetric
