"""Attention among channels: which channel reads which follows from all tokens together (El-Nouby et al., 2021).

There is no map between tokens, and the cost is linear in their number. A bias of the keys says how many a token counts
as in the sums over tokens, as it does in a softmax over them: its exponential, which is the size of a merged token, and
nothing for padding. A token that stands for three equal ones gives what the three gave.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor


def attend_channels(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    temperature: Tensor,
    bias: Tensor | None = None,
    fused: bool = False,
    drop: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Output of every token [B, H, Nv, D].

    Args:
        q: queries [B, H, N, D], before they are normalised over tokens.
        k: keys, likewise.
        v: values [B, H, Nv, D]; of other tokens than q and k, if need be.
        temperature: factor of the logits [H, 1, 1].
        bias: of the keys [B, 1, 1, N], None for none.
        fused: use `scaled_dot_product_attention`.
        drop: what the map among channels goes through; None for nothing.
    """
    q, k, v = (rows.transpose(-2, -1) for rows in (q, k, v))  # [B, H, D, N]
    if bias is not None:
        weight = (0.5 * bias).exp().to(q.dtype)  # its square counts in products and in norms
        q, k = q * weight, k * weight
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    if fused:
        out = F.scaled_dot_product_attention(q * temperature, k, v, scale=1.0)
    else:
        probs = ((q @ k.transpose(-2, -1)) * temperature).softmax(dim=-1)
        out = (probs if drop is None else drop(probs)) @ v
    return out.transpose(-2, -1)
