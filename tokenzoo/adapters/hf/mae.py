"""transformers' ViT-MAE encoder, without its random masking.

Read from transformers 5.18 to 5.24. Upstream shuffles the patches even where it masks none; the patched encoder leaves
them in the order of the grid, which methods go by: `ids_restore` counts up, and `mask` is zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.vit_mae.modeling_vit_mae import ViTMAEAttention, ViTMAELayer, ViTMAEModel, ViTMAEModelOutput

from .attention import HfAttention
from .layer import HfLayer
from .outputs import asked
from .tower import HfTower
from .vit import PARTS


class ReducingViTMAEAttention(HfAttention, ViTMAEAttention):
    """`ViTMAEAttention` inside a layer that reduces tokens."""


class ReducingViTMAELayer(HfLayer, ViTMAELayer):
    """`ViTMAELayer` on tokens."""

    parts = PARTS


class ReducingViTMAEModel(HfTower, ViTMAEModel):
    """`ViTMAEModel` whose layers reduce tokens."""

    layers_path, norm_name = "layers", "layernorm"

    def _embedded(self, x: Tensor) -> Tensor:
        high, wide = self.grid_of(x.shape[-2:])
        in_order = torch.arange(high * wide, device=x.device, dtype=torch.float32).expand(x.shape[0], -1)
        return self.embeddings(x.to(self.patch_embed.weight.dtype), noise=in_order, **self._positions(x))[0]

    def forward(
        self,
        pixel_values: Tensor | None = None,
        noise: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As upstream, with the tokens that are left, in the order of the grid; `noise` would only shuffle them."""
        self.check_size(pixel_values, interpolate_pos_encoding)
        _, last, states = self.answer(pixel_values, attention_mask, kwargs)
        high, wide = self.grid_of(pixel_values.shape[-2:])
        order = torch.arange(high * wide, device=last.device).expand(last.shape[0], -1)
        mask = torch.zeros(order.shape, device=last.device)
        output = ViTMAEModelOutput(last_hidden_state=last, mask=mask, ids_restore=order, hidden_states=states)
        return output if asked(self, kwargs, "return_dict") is not False else output.to_tuple()


def check_masking(model: nn.Module) -> None:
    """Refuses an encoder that masks patches at random.

    Raises:
        ValueError: ViT-MAE with a mask ratio other than zero.
    """
    if isinstance(model, ViTMAEModel) and model.config.mask_ratio:
        raise ValueError(
            f"{type(model).__name__} drops {model.config.mask_ratio:.0%} of the patches at random in front of layer 0; "
            "set model.config.mask_ratio = 0 before patching"
        )


MODELS = {ViTMAEModel: ReducingViTMAEModel}
BLOCKS = {ViTMAELayer: ReducingViTMAELayer}
ATTENTIONS = {ViTMAEAttention: ReducingViTMAEAttention}
