"""Decisions that keep rows which stand for the others, and for the words of the prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from .deciding import deciding, likeness, unit


@deciding
def mmtok(
    text: Tensor, vision: Tensor, tower: Tensor, keep: int, alpha: float = 0.5, text_temperature: float = 0.02,
    image_temperature: float = 0.2, exclude: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Rows that cover the words and all other rows as well as they can, found greedily.

    Args:
        text: words of the question as the language model sees them [T, D]; none are allowed.
        vision: rows as the language model would see them [N, D].
        tower: the same rows in front of the projector [N, C].
        keep: rows that stay.
        alpha: weight of covering rows against that of covering words.
        text_temperature: of the softmax between words and rows.
        image_temperature: of that between rows.
        exclude: rows that must not stay [N] bool, padding; None for none.

    Returns:
        Rows that stay, in the order in which they are chosen [keep] int64.

    Source: Dong et al., "MMTok: Multimodal Coverage Maximization for Efficient Inference of VLMs", 2025.
    """
    units = unit(tower)
    rows = (likeness(units[None])[0] / image_temperature).softmax(-1) * (alpha / len(units))
    if len(text):
        words = (unit(text) @ unit(vision).T / text_temperature).softmax(-1) / len(text)
        rows = torch.cat([words, rows])
    best, chosen, spare = torch.zeros_like(rows[:, :1]), [], torch.empty_like(rows)
    gone = torch.zeros(len(units), dtype=torch.bool, device=units.device) if exclude is None else exclude.clone()
    for _ in range(keep):
        gain = torch.sub(rows, best, out=spare).clamp_(min=0).sum(0).masked_fill_(gone, float("-inf"))
        last = gain.argmax(dim=0, keepdim=True)
        chosen.append(last)
        gone.index_fill_(0, last, True)
        best = torch.maximum(best, rows.index_select(1, last))
    return torch.cat(chosen)


@deciding
def catp(x: Tensor, text: Tensor, keep: int, weight: float = 0.7) -> Tensor:
    """Rows that stand for the others and are near the text: facility location and alignment, found greedily.

    Args:
        x: rows as the language model would see them [B, N, D].
        text: mean embedding of the words [B, D].
        keep: rows that stay.
        weight: of the alignment.

    Returns:
        Rows that stay, in the order in which they are chosen [B, keep] int64.

    Source: Li et al., "CATP: Contextually Adaptive Token Pruning for Efficient and Enhanced Multimodal In-Context
    Learning", 2025.
    """
    units = unit(x)
    alike = likeness(units).add_(1).div_(2)
    near = weight * (torch.bmm(units, unit(text).unsqueeze(-1)).squeeze(-1) + 1) / 2
    best, chosen, spare = torch.zeros_like(near), [], torch.empty_like(alike)
    for _ in range(keep):
        gain = torch.sub(alike, best.unsqueeze(1), out=spare).clamp_(min=0).sum(2) + near
        last = gain.argmax(dim=1)
        chosen.append(last)
        near = near.scatter(1, last.unsqueeze(1), float("-inf"))
        best = torch.maximum(best, alike[torch.arange(len(alike), device=x.device), last])
    return torch.stack(chosen, dim=1)
