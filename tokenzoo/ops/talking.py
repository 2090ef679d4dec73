"""Attention whose heads talk: maps of all heads are mixed in front of the softmax and behind it (Shazeer et al., 2020).

The second mixing adds a constant to every entry of a map. Where a bias says how many a key counts as (the logarithm of
a size, minus infinity for padding), the constant counts that often too: a token that stands for three equal ones gives
what the three gave, and padding gives nothing.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from .projections import cast_for, product_and_bias


class Talk(NamedTuple):
    """The two mixings of one attention layer; linear layers over heads.

    Attributes:
        before: mixes the logits.
        behind: mixes what the softmax gives.
    """

    before: nn.Module
    behind: nn.Module

    def logits(self, logits: Tensor) -> Tensor:
        """Logits [B, H, Nq, N] mixed over heads."""
        return _over_heads(self.before, logits)

    def map(self, probs: Tensor, bias: Tensor | None = None) -> Tensor:
        """What multiplies the values [B, H, Nq, N].

        Args:
            probs: behind the softmax.
            bias: that was added to the mixed logits [B, 1 or H, 1 or Nq, N], None for none.
        """
        if bias is None:
            return _over_heads(self.behind, probs)
        heads_last = cast_for(self.behind, probs.permute(0, 2, 3, 1))
        product, constant = product_and_bias(self.behind, heads_last)
        counts = bias.exp().to(product.dtype)
        return product.permute(0, 3, 1, 2) + constant.to(product.dtype).view(1, -1, 1, 1) * counts


def _over_heads(layer: nn.Module, maps: Tensor) -> Tensor:
    return layer(cast_for(layer, maps.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
