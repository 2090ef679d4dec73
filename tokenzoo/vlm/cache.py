"""Caches that know which rows they no longer hold.

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
from transformers.cache_utils import Cache, DynamicCache, StaticCache

from .passing import Held

# `past_key_values` became `cache` in transformers 5.24, and goes by both names until 5.40
CACHE = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"


class Kept:
    """Where the rows of a cache come from.

    Nothing here changes in passes that drop no row, so that decoding does no work: how many rows were put in since
    follows from what the cache holds (`ReducedLengths`).

    Attributes:
        index: for the rows of the last pass that dropped some, and all before it: their number among all rows that were
            ever put in [B, P].
        valid: which of them are no padding of ours [B, P] bool, None for all.
        gap: rows ever put in, less those in front of the first dropper that are held.
        short: rows that left the first layer's part of the cache behind a pass, but no other's in front of a dropper.
        dropped: rows of each prompt taken out in front of the language model [B, 1].
        layers: what each layer behind a dropper holds of them.
    """

    def __init__(self, batch: int, past: int, device: torch.device) -> None:
        self.index = torch.arange(past, device=device).expand(batch, -1)
        self.valid: Tensor | None = None
        self.gap = self.short = 0
        self.dropped = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.layers: dict[int, Held] = {}

    def rows(self, held: int) -> tuple[Tensor, Tensor | None]:
        """Number of each held row among all ever put in, and which are no padding.

        Args:
            held: rows in front of the first dropper.
        """
        index, valid = self.index, self.valid
        if held > index.shape[1]:
            new = torch.arange(index.shape[1], held, device=index.device) + self.gap
            new = new.expand(index.shape[0], -1)
            index = torch.cat([index, new], 1)
            valid = None if valid is None else torch.cat([valid, torch.ones_like(new, dtype=torch.bool)], 1)
        return index, valid

    def extend(self, order: Tensor, valid: Tensor | None, n: int, held: int, dropped: Tensor) -> None:
        """Notes a pass that dropped some.

        Args:
            order: rows that are left [B, K].
            valid: which are no padding [B, K] bool, None for all.
            n: rows before.
            held: rows of earlier passes.
            dropped: rows of each prompt that went [B, 1].
        """
        index, known = self.rows(held)
        if known is not None or valid is not None:
            parts = ((index, known), (order, valid))
            self.valid = torch.cat([torch.ones_like(t, dtype=torch.bool) if v is None else v for t, v in parts], 1)
        self.index = torch.cat([index, order + held + self.gap], 1)
        self.gap, self.dropped = self.gap + n - order.shape[1], self.dropped + dropped

    def change(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Applies a function of the batch to all that is held."""
        self.index, self.dropped = fn(self.index), fn(self.dropped)
        self.valid = None if self.valid is None else fn(self.valid)
        self.layers = {
            i: Held(fn(h.cols), None if h.valid is None else fn(h.valid), fn(h.dropped)) for i, h in self.layers.items()
        }


class ReducedLengths:
    """Mixin of caches of which rows were dropped: lengths count all, masks those that are held."""

    kept: Kept | None = None

    @property
    def held(self) -> Any:
        """Rows in front of the first dropper, a tensor in a static cache."""
        stored = super().get_seq_length(0)
        return stored if self.kept is None else stored + self.kept.short

    def rows(self) -> tuple[Tensor, Tensor | None]:
        """See `Kept.rows`."""
        return self.kept.rows(int(self.held))

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        return super().get_seq_length(layer_idx) if self.kept is None else self.held + self.kept.gap

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        return super().get_seq_length(layer_idx) if self.kept is None or not self.kept.layers else self.held

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        if self.kept is None or not self.kept.layers:
            return super().get_mask_sizes(query_length, layer_idx)
        return self.held + query_length, 0  # of all rows, of which layers behind a dropper take theirs

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
            tail = int(self.held) - self.kept.index.shape[1]
            if n > tail:  # where rows of a pass that dropped some would have been is not known
                raise ValueError(
                    f"{n} rows are to be taken off a cache that holds {tail} behind a prompt with dropped rows; give "
                    "the prompt anew"
                )
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        super().reset()
        self.kept = None


class ReducedCache(ReducedLengths, DynamicCache):
    """`DynamicCache` of which rows were dropped."""


class ReducedStaticCache(ReducedLengths, StaticCache):
    """`StaticCache` of which rows were dropped in front of the language model; all layers hold the same.

    Attributes:
        shrinks: whether layers are made shorter by the rows that go before they take their memory; where `generate`
            made the cache, for one prompt and what follows it.
    """

    shrinks = False

    def shrink(self, gone: int) -> None:
        """Leaves so many rows out of layers that hold nothing yet."""
        for layer in self.layers:
            if self.shrinks and not layer.is_initialized and not layer.is_sliding:
                layer.max_cache_len -= gone


_REDUCED = {DynamicCache: ReducedCache, StaticCache: ReducedStaticCache}


def reduced(cache: Any, drops: bool = False) -> Cache | None:
    """A cache as one that can hold fewer rows, in place.

    Args:
        cache: of the user or of `generate`.
        drops: whether rows leave between layers too.

    Raises:
        TypeError: a cache of another class than `DynamicCache` and `StaticCache`, or a static one and droppers.
    """
    if isinstance(cache, StaticCache) and drops:
        raise TypeError(
            "the cache is a StaticCache, all of whose layers hold the same rows, but droppers take rows out between "
            "layers; use a DynamicCache (the default of generate), or a selector alone"
        )
    if cache is None or isinstance(cache, ReducedLengths):
        return cache
    if type(cache) not in _REDUCED:
        raise TypeError(
            f"the cache is {type(cache).__name__}, whose rows cannot be dropped; use a DynamicCache (the default of "
            "generate) or a StaticCache, or tokenzoo.unpatch_model(model) first"
        )
    if getattr(cache, "offloading", False):
        raise TypeError("the cache is offloaded, whose rows cannot be dropped; use a cache without offloading")
    cache.__class__ = _REDUCED[type(cache)]
    return cache
