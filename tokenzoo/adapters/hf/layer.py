"""A layer of a transformers tower: norm, attention, norm, MLP, under the names that its class gives them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from ...core.method import BlockShape
from ..block import ReducingBlock
from ..hooked import Aside
from .attention import implementation
from .naming import PlainName


class Parts(NamedTuple):
    """Names of the parts of a layer, and of what its branches go through before they are added.

    Attributes:
        norm1: in front of attention.
        attn: the attention layer.
        norm2: in front of the MLP.
        tail1: modules behind attention, in order (layer scale, dropout, drop path).
        tail2: the same behind the MLP.
    """

    norm1: str
    attn: str
    norm2: str
    tail1: tuple[str, ...] = ()
    tail2: tuple[str, ...] = ()


class HfLayer(PlainName, ReducingBlock):
    """A pre-norm layer with one attention layer and one `mlp`."""

    parts: Parts

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # transformers gives every subclass a `forward` of its own that recomputes activations by itself, with the
        # tensors among its arguments alone; tokens carry more, so the loop over the blocks sees to that
        cls.forward = getattr(cls.forward, "__wrapped__", cls.forward)

    @property
    def attn(self) -> Any:
        """The attention layer."""
        return getattr(self, self.parts.attn)

    def attention_input(self, x: Tensor) -> Tensor:
        return getattr(self, self.parts.norm1)(x)

    def call_layer(self, layer: Any, z: Tensor, attend: Callable[..., Tensor]) -> Tensor:
        return layer(z, attend=attend)[0]

    def attention_branch(self, outs: list[Tensor]) -> Tensor:
        return self._through(self.parts.tail1, outs[0])

    def mlp_input(self, x: Tensor) -> Tensor:
        return getattr(self, self.parts.norm2)(x)

    def mlp_branch(self, z: Tensor) -> Tensor:
        return self._through(self.parts.tail2, self.mlp(z))

    def _through(self, names: tuple[str, ...], y: Tensor) -> Tensor:
        for name in names:
            y = getattr(self, name)(y)
        return y

    def shape(self) -> BlockShape:
        config = self.attn.config
        return BlockShape(config.hidden_size, config.num_attention_heads, self.attn.head_dim)

    @property
    def fused(self) -> bool:
        return self.attn.config._attn_implementation != "eager"

    def attention_path(self, biased: bool) -> str:
        name = implementation(self.attn, biased)
        return f"{'unfused' if name == 'eager' else 'fused'} ({name})"

    def forward(
        self,
        x: Any,
        attention_mask: Tensor | None = None,
        *,
        attn_mask: Tensor | None = None,
        rope: Any = None,
        aside: Aside | None = None,
        **kwargs: Any,
    ) -> Any:
        """Tokens to tokens; the second argument is transformers', for layers that are called by hand."""
        return self.call(x, rope, attention_mask if attn_mask is None else attn_mask, False, aside)
