"""What a selector sees of the tower and of the prompt, computed only when it asks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ops.attention import attention_received, attention_rows
from .gather import rows_at
from .towers import Read


class TowerSignals:
    """Signals of one pass of the tower over all images of a call, at the rows that the language model would see.

    Args:
        heads: queries and keys of a layer, given its index and how many rows in front need queries (None for all).
        has_class: token 0 is a class token.
        carry: values of tokens without prefix [crops, n, C] -> of each image [n_rows, C].
        strip: takes prefix tokens off [crops, N, C].
        prompts: words of the prompt around each image as rows of the language model's embedding, one [T, D] per image;
            a function, since they may not be known.
        features: what is handed to the projector, at the rows of each image [n_rows, C]; None where unknown.
        class_tokens: what the tower gives for the class token [crops, 1, C], None without one.
        depth: layers of the tower, and the index of the one that is handed on.
    """

    def __init__(
        self,
        heads: Callable[[int, int | None], list[Read]],
        has_class: bool,
        carry: Callable[[Tensor], list[Tensor]],
        strip: Callable[[Tensor], Tensor],
        prompts: Callable[[], list[Tensor]],
        features: Callable[[], list[Tensor] | None],
        class_tokens: Callable[[], Tensor | None],
        depth: tuple[int, int],
    ) -> None:
        self.depth, self.handed_on = depth
        self._heads, self.has_class, self._carry, self._strip = heads, has_class, carry, strip
        self._prompts, self._features, self._class_tokens = prompts, features, class_tokens
        self._known: dict[Any, Any] = {}

    def rows(self, name: str, layer: int) -> list[Tensor]:
        """A signal of every image [n_rows, C] float32, by name: see `VisualSignals`."""
        if (name, layer) not in self._known:
            with torch.no_grad():
                self._known[name, layer] = self._carry(getattr(self, f"_{name}")(layer).float())
        return self._known[name, layer]

    def prompts(self) -> list[Tensor]:
        """See `VisualSignals.text`."""
        if "prompts" not in self._known:
            self._known["prompts"] = self._prompts()
        return self._known["prompts"]

    def features(self, where: list[tuple[int, Tensor]]) -> Tensor | None:
        """What the tower gives at some rows of some images [B, N, C], with its gradient; means where a row is made of
        several patches."""
        if "features" not in self._known:
            self._known["features"] = self._features()
        found = self._known["features"]
        return None if found is None else rows_at(found, where)

    def class_tokens(self, crops: list[int]) -> Tensor | None:
        """What the tower gives for the class token of some crops [B, 1, C]; None without one."""
        found = self._class_tokens()
        return None if found is None else found[crops]

    def _reads(self, layer: int, queries: int | None) -> list[Read]:
        """Queries and keys of a layer; those of all queries serve for some."""
        found = self._known.get(("reads", layer, None)) or self._known.get(("reads", layer, queries))
        if found is None:
            found = self._known["reads", layer, queries] = self._heads(layer, queries)
        return found

    def _each(self, layer: int, read: Callable[[Read], Tensor], queries: int | None = None) -> Tensor:
        """What is read of every crop [crops, N, C], without prefix; packed crops one behind the other [1, N, C].

        Args:
            layer: its index.
            read: what, of queries and keys.
            queries: how many rows in front need queries; None for all.
        """
        found = [read(each) for each in self._reads(layer, queries)]
        return self._strip(found[0] if len(found) == 1 else torch.cat(found, 1))

    def _class_row(self, layer: int) -> Tensor:
        if not self.has_class:
            raise ValueError(
                "attention of the class token was asked for, but this tower has none; use signals.importance(layer), "
                "which is the mean attention that a token gets there"
            )
        return self._each(layer, lambda r: attention_rows(r.heads, 0, 1, r.bias).mean(1).transpose(1, 2), 1)

    def _class_logits(self, layer: int) -> Tensor:
        def logits(read: Read) -> Tensor:
            q, k, scale = read.heads.q[:, :, :1].float(), read.heads.k.float(), read.heads.scale
            return ((q * scale) @ k.transpose(-2, -1)).mean(1).transpose(1, 2)

        return self._each(layer, logits, 1)

    def _received(self, layer: int) -> Tensor:
        return self._each(layer, lambda r: attention_received(r.heads, r.bias, r.real).unsqueeze(-1))

    def _importance(self, layer: int) -> Tensor:
        return self._class_row(layer) if self.has_class else self._received(layer)

    def _joined_row(self, layer: int) -> Tensor:
        def row(read: Read) -> Tensor:
            heads = read.heads
            q, k = (t.float().transpose(1, 2).flatten(2).unsqueeze(1) for t in (heads.q, heads.k))
            one = heads._replace(q=q, k=k, v=None, scale=heads.scale / heads.q.shape[1] ** 0.5)
            if self.has_class:
                return attention_rows(one, 0, 1, read.bias).mean(1).transpose(1, 2)
            return attention_received(one, read.bias, read.real).unsqueeze(-1)

        return self._each(layer, row, 1 if self.has_class else None)

    def _mean_keys(self, layer: int) -> Tensor:
        return self._each(layer, lambda r: r.heads.k.float().mean(1), 1)

    def _keys(self, layer: int) -> Tensor:
        return self._each(layer, lambda r: r.heads.k.float().transpose(1, 2).flatten(2), 1)

    def _queries(self, layer: int) -> Tensor:
        return self._each(layer, lambda r: r.heads.q.float().transpose(1, 2).flatten(2))


class VisualSignals:
    """Lazy view of the tower and of the prompt for some rows of some images, a batch of B of N rows each.

    Layers count as in the papers: 0 is the first, -1 the last of the tower, -2 the one in front of it. Layers that
    `map` reads are named by `Selector.layers`.

    Args:
        tower: of the whole call.
        where: image and rows of it, of each of the batch.
    """

    def __init__(self, tower: TowerSignals, where: list[tuple[int, Tensor]]) -> None:
        self._tower, self._where = tower, where

    def _of(self, name: str, layer: int) -> Tensor:
        return rows_at(self._tower.rows(name, layer), self._where)

    @property
    def has_class(self) -> bool:
        """Whether the tower has a class token."""
        return self._tower.has_class

    @property
    def depth(self) -> int:
        """Layers of the tower."""
        return self._tower.depth

    @property
    def handed_on(self) -> int:
        """Index of the layer that is handed on, from the front: -2 from the end in most papers."""
        return self._tower.handed_on

    def class_row(self, layer: int = -2) -> Tensor:
        """Attention of the class token to every row, mean over heads [B, N] float32: one softmax row, no map."""
        return self._of("class_row", layer).squeeze(-1)

    def class_logits(self, layer: int = -1) -> Tensor:
        """The same in front of the softmax [B, N]."""
        return self._of("class_logits", layer).squeeze(-1)

    def joined_row(self, layer: int = -1) -> Tensor:
        """`importance` of one wide head: queries and keys of all heads side by side [B, N] float32."""
        return self._of("joined_row", layer).squeeze(-1)

    def received(self, layer: int = -2) -> Tensor:
        """Mean attention that every row gets, over heads and queries [B, N] float32, in slices, no map stored."""
        return self._of("received", layer).squeeze(-1)

    def importance(self, layer: int = -2) -> Tensor:
        """`class_row` where there is a class token, else `received` [B, N] float32."""
        return self._of("importance", layer).squeeze(-1)

    def mean_keys(self, layer: int = -2) -> Tensor:
        """Mean of the keys over heads [B, N, d]."""
        return self._of("mean_keys", layer)

    def keys(self, layer: int = -1) -> Tensor:
        """Keys of all heads side by side [B, N, H * d]."""
        return self._of("keys", layer)

    def queries(self, layer: int = -1) -> Tensor:
        """Queries of all heads side by side [B, N, H * d]."""
        return self._of("queries", layer)

    @property
    def text(self) -> list[Tensor]:
        """Embeddings of the words around each image, of its own prompt [T, D], B of them of their own lengths."""
        prompts = self._tower.prompts()
        return [prompts[image] for image, _ in self._where]
