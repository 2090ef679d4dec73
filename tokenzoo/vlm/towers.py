"""Queries and keys of layers of towers, read beside the layer's own attention, whose implementation stays as it is."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

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


class Made:
    """What modules of one layer gave in its own pass, so that selectors do not compute it once more.

    Args:
        layer: of the tower.
        found: path of a module inside of it -> that module and its output, noted by `reading.Result`.
    """

    def __init__(self, layer: nn.Module, found: dict[str, tuple[nn.Module, Tensor]]) -> None:
        self.layer, self.found = layer, found

    def __call__(self, path: str, x: Callable[[], Tensor], rows: int | None = None) -> Tensor:
        """The output of a module.

        Args:
            path: of the module inside the layer.
            x: makes its input [crops, N, C] where nothing was noted, or where an adapter has taken its place since.
            rows: how many rows in front are wanted [crops, rows, C], None for all.
        """
        module = self.layer.get_submodule(path)
        known, out = self.found.get(path, (None, None))
        if known is module:
            return out if rows is None else out[:, :rows]
        return module(x() if rows is None else x()[:, :rows])


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

    @property
    def makes(self) -> tuple[str, ...]:
        """Modules inside the layer whose outputs are wanted."""
        return (f"{self.attn}.q_proj", f"{self.attn}.k_proj")

    def __call__(
        self, layer: Any, x: Tensor, options: dict[str, Any], made: Made, queries: int | None = None
    ) -> list[Read]:
        z, attn = functools.cache(lambda: getattr(layer, self.norm)(x)), getattr(layer, self.attn)
        q, k = made(self.makes[0], z, queries), made(self.makes[1], z)
        if getattr(attn, "q_norm", None) is not None:  # over all heads together
            q, k = attn.q_norm(q), attn.k_norm(k)
        q, k = (split_dim(t, 2, -1, attn.head_dim).transpose(1, 2) for t in (q, k))
        heads, mask = Heads(q, k, None, getattr(attn, self.scale)), options.get("attention_mask")
        return [Read(heads, None if mask is None else _first_row(mask))]


def _first_row(mask: Tensor) -> Tensor:
    """Which tokens are real [B, N] bool, of a mask [B, 1, N, N] in which all rows see the same."""
    row = mask[:, 0, 0]
    return row if row.dtype == torch.bool else row == 0


class Reader(Protocol):
    """Reads queries and keys of a layer.

    Attributes:
        makes: paths of modules inside the layer whose outputs it asks `made` for.
    """

    makes: tuple[str, ...]

    def __call__(
        self, layer: Any, x: Tensor, options: dict[str, Any], made: Made, queries: int | None = None
    ) -> list[Read]:
        """What was read: one for all crops, or one per crop of a tower that packs them into one sequence.

        Args:
            layer: of the tower.
            x: its input.
            options: its keyword arguments.
            made: gives outputs of its modules.
            queries: how many rows in front need queries; None for all. More may be given.
        """


_READERS: dict[type, Reader] = {}


def register_reader(cls: type, reader: Reader) -> None:
    """Says how queries and keys of layers of an exact class are read."""
    _READERS[cls] = reader


def reader_of(layer: nn.Module) -> Reader:
    """How queries and keys of a layer are read.

    Raises:
        TypeError: a layer of a class that nobody reads.
    """
    for cls in type(layer).__mro__:
        if cls in _READERS:
            return _READERS[cls]
    raise TypeError(f"the attention of {path_of(type(layer))} cannot be read; use a selector that does not look at it")


def heads_of(seen: dict[Any, Any], index: int, queries: int | None = None) -> list[Read]:
    """Queries and keys of a layer, from what was noted in its pass.

    Args:
        seen: see `reading.Noting` and `reading.Result`.
        index: of the layer.
        queries: how many rows in front need queries; None for all.

    Raises:
        TypeError: a layer of a class that nobody reads.
    """
    layer, args, options = seen[index]
    reader = reader_of(layer)
    made = Made(layer, {path: seen[index, path] for path in reader.makes if (index, path) in seen})
    return reader(layer, args[0] if args else options["hidden_states"], options, made, queries)
