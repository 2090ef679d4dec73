"""What a dropper sees in front of a layer of the language model, computed only when it asks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.attention import full_precision
from ..ops.rows import split_dim, take_rows

_SLICE = 64  # query rows at once where many are asked about: their maps are never held as a whole


class Left(NamedTuple):
    """A dropper's decision.

    Attributes:
        keep: rows that stay [B, N] bool; those that are not visual stay in any case.
        x: new values of all rows [B, N, D], of which those that stay are taken; None leaves values alone.
    """

    keep: Tensor
    x: Tensor | None = None


class LayerRows(NamedTuple):
    """Rows that reach a layer.

    Attributes:
        x: values [B, N, D].
        visual: rows that may be dropped [B, N] bool.
        real: rows that are no padding [B, N] bool.
        keep: visual rows that have to stay, of each prompt.
        asking: in training, rows whose next token begins a trained answer [B, N] bool; None in inference.
    """

    x: Tensor
    visual: Tensor
    real: Tensor
    keep: list[int]
    asking: Tensor | None = None

    @property
    def text(self) -> Tensor:
        """Rows of words [B, N] bool."""
        return self.real & ~self.visual

    @property
    def last(self) -> Tensor:
        """The last real row of each prompt [B, N] bool."""
        index = torch.arange(self.real.shape[1], device=self.real.device)
        last = (index * self.real).max(1, keepdim=True).values
        return index == last

    @property
    def questions(self) -> Tensor:
        """The last row of each question [B, N] bool: in front of every trained answer, else the last of the prompt."""
        if self.asking is None:
            return self.last
        return torch.where(self.asking.any(1, keepdim=True), self.asking, self.last)

    def best(self, score: Tensor) -> Left:
        """Keeps the visual rows with the highest scores; of equal ones (scores underflow) the first.

        Args:
            score: [B, N]; those of other rows are ignored.
        """
        counts = torch.tensor(self.keep, device=score.device).unsqueeze(1)
        score = score.detach().masked_fill(~self.visual, float("-inf"))
        rank = score.sort(dim=1, descending=True, stable=True).indices.argsort(1)
        return Left(self.visual & (rank < counts))


class Reading:
    """Queries and keys of one layer for the rows that reached it.

    Args:
        layer: a decoder layer, plain or reducing.
        x: what it was given [B, N, D].
        rope: cosines and sines [B, N, d].
        real: rows that are no padding [B, N] bool.
    """

    def __init__(self, layer: Any, x: Tensor, rope: tuple[Tensor, Tensor], real: Tensor) -> None:
        self.layer, self.x, self.rope, self.real = layer, x, rope, real
        self._normed: Tensor | None = None

    @property
    def normed(self) -> Tensor:
        """Rows behind the layer's first norm [B, N, D]."""
        if self._normed is None:
            self._normed = self.layer.input_layernorm(self.x)
        return self._normed

    def _heads(self, proj: str, norm: str, rows: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        attn = self.layer.self_attn
        heads = split_dim(getattr(attn, proj)(rows), 2, -1, attn.head_dim)
        scaled = getattr(attn, norm, None)
        heads = (heads if scaled is None else scaled(heads)).transpose(1, 2)
        rotate = next(m for c in type(self.layer).__mro__ if (m := _rotation(c)) is not None)
        return rotate(heads, heads, *rope)[0]

    def keys(self) -> Tensor:
        """[B, H, N, d] with rotary positions, one per query head."""
        keys = self._heads("k_proj", "k_norm", self.normed, self.rope)
        attn = self.layer.self_attn
        groups = attn.config.num_attention_heads // keys.shape[1]
        return keys.repeat_interleave(groups, 1) if groups > 1 else keys

    def maps(self, queries: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Causal attention of some rows over all rows, mean over heads, a slice of queries at a time.

        Args:
            queries: [B, N] bool.

        Yields:
            Attention [B, q, N] float32 and which of these queries are asked for [B, q] bool.
        """
        with torch.no_grad():
            most = int(queries.sum(1).max())
            order = queries.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :most]
            wanted = queries.gather(1, order)
            keys, attn = self.keys().float(), self.layer.self_attn
            index = torch.arange(self.x.shape[1], device=self.x.device)
            for start in range(0, most, _SLICE):
                part, asked = order[:, start : start + _SLICE], wanted[:, start : start + _SLICE]
                rope = tuple(take_rows(t.expand(part.shape[0], -1, -1), part) for t in self.rope)
                q = self._heads("q_proj", "q_norm", take_rows(self.normed, part), rope).float()
                with full_precision(q):
                    logits = (q @ keys.transpose(2, 3)) * attn.scaling
                cap = getattr(attn, "attn_logit_softcapping", None)
                logits = logits if cap is None else torch.tanh(logits / cap) * cap
                seen = (index <= part.unsqueeze(2)) & self.real.unsqueeze(1)
                seen = seen | (index == part.unsqueeze(2))  # a query of padding sees itself
                yield logits.masked_fill(~seen.unsqueeze(1), float("-inf")).softmax(-1).mean(1), asked


def _rotation(cls: type) -> Any:
    return getattr(sys.modules.get(cls.__module__), "apply_rotary_pos_emb", None)


class LayerSignals:
    """Lazy view of the attention that a dropper is scored by (`Dropper.scored_by`).

    Args:
        reading: of the layer in front of the cut, or behind it.
        rows: what reaches the cut.
    """

    def __init__(self, reading: Reading | None, rows: LayerRows) -> None:
        self._reading, self._rows = reading, rows

    @property
    def reading(self) -> Reading:
        """Queries and keys of the layer."""
        if self._reading is None:
            raise ValueError("attention was asked for by a dropper with scored_by = 'none'")
        return self._reading

    def attention(self, queries: Tensor | None = None) -> Tensor:
        """Attention that every row gets from some queries, mean over heads and queries [B, N] float32.

        Args:
            queries: [B, N] bool; None for the last row of each prompt.
        """
        queries = self._rows.last if queries is None else queries
        total, count = 0, queries.sum(1, keepdim=True).clamp(min=1)
        for rows, asked in self.reading.maps(queries):
            total = total + (rows * asked.unsqueeze(2)).sum(1)
        return total / count

    def strongest(self, queries: Tensor) -> Tensor:
        """The most attention that every row gets from any of some queries, mean over heads [B, N] float32."""
        most = None
        for rows, asked in self.reading.maps(queries):
            part = (rows * asked.unsqueeze(2)).amax(1)
            most = part if most is None else torch.maximum(most, part)
        return most
