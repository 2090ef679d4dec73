"""One token for every 2 x 2 patches that look alike, decided before the model (CTS).

Lu, de Geus, Dubbelman, "Content-aware Token Sharing for Efficient Semantic Segmentation with Vision Transformers",
CVPR 2023.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..maps import ReplaceMap, group_map
from ..ops.rows import split_dim
from .tokens import Layout, Tokens


def groups_of(layout: Layout, who: str) -> tuple[int, int]:
    """Groups (down, right) of 2 x 2 patches in the grid.

    Args:
        layout: the sequence.
        who: who asks, for the message.

    Raises:
        ValueError: a side of the grid is odd.
    """
    high, wide = layout.grid
    if high % 2 or wide % 2:
        raise ValueError(f"{who} groups 2 x 2 patches, but the grid of {high} x {wide} is odd; use another image size")
    return high // 2, wide // 2


def colour_variance(images: Tensor, groups: tuple[int, int]) -> Tensor:
    """Variance of the colours inside each group of 2 x 2 patches, summed over channels [B, G] float32.

    Args:
        images: [B, C, H, W]; resized first where groups do not divide it (images that the model pads).
        groups: groups (down, right).
    """
    images, (down, right) = images.float(), groups
    high, wide = (-(-side // count) * count for side, count in zip(images.shape[-2:], groups))
    if images.shape[-2:] != (high, wide):
        images = F.interpolate(images, (high, wide), mode="bilinear", align_corners=False)
    cells = split_dim(split_dim(images, 3, right, -1), 2, down, -1)  # [B, C, down, h, right, w]
    return (cells - cells.mean((3, 5), keepdim=True)).square().mean((3, 5)).sum(1).flatten(1)


def visible_pixels(tokens: Tokens, images: Tensor) -> Tensor:
    """1 for pixels of visible patches, 0 for those that a mask hides [B, 1, H, W]."""
    prefix, (high, wide) = tokens.layout.num_prefix, tokens.layout.grid
    place = tokens.original_positions()[:, prefix:] - prefix
    seen = torch.zeros(images.shape[0], high * wide, device=images.device, dtype=images.dtype)
    seen = seen.scatter(1, place, tokens.visible[:, prefix:].to(images.dtype)).view(-1, 1, high, wide)
    # images that the model pads up to whole patches end within the last ones
    patch = -(-images.shape[-2] // high), -(-images.shape[-1] // wide)
    pixels = seen.repeat_interleave(patch[0], dim=2).repeat_interleave(patch[1], dim=3)
    return pixels[..., : images.shape[-2], : images.shape[-1]]


def share_groups(tokens: Tokens, scores: Tensor, count: int, values: Tensor) -> ReplaceMap:
    """The best groups of 2 x 2 patches of each image become one token each, with given values.

    The new order is [prefix, patches on their own in raster order, groups in raster order]. Groups that lost a patch
    before, or are one token already, stay as they are. Groups that a mask hides come first, those that it hides in part
    last.

    Args:
        tokens: tokens in front of block 0, on a grid of even sides.
        scores: score of every group in raster order [B, G]: a network's, colour's, or a map of the truth.
        count: groups that every image shares.
        values: value of every group as one token [B, G, C].
    """
    prefix, (high, wide) = tokens.layout.num_prefix, tokens.layout.grid
    device, batch, full = scores.device, scores.shape[0], high * wide // 4
    place = tokens.original_positions()[:, prefix:] - prefix  # [B, M]
    row, column = place.div(wide, rounding_mode="floor"), place % wide
    group = row.div(2, rounding_mode="floor") * (wide // 2) + column.div(2, rounding_mode="floor")
    scores = scores.detach()
    if tokens.num_patches != high * wide:
        members = torch.zeros(batch, full, dtype=torch.int64, device=device)
        members = members.scatter_add(1, group, torch.ones_like(group))
        scores = scores.masked_fill(members < 4, float("-inf"))
    if tokens.visible is not None:
        scores = _hidden_first(scores, tokens.visible[:, prefix:], group)
    chosen = scores.topk(count, dim=1).indices.sort(dim=1)[0]
    shares = torch.zeros(batch, full, dtype=torch.bool, device=device)
    shares = shares.scatter(1, chosen, torch.ones_like(chosen, dtype=torch.bool))
    shared = shares.gather(1, group)
    alone = tokens.num_patches - 4 * count
    own_slot = (~shared).long().cumsum(1) - 1
    group_slot = (shares.long().cumsum(1) - 1 + alone).gather(1, group)
    front = torch.arange(prefix, device=device).expand(batch, -1)
    assign = torch.cat([front, prefix + torch.where(shared, group_slot, own_slot)], dim=1)
    is_head = torch.cat(
        [torch.ones_like(front, dtype=torch.bool), ~shared | ((row % 2 == 0) & (column % 2 == 0))], dim=1
    )
    grouping = group_map(assign, is_head, prefix + alone + count, tokens.sizes(), None)
    index = chosen.unsqueeze(-1).expand(-1, -1, values.shape[-1])
    return ReplaceMap(grouping, values.gather(1, index))


def _hidden_first(scores: Tensor, visible: Tensor, group: Tensor) -> Tensor:
    """Scores of groups [B, G], those of whole groups that are hidden largest and those of mixed ones least.

    Args:
        scores: [B, G], -inf for groups that are not whole.
        visible: [B, M] bool.
        group: group of every patch [B, M].
    """
    count = torch.zeros_like(scores).scatter_add(1, group, visible.to(scores.dtype))
    whole, limits = scores > float("-inf"), torch.finfo(scores.dtype)
    scores = scores.masked_fill(whole & (count < 4), limits.min)
    return scores.masked_fill(whole & (count == 0), limits.max)
