"""Decisions over a thumbnail and crops."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .deciding import deciding, top


@deciding
def globalcom2(score: Tensor, part: Tensor, place: Tensor, ratio: float, temperature: float = 10.0) -> Tensor:
    """A share of every crop by what the thumbnail shows in it, and rows of crops by both of their scores.

    Rows of crops stand behind those of the thumbnail, line by line of the image that they make together, without those
    that only pad it.

    Args:
        score: logits of the class token in the tower's last layer, mean over heads [N].
        part: crop of every row [N] int64, 0 for the thumbnail, line by line.
        place: (row, column) of every row in its crop [N, 2].
        ratio: share that stays.
        temperature: of the softmax that spreads shares over crops.

    Returns:
        Which rows stay [N] bool, at least one of the thumbnail.

    Source: Liu et al., "Global Compression Commander: Plug-and-Play Inference Acceleration for High-Resolution Large
    Vision-Language Models", AAAI 2026.
    """
    score, kept = score.float(), torch.zeros_like(part, dtype=torch.bool)
    whole, rows = (part == 0).nonzero().flatten(), (part != 0).nonzero().flatten()
    kept[whole[top(score[whole][None], max(1, int(len(whole) * ratio)))[0]]] = True
    if len(rows) == 0:
        return kept
    spot = place[whole].round().long()
    high, wide = (spot.amax(0) + 1).tolist()
    seen = score.new_zeros(high, wide).index_put((spot[:, 0], spot[:, 1]), score[whole])
    width, across = _canvas(part[rows], place[rows])
    names = part[rows].unique().tolist()
    down = -(-len(names) // across)
    shares = crop_shares(seen, (down, across), ratio, temperature)[: len(names)].tolist()
    large = F.interpolate(seen[None, None], (len(rows) // width, width), mode="bilinear", align_corners=False).flatten()
    for name, share in zip(names, shares):
        at = (part[rows] == name).nonzero().flatten()
        own = F.normalize(score[rows[at]], dim=0) + F.normalize(large[at], dim=0)
        kept[rows[at[top(own[None], int(len(at) * share))[0]]]] = True
    return kept


@deciding
def crop_shares(seen: Tensor, crops: tuple[int, int], ratio: float, temperature: float = 10.0) -> Tensor:
    """Share of each crop that stays, by the sum of scores over its cell of the thumbnail.

    Args:
        seen: scores of the thumbnail [high, wide].
        crops: (down, across).
        ratio: mean share.
        temperature: of the softmax over crops.

    Returns:
        [down * across] float32, at most 1 each.
    """
    (high, wide), (down, across) = seen.shape, crops
    cells = [seen[_stretch(i, down, high), _stretch(j, across, wide)] for i in range(down) for j in range(across)]
    total = torch.stack([cell.sum() for cell in cells]).float() / temperature
    weight = (total - total.amax()).exp()
    weight = weight / (weight.sum() + 1e-8)
    return (ratio * (1 + weight - weight.mean())).clamp(max=1)


def _canvas(part: Tensor, place: Tensor) -> tuple[int, int]:
    """Rows per line of the image that crops make, and crops side by side."""
    start = ((part == part[0]) & (place[:, 1] == place[0, 1])).nonzero().flatten()  # where lines begin
    width = int(start[1]) if len(start) > 1 else len(part)
    return width, len(part[:width].unique())


def _stretch(i: int, count: int, length: int) -> slice:
    """The i-th of equal stretches of a side; the last one takes what is left over."""
    size = length // count
    return slice(i * size, length if i == count - 1 else (i + 1) * size)
