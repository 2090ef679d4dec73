"""What a method may look at inside a block, computed only when it asks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..maps import TokenMap
from ..ops.attention import Heads, attend, attention_received, attention_rows, drop_map
from ..ops.map_reading import MapStatistics, map_statistics
from ..ops.rows import split_dim, take_rows
from .tokens import Tokens


class Signals:
    """Lazy view of one block's attention, kept in step with the tokens when several maps follow each other.

    Args:
        heads: the projected heads, or a function that projects them when first needed.
        bias: bias of the attention logits [B or 1, 1 or H, 1 or N, N] or None, or a function that makes it when first
            needed.
        tokens: the tokens that the heads were projected from.
        training: whether the block is in training mode.

    Attributes:
        module: the learned module that a method keeps in this block, None for methods without parameters.
        branch: "attention" or "mlp" for methods around a branch, else None.
        branch_input: what that branch reads [B, N, C], None where the residual stream is merged in front of its norm.
    """

    def __init__(
        self,
        heads: Heads | Callable[[], Heads],
        bias: Tensor | Callable[[], Tensor | None] | None,
        tokens: Tokens,
        training: bool = False,
    ) -> None:
        self._heads, self._given_bias, self._tokens, self.training = heads, bias, tokens, training
        self._maps: tuple[TokenMap, ...] = ()
        self._class_rows: Tensor | None = None  # of the tokens before any map: several hooks of a method may look
        self._values: Tensor | None = None
        self._values_from = 0  # maps before this one were applied already when the values were projected
        self.module: nn.Module | None = None
        self.seen: MapStatistics | None = None  # read while attention ran, of the tokens before any map
        self.branch: str | None = None
        self.branch_input: Tensor | None = None

    def after(self, token_map: TokenMap) -> Signals:
        """The same signals for the tokens that a map leaves."""
        other = Signals(self._heads, self._given_bias, self._tokens, self.training)
        other.seen, other._class_rows = self.seen, self._class_rows
        other._maps, other._values, other._values_from = (*self._maps, token_map), self._values, self._values_from
        return other

    def with_values(self, values: Tensor) -> Signals:
        """The same signals with value vectors [B, H, N, Dv] that were projected from the current tokens."""
        self._values, self._values_from = values, len(self._maps)
        return self

    def with_module(self, module: nn.Module | None) -> Signals:
        """The same signals with another learned module."""
        self.module = module
        return self

    @property
    def heads(self) -> Heads:
        """The projected heads of the block, before any map."""
        if callable(self._heads):
            self._heads = self._heads()
        return self._heads

    @property
    def _bias(self) -> Tensor | None:
        """The bias of the logits, before any map."""
        if callable(self._given_bias):
            self._given_bias = self._given_bias()
        return self._given_bias

    def _rows(self, t: Tensor, start: int = 0) -> Tensor:
        """[B, H, N, D] -> rows [B, N', H, D] of the current tokens; the first `start` maps are skipped."""
        _, count, _, width = t.shape
        rows = t.transpose(1, 2).flatten(2)
        for token_map in self._maps[start:]:
            rows = token_map.apply(rows)
        return split_dim(rows, 2, count, width)

    def _columns(self, attention: Tensor) -> Tensor:
        """Attention received by each token, [B, N, D] summed over the members of each current token."""
        for token_map in self._maps:
            attention = token_map.pool(attention)
        return attention

    @property
    def keys(self) -> Tensor:
        """Keys of the current tokens [B, N, H, D]."""
        return self._rows(self.heads.k)

    @property
    def mean_key(self) -> Tensor:
        """Mean of the keys over heads [B, N, D]: the usual similarity metric."""
        k = self.heads.k.mean(1)
        for token_map in self._maps:
            k = token_map.apply(k)
        return k

    @property
    def metric(self) -> Tensor:
        """What tokens are alike by: the mean of the keys over heads [B, N, D]."""
        return self.mean_key

    @property
    def queries(self) -> Tensor:
        """Queries of the current tokens [B, N, H, D]."""
        return self._rows(self.heads.q)

    @property
    def values(self) -> Tensor:
        """Values of the current tokens [B, N, H, Dv]."""
        if self._values is not None:
            return self._rows(self._values, self._values_from)
        return self._rows(self.heads.v)

    @property
    def class_attention(self) -> Tensor:
        """Attention of the class token to every token, per head [B, H, N] float32: one softmax row, no map."""
        if not self._tokens.layout.has_class:
            raise ValueError(
                "class attention was asked for, but the model has no class token; use a method that does not need one"
            )
        if self._class_rows is None:
            self._class_rows = attention_rows(self.heads, 0, 1, self._bias).squeeze(2)
        row = self._class_rows
        return row if not self._maps else self._columns(row.transpose(1, 2)).transpose(1, 2)

    @property
    def asking(self) -> Tensor | None:
        """Tokens before any map of this block whose queries count [B, N] bool, None for all."""
        tokens = self._tokens
        return tokens.valid if tokens.visible is None else tokens.visible

    @property
    def attention_received(self) -> Tensor:
        """Mean attention that every token receives over heads and queries [B, N] float32, in slices, no map stored.

        Padding and hidden tokens do not ask.
        """
        received = attention_received(self.heads, self._bias, self.asking)
        return self._columns(received.unsqueeze(-1)).squeeze(-1)

    @property
    def map_statistics(self) -> MapStatistics:
        """Attention of every token to itself, and what it receives, per head; padding and hidden tokens do not ask."""
        found = map_statistics(self.heads, self._bias, self.asking) if self.seen is None else self.seen
        if not self._maps:
            return found
        return MapStatistics(*(self.pooled(part.transpose(1, 2)).transpose(1, 2) for part in found[:3]))

    def pooled(self, values: Tensor) -> Tensor:
        """Values of the tokens before any map of this block [B, N, D], summed over the members of each current one."""
        return self._columns(values)

    @property
    def importance(self) -> Tensor:
        """Head-mean class attention, or mean attention received where there is no class token [B, N] float32."""
        if self._tokens.layout.has_class:
            return self.class_attention.mean(1)
        return self.attention_received

    @property
    def attention(self) -> Tensor:
        """The whole map [B, H, N, N] float32 before any reduction of this block. Quadratic: only for who must."""
        return attention_rows(self.heads, 0, self.heads.q.shape[2], self._bias)


class EmbedSignals:
    """What a method before block 0 may look at.

    Args:
        model: the patched model.
        image: the images [B, C, H, W].
        module: the learned module that the method keeps, None for methods without parameters.
    """

    def __init__(self, model: Any, image: Tensor, module: nn.Module | None = None) -> None:
        self._model, self.image, self.module, self.training = model, image, module, model.training

    @property
    def half(self) -> Tensor:
        """Tokens of the image at half resolution [B, H / 2 * W / 2, C], ready for block 0."""
        half, model = self._model.embed_half(self.image), self._model
        norm = getattr(model, "norm_pre", None)
        if norm is None:
            return half
        if not model.tokenzoo_recipe.protect:
            return norm(half)
        # a hook there may put tokens behind the prefix
        front = half.new_zeros(half.shape[0], model.num_prefix_tokens, half.shape[2])
        return norm(torch.cat([front, half], dim=1))[:, -half.shape[1] :]


def attend_through(heads: Heads, bias: Tensor | None, ahead: list[TokenMap], kept: list[TokenMap]) -> Tensor:
    """Attention output of the tokens that remain when maps act inside attention.

    `ahead` maps were decided before attention: their output is W A L v' (A the map on the old tokens, L the way back),
    computed by lifting v', attending at full length and averaging rows, so that no map is stored. `kept` maps select
    query rows, which makes attention itself cheaper.

    Args:
        heads: q and k of the old tokens; v of the tokens after `ahead`.
        bias: bias of the keys of the old tokens.
        ahead: maps that merge before attention, in order.
        kept: maps that select rows, in order.

    Returns:
        [B, N', H * Dv].
    """
    if not ahead:
        q, placed = heads.q, heads.placed
        for token_map in kept:
            # rows per image: [B, H, N, D] viewed as [B, N, H * D] would copy; index the token axis directly
            q = take_rows(q.transpose(1, 2), token_map.heads).transpose(1, 2)
            placed = None if placed is None else placed.rows(token_map.heads)
            if bias is not None and bias.shape[-2] != 1:
                bias = bias.expand(q.shape[0], -1, -1, -1)
                bias = take_rows(bias.transpose(1, 2), token_map.heads).transpose(1, 2)
        return attend(heads._replace(q=q, placed=placed), bias)
    if not all(token_map.linear for token_map in ahead):
        return _attend_explicit(heads, bias, ahead, kept)
    width = heads.v.shape[-1]
    v = heads.v.transpose(1, 2).flatten(2)
    for token_map in reversed(ahead):
        v = token_map.lift(v)
    heads = heads._replace(v=split_dim(v, 2, -1, width).transpose(1, 2))
    out = attend(heads, bias)
    for token_map in (*ahead, *kept):
        out = token_map.apply(out)
    return out


def _attend_explicit(heads: Heads, bias: Tensor | None, ahead: list[TokenMap], kept: list[TokenMap]) -> Tensor:
    """`attend_through` for maps that are no matrices (elementwise maxima): the map itself, one head at a time."""
    outs: list[Tensor] = []
    mixed = None
    if heads.talk is not None:  # every head needs the maps of all
        mixed = heads.talk.map(attention_rows(heads, 0, heads.q.shape[2], bias), bias).float()
    step = 1 if heads.lam is None else 2
    for head in range(heads.v.shape[1]):
        part = slice(head * step, (head + 1) * step)
        lam = heads.lam if heads.lam is None or heads.lam.dim() == 0 else heads.lam[:, head : head + 1]
        placed = None if heads.placed is None else heads.placed.heads(part)
        one = heads._replace(q=heads.q[:, part], k=heads.k[:, part], lam=lam, placed=placed)
        own_bias = bias if bias is None or bias.shape[1] == 1 else bias[:, part]
        attention = mixed[:, head] if mixed is not None else attention_rows(one, 0, one.q.shape[2], own_bias).squeeze(1)
        for token_map in ahead:
            attention = token_map.pool(attention.transpose(1, 2)).transpose(1, 2)
            attention = token_map.apply(attention)
        for token_map in kept:
            attention = token_map.apply(attention)
        if not heads.fused:  # such a layer has its map in memory anyway, and puts it through its dropout in one piece
            outs.append(attention.to(heads.v.dtype))
            continue
        if heads.dropout:
            attention = F.dropout(attention, heads.dropout)
        outs.append(torch.bmm(attention.to(heads.v.dtype), heads.v[:, head]))
    if heads.fused:
        return torch.cat(outs, dim=2)
    return (drop_map(heads, torch.stack(outs, dim=1)) @ heads.v).transpose(1, 2).flatten(2)
