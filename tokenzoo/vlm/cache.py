"""A cache that knows which rows it no longer holds.

`get_seq_length` says how many rows were ever put in, by which positions, continuation and prompt lookup go;
`get_query_offset` and the sizes of masks say how many are held.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaModel
from transformers.cache_utils import DynamicCache

from .passing import Held

# `past_key_values` became `cache` in transformers 5.24, and goes by both names until 5.40
CACHE = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"


class Kept:
    """Where the rows of a cache come from.

    Rows that were put in by one token or more without a loss only count (`tail`), so that decoding does no tensor work.

    Attributes:
        index: for the rows of the last pass that dropped some, and all before it: their number among all rows that were
            ever put in [B, P].
        valid: which of them are no padding of ours [B, P] bool, None for all.
        tail: rows put in since.
        length: rows ever put in.
        dropped: rows of each prompt taken out in front of the language model [B, 1].
        layers: what each layer behind a dropper holds of them.
    """

    def __init__(self, batch: int, past: int, device: torch.device) -> None:
        self.index = torch.arange(past, device=device).expand(batch, -1)
        self.valid: Tensor | None = None
        self.tail, self.length = 0, past
        self.dropped = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.layers: dict[int, Held] = {}

    @property
    def held(self) -> int:
        """Rows in front of the first dropper."""
        return self.index.shape[1] + self.tail

    def rows(self) -> tuple[Tensor, Tensor | None]:
        """Number of each held row among all ever put in, and which are no padding."""
        index, valid = self.index, self.valid
        if self.tail:
            new = torch.arange(self.length - self.tail, self.length, device=index.device).expand(index.shape[0], -1)
            index = torch.cat([index, new], 1)
            valid = None if valid is None else torch.cat([valid, torch.ones_like(new, dtype=torch.bool)], 1)
        return index, valid

    def real(self) -> Tensor | None:
        """Which held rows are no padding of ours; None for all, without tensor work, as in most decoding."""
        return None if self.valid is None else self.rows()[1]

    def append(self, n: int) -> None:
        """Notes rows of which none is dropped."""
        self.tail += n
        self.length += n

    def extend(self, order: Tensor, valid: Tensor | None, n: int, dropped: Tensor) -> None:
        """Notes a pass that dropped some.

        Args:
            order: rows that are left [B, K].
            valid: which are no padding [B, K] bool, None for all.
            n: rows before.
            dropped: rows of each prompt that went [B, 1].
        """
        index, known = self.rows()
        if known is not None or valid is not None:
            parts = ((index, known), (order, valid))
            self.valid = torch.cat([torch.ones_like(t, dtype=torch.bool) if v is None else v for t, v in parts], 1)
        self.index = torch.cat([index, order + self.length], 1)
        self.tail, self.length, self.dropped = 0, self.length + n, self.dropped + dropped

    def change(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Applies a function of the batch to all that is held."""
        self.index, self.dropped = fn(self.index), fn(self.dropped)
        self.valid = None if self.valid is None else fn(self.valid)
        self.layers = {
            i: Held(fn(h.cols), None if h.valid is None else fn(h.valid), fn(h.dropped)) for i, h in self.layers.items()
        }

    def crop(self, n: int) -> None:
        """Takes the last n rows off.

        Raises:
            ValueError: rows of a pass that dropped some; where they would have been is not known.
        """
        if n > self.tail:
            raise ValueError(
                f"{n} rows are to be taken off a cache that holds {self.tail} behind a prompt with dropped rows; give "
                "the prompt anew"
            )
        self.tail, self.length = self.tail - n, self.length - n


class ReducedCache(DynamicCache):
    """`DynamicCache` of which rows were dropped: lengths count all, masks those that are held."""

    kept: Kept | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return super().get_seq_length(layer_idx) if self.kept is None else self.kept.length

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return DynamicCache.get_seq_length(self, layer_idx)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._change(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._change(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._change(lambda t: t[indices])

    def _change(self, fn: Callable[[Tensor], Tensor]) -> None:
        if self.kept is not None:
            self.kept.change(fn)

    def crop(self, tokens_to_remove: int) -> None:
        n = abs(tokens_to_remove)
        if self.kept is not None and n:
            self.kept.crop(n)
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        super().reset()
        self.kept = None


def reduced(cache: Any) -> ReducedCache | None:
    """A cache as one that can hold fewer rows, in place.

    Raises:
        TypeError: a cache of another class than `DynamicCache`.
    """
    if cache is None or isinstance(cache, ReducedCache):
        return cache
    if type(cache) is not DynamicCache:
        raise TypeError(
            f"the cache is {type(cache).__name__}, whose rows cannot be dropped; use a DynamicCache (the default of "
            "generate), or tokenzoo.unpatch_model(model) first"
        )
    if getattr(cache, "offloading", False):
        raise TypeError("the cache is offloaded, whose rows cannot be dropped; use a DynamicCache without offloading")
    cache.__class__ = ReducedCache
    return cache
