"""Attention layers of transformers: one linear layer each for queries, keys, values and output.

They attend through transformers' attention interface, so that the implementation stays the user's choice (sdpa, eager,
flash attention, kernels of their own). Log sizes and padding masks are additive: sdpa and eager take them, of all
others it is not known, so a layer that has to add something attends by sdpa instead, and the report says so.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...ops.attention import Heads
from ...ops.rows import split_dim
from ..attending import AttentionLayer
from .naming import PlainName

_TAKES_BIAS = ("sdpa", "eager")


def implementation(attn: Any, biased: bool) -> str:
    """Name of the attention implementation that a layer runs.

    Args:
        attn: an attention layer of transformers.
        biased: something is added to the logits.
    """
    chosen = attn.config._attn_implementation or "eager"
    return "sdpa" if biased and chosen not in _TAKES_BIAS else chosen


class HfAttention(PlainName, AttentionLayer):
    """An attention layer whose four linear layers are called `q_proj`, `k_proj`, `v_proj` and `out`.

    Subclasses say what differs: the names of the output projection, of the scale and of the dropout rate.
    """

    out: str = "o_proj"
    scale_name: str = "scaling"
    dropout_name: str = "attention_dropout"
    written: Any = None  # the function with the map written out, which every file of transformers has its own of

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.written = staticmethod(sys.modules[cls.__bases__[-1].__module__].eager_attention_forward)

    def _split(self, x: Tensor) -> Tensor:
        """[B, N, H * D] -> [B, H, N, D]."""
        return split_dim(x, 2, -1, self.head_dim).transpose(1, 2)

    def project(self, z: Tensor, rows: Tensor | None, with_values: bool = True) -> Heads:
        q, k = self._split(self.q_proj(z)), self._split(self.k_proj(z))
        return self._heads(q, k, self.project_values(z) if with_values else None)

    def _heads(self, q: Tensor, k: Tensor, v: Tensor | None) -> Heads:
        """Heads [B, H, N, D] as this layer attends with them."""
        fused = self.config._attn_implementation != "eager"
        return Heads(q, k, v, getattr(self, self.scale_name), fused=fused, dropout=self._rate, kernel=self._kernel)

    def project_values(self, z: Tensor) -> Tensor:
        return self._split(self.v_proj(z))

    def output(self, out: Tensor, z: Tensor | None) -> Tensor:
        return getattr(self, self.out)(out)

    @property
    def _rate(self) -> float:
        return getattr(self, self.dropout_name) if self.training else 0.0

    def _kernel(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        """Attention by the implementation that the user chose: [B, H, Nq, D]."""
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation(self, bias is not None), self.written)
        options = {"dropout": self._rate, "scaling": getattr(self, self.scale_name)}
        return attend(self, q, k, v, bias, **options)[0].transpose(1, 2)

    def forward(self, x: Tensor, *args: Any, attend: Any = None, **kwargs: Any) -> Any:
        """As before patching, where hooks see (output, None) of a layer that hands out no map."""
        out = super().forward(x, *args, attend=attend, **kwargs)
        return out if attend is None else (out, None)
