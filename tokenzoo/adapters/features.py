"""Features as one plain tensor that the model's own head reads as `model(x)` pools, and the way back from it.

`forward_head(forward_features(x))` equals `model(x)`: libraries around timm call the two one after the other, and a
tensor has no room for the size and validity of its tokens. The form follows from what the head reads:

- Tokens that are left, wherever the head reads these right by themselves: single rows ("token"), no pooling, maxima,
  and every pooling that weighs all tokens alike. Padding rows are zero; where a head takes means or maxima they hold
  the mean of the image instead, which changes neither.
- All tokens, where pooling weighs tokens by size: every original token reads the one it went into, in its original
  place. A token that is repeated as often as its size says equals a mean weighted by size, and a bias of log size in
  attention pooling. Tokens that were dropped are zero rows, which attention pooling of a patched model leaves out; for
  heads that take means they hold the mean.
- Sizes that are no whole numbers (soft clusters) cannot be said by repeating. A mean alone gets one row more, with
  which the plain mean of all rows is the weighted one. Otherwise sizes follow in rows of their own, behind a row of
  NaN: the model's own head reads them; any other head answers NaN, not something wrong.

Means and maxima are right under any head, the model's own or not. Attention pooling outside of the model is right
where nothing was dropped or padded and sizes are whole.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.recipe import Recipe
from ..core.tokens import Layout, Tokens, trace_assign
from ..ops.rows import take_rows
from .pooling import open_tokens, pool_plain


class Reads(NamedTuple):
    """What a head does with the tokens that it gets.

    Attributes:
        attends: attention pooling looks at them.
        mean: a mean is taken, of what attention pooling gives where there is one.
        greatest: a maximum is taken.
        include_prefix: prefix tokens take part.
    """

    attends: bool = False
    mean: bool = False
    greatest: bool = False
    include_prefix: bool = False

    @classmethod
    def of(cls, kind: str, include_prefix: bool = False) -> Reads:
        """A head that pools without parameters: "token", "", or names made of "avg", "max" and "fast"."""
        kind = "avg" if kind == "fast" else kind
        return cls(mean="avg" in kind, greatest="max" in kind, include_prefix=include_prefix)

    def sizes(self, recipe: Recipe) -> tuple[bool, ...]:
        """For every weighing of tokens, whether it looks at sizes: attention pooling first, then the mean."""
        return (recipe.proportional,) * self.attends + (recipe.mass_weighted_pool,) * self.mean

    def weighs(self, recipe: Recipe) -> bool:
        """Whether sizes matter at all."""
        return any(self.sizes(recipe))


def encode(tokens: Tokens, reads: Reads, recipe: Recipe) -> Tensor:
    """Tokens after the final norm as a tensor for the head [B, M, C], prefix in front.

    Args:
        tokens: with their trace if the head `weighs` them.
        reads: what the head does.
        recipe: of the model.
    """
    if tokens.gate is not None and (reads.attends or reads.mean or reads.greatest):
        if reads.attends:
            raise ValueError(
                "forward_features has no form in which an attention pool sees the gates of a method in training; call "
                "model(images), or model.forward_head(model.forward_tokens(images))"
            )
        opened = open_tokens(tokens)
        tokens = tokens._replace(gate=None, valid=opened)
    if tokens.size is None or not reads.weighs(recipe):
        # a mean of the real rows is no greater than the greatest of them
        if tokens.valid is None or reads.attends or not (reads.mean or reads.greatest):
            return tokens.x
        return torch.where(tokens.valid.unsqueeze(-1), tokens.x, _mean(tokens, reads, recipe))
    if all(step.map.whole for step in tokens.trace) and all(reads.sizes(recipe)):
        length = tokens.layout.num_prefix + tokens.layout.num_patches
        assign = trace_assign(tokens.trace, tokens.x.shape[0], length, tokens.x.device)
        absent = torch.zeros_like(tokens.x[:, :1]) if reads.attends else _mean(tokens, reads, recipe)
        return torch.where((assign >= 0).unsqueeze(-1), take_rows(tokens.x, assign.clamp(min=0)), absent)
    if reads.mean and not reads.attends and not reads.greatest:
        x = tokens.x.float()[:, 0 if reads.include_prefix else tokens.layout.own_prefix :]
        rest = (x.shape[1] + 1) * _mean(tokens, reads, recipe).float() - x.sum(1, keepdim=True)
        return torch.cat([tokens.x, rest.to(tokens.x.dtype)], dim=1)
    return _with_sizes(tokens)


def decode(x: Tensor, reads: Reads, recipe: Recipe, layout: Layout) -> Tokens:
    """Tokens as pooling has to see them, from what `encode` gave.

    Args:
        x: [B, M, C], prefix in front.
        reads: what the head does.
        recipe: of the model.
        layout: says how many prefix tokens there are.
    """
    tokens = Tokens(x, layout)
    if recipe.dense:
        return tokens
    weighs = reads.weighs(recipe)
    if weighs and (reads.attends or reads.greatest):
        tokens = _read_sizes(tokens)
    if any(method.pads for method in recipe.methods) or (weighs and reads.attends):
        # a real token is never zero throughout after a norm; should all be, then none of them is missing
        real = (tokens.x[:, layout.num_prefix :] != 0).any(-1)
        real = F.pad(real | ~real.any(1, keepdim=True), (layout.num_prefix, 0), value=True)
        tokens = tokens._replace(valid=real)
    return tokens


def _mean(tokens: Tokens, reads: Reads, recipe: Recipe) -> Tensor:
    """Mean of the tokens as the head takes it [B, 1, C]."""
    weighted = reads.mean and recipe.mass_weighted_pool
    return pool_plain(tokens, "avg", reads.include_prefix, weighted).unsqueeze(1)


def _with_sizes(tokens: Tokens) -> Tensor:
    """N tokens, a row of NaN, and rows that hold the N sizes: [B, N + 1 + ceil(N / C), C]."""
    batch, length, channels = tokens.x.shape
    size = tokens.size.squeeze(-1)
    rows = F.pad(size, (0, -length % channels)).unflatten(1, (-1, channels)).to(tokens.x.dtype)
    mark = torch.full_like(tokens.x[:, :1], float("nan"))
    return torch.cat([tokens.x, mark, rows], dim=1)


def _read_sizes(tokens: Tokens) -> Tokens:
    """Sizes taken out of the rows where `_with_sizes` put them; rows that are no tokens become zero, of size zero.

    Whether they are there depends on the image size, which a tensor does not tell: the row of NaN does.
    """
    x, length, channels = tokens.x, tokens.length, tokens.x.shape[2]
    count = length - 1 - -(-(length - 1) // (channels + 1))  # N, if sizes are there
    marked = x[:, count : count + 1].isnan().all(2, keepdim=True)  # [B, 1, 1]
    is_token = torch.arange(length, device=x.device).view(1, -1, 1) < count
    size = x[:, count + 1 :].flatten(1)[:, :count].unsqueeze(-1).float().detach()
    size = F.pad(size, (0, 0, 0, length - count))
    real = is_token | ~marked
    return tokens._replace(
        x=torch.where(real, x, torch.zeros_like(x)),
        size=torch.where(marked, size, torch.ones_like(size)),
        valid=real.squeeze(-1),
    )
