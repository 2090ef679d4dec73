"""Decisions that keep rows which stand for the others, and for the words of the prompt."""

from __future__ import annotations

import torch
from torch import Tensor

from .deciding import deciding, likeness, unit

_SLICE = 64  # rows that are summed up at once: a float64 copy of all would be as large as two maps


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
    worth = torch.zeros_like(units[:, 0])
    worth = worth if exclude is None else worth.masked_fill(exclude, float("-inf"))
    return covering(rows[None], worth[None], keep)[0]


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
    near = weight * (torch.bmm(units, unit(text).unsqueeze(-1)).squeeze(-1) + 1)
    return covering(likeness(units), near, keep, least=-1.0)  # cosines from -1 to 1: twice the gains of 0 to 1


def covering(covers: Tensor, worth: Tensor, keep: int, least: float = 0.0) -> Tensor:
    """Columns that cover rows best, found greedily: a row is covered as well as by the best column that was chosen.

    Args:
        covers: how well each column covers each row [B, R, N].
        worth: what a column is worth besides [B, N]; minus infinity for those that must not be chosen.
        keep: columns to choose.
        least: how well rows are covered by none.

    Returns:
        In the order in which they are chosen [B, keep] int64.
    """
    if covers.device.type == "cpu":
        return torch.stack([covering_kept(*each, keep, least) for each in zip(covers, worth)])
    return covering_anew(covers, worth, keep, least)


def covering_anew(covers: Tensor, worth: Tensor, keep: int, least: float) -> Tensor:
    """`covering`, in which every step adds up all rows: no step waits for a value, as devices like it."""
    worth, best, chosen = worth.clone(), torch.full_like(covers[..., :1], least), []
    spare = torch.empty_like(covers)
    for _ in range(keep):
        gain = torch.sub(covers, best, out=spare).clamp_(min=0).sum(1) + worth
        chosen.append(gain.argmax(dim=1, keepdim=True))
        worth.scatter_(1, chosen[-1], float("-inf"))
        best = torch.maximum(best, covers.gather(2, chosen[-1].unsqueeze(1).expand_as(best)))
    return torch.cat(chosen, dim=1)


def covering_kept(covers: Tensor, worth: Tensor, keep: int, least: float) -> Tensor:
    """`covering` of one image [R, N], [N] -> [keep], in fewer steps, whose number the values say.

    What a column adds is kept, and brought up to date at the rows that became covered better, which are fewer and
    fewer; in float64, since what is left is small beside what it began with.
    """
    last = ((covers - least).clamp_(min=0).sum(0) + worth).argmax().view(1)
    best, gain, chosen = covers.index_select(1, last), worth.double().index_fill(0, last, float("-inf")), [last]
    for part, own in zip(covers.split(_SLICE), best.split(_SLICE)):
        gain += (part - own).clamp_(min=0).sum(0, dtype=torch.float64)
    for _ in range(keep - 1):
        last = gain.argmax().view(1)
        chosen.append(last)
        gain.index_fill_(0, last, float("-inf"))
        new = covers.index_select(1, last)
        better = torch.nonzero(new.view(-1) > best.view(-1)).view(-1)
        before, after = best.index_select(0, better), new.index_select(0, better)
        gone = covers.index_select(0, better).clamp_(before, after).sub_(before)  # what a column would have added
        gain.sub_(gone.sum(0))
        best = torch.maximum(best, new)
    return torch.cat(chosen)
