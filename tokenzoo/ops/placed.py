"""Attention that is part content and part place: two softmax maps, mixed by a gate per head (d'Ascoli et al., 2021)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .rows import take_rows


class GatedPlaces(NamedTuple):
    """The map by place of one attention layer, and how much it counts.

    Attributes:
        logits: by the places of query and key [B or 1, H, Nq, N], in front of the softmax.
        gate: share of this map [1, H, 1, 1].
    """

    logits: Tensor
    gate: Tensor

    def map(self, probs: Tensor, bias: Tensor | None = None) -> Tensor:
        """What multiplies the values [B, H, Nq, N].

        Args:
            probs: the map by content, behind its softmax.
            bias: that was added to its logits, and is to these: sizes, padding; None for none.
        """
        logits = self.logits.to(probs.dtype)
        places = (logits if bias is None else logits + bias.to(logits.dtype)).softmax(dim=-1)
        gate = self.gate.to(probs.dtype)
        mixed = (1.0 - gate) * probs + gate * places
        return mixed / mixed.sum(dim=-1).unsqueeze(-1)

    def images(self, at: slice) -> GatedPlaces:
        """The same of some images of the batch."""
        return self if self.logits.shape[0] == 1 else self._replace(logits=self.logits[at])

    def heads(self, part: slice) -> GatedPlaces:
        """The same of some heads."""
        return GatedPlaces(self.logits[:, part], self.gate[:, part])

    def queries(self, part: slice) -> GatedPlaces:
        """The same of some queries."""
        return self._replace(logits=self.logits[:, :, part])

    def rows(self, idx: Tensor) -> GatedPlaces:
        """The same of the queries idx [B, M], which differ from image to image."""
        logits = self.logits.expand(idx.shape[0], -1, -1, -1)
        return self._replace(logits=take_rows(logits.transpose(1, 2), idx).transpose(1, 2))

    def lifted(self, assign: Tensor) -> GatedPlaces:
        """The same of tokens that read these, as queries and keys.

        Args:
            assign: which of these each token reads [B, N].
        """
        rows = self.rows(assign).logits
        return self._replace(logits=torch.take_along_dim(rows, assign[:, None, None, :], dim=3))
