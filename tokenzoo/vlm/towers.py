"""Queries and keys of layers of towers, read beside the layer's own attention, whose implementation stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..adapters.classes import path_of
from ..ops.attention import Heads, key_bias
from ..ops.rows import split_dim


class Read(NamedTuple):
    """Queries and keys of some crops.

    Attributes:
        heads: [crops, H, N, d].
        real: tokens that are no padding [crops, N] bool, None for all.
    """

    heads: Heads
    real: Tensor | None = None

    @property
    def bias(self) -> Tensor | None:
        """Of the logits [crops, 1, 1, N]."""
        return key_bias(None, self.real)


class Parts(NamedTuple):
    """Names of what makes queries and keys inside a layer.

    Attributes:
        norm: in front of attention.
        attn: the attention layer, with `q_proj`, `k_proj` and `head_dim`.
        scale: the factor of its logits.
    """

    norm: str
    attn: str
    scale: str

    def __call__(self, layer: Any, x: Tensor, options: dict[str, Any]) -> list[Read]:
        z, attn = getattr(layer, self.norm)(x), getattr(layer, self.attn)
        q, k = attn.q_proj(z), attn.k_proj(z)
        if getattr(attn, "q_norm", None) is not None:  # over all heads together
            q, k = attn.q_norm(q), attn.k_norm(k)
        q, k = (split_dim(t, 2, -1, attn.head_dim).transpose(1, 2) for t in (q, k))
        heads, mask = Heads(q, k, None, getattr(attn, self.scale)), options.get("attention_mask")
        return [Read(heads, None if mask is None else _first_row(mask))]


def _first_row(mask: Tensor) -> Tensor:
    """Which tokens are real [B, N] bool, of a mask [B, 1, N, N] in which all rows see the same."""
    row = mask[:, 0, 0]
    return row if row.dtype == torch.bool else row == 0


_READERS: dict[type, Callable[[Any, Tensor, dict[str, Any]], list[Read]]] = {}


def register_reader(cls: type, reader: Callable[[Any, Tensor, dict[str, Any]], list[Read]]) -> None:
    """Says how queries and keys of a layer are read.

    Args:
        cls: exact class of the layer.
        reader: (layer, its input, its keyword arguments) -> what was read: one for all crops, or one per crop of a
            tower that packs them into one sequence.
    """
    _READERS[cls] = reader


def heads_of(seen: tuple[nn.Module, tuple[Any, ...], dict[str, Any]]) -> list[Read]:
    """Queries and keys of a layer, from what it was given.

    Raises:
        TypeError: a layer of a class that nobody reads.
    """
    layer, args, options = seen
    x = args[0] if args else options["hidden_states"]
    for cls in type(layer).__mro__:
        if cls in _READERS:
            return _READERS[cls](layer, x, options)
    raise TypeError(f"the attention of {path_of(type(layer))} cannot be read; use a selector that does not look at it")
