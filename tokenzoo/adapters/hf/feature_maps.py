"""Towers of the class name "...Backbone": feature maps of some layers, always on the full grid."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import BackboneOutput

from ...core.lift import lift
from ...core.tokens import Tokens
from ...ops.rows import split_dim
from .outputs import asked, refuse_options, selected, whole_mask


class GivesFeatureMaps:
    """Mixin in front of a tower's: `forward` gives upstream's `BackboneOutput`.

    Every patch of a feature map reads the token it went into; dropped ones come back as the recipe's `fill` says.
    """

    def forward(self, pixel_values: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """As upstream; hidden states are the tokens that are left."""
        refuse_options(self, kwargs)
        wanted = asked(self, kwargs, "output_hidden_states")
        maps, states = [], []
        walk = self.walk(pixel_values, whole_mask(attention_mask), trace=True, dense=True)
        for stage, tokens in zip(self.stage_names, walk):
            if stage in self.out_features:
                maps.append(self._map(tokens))
            states.append(self._shown(tokens, self.tokenzoo_recipe.dense))
        output = BackboneOutput(feature_maps=tuple(maps), hidden_states=selected(states, wanted))
        return output if asked(self, kwargs, "return_dict") is not False else output.to_tuple()

    def _map(self, tokens: Tokens) -> Tensor:
        """One feature map [B, C, H, W]; [B, N, C] where the configuration leaves hidden states in their shape."""
        recipe, norm = self.tokenzoo_recipe, self.config.apply_layernorm
        tap = partial(self.tap, index=-1, norm=norm)
        y = lift(tap(tokens.x), recipe.lift_trace(tokens.trace), recipe.fill, tap)
        if not self.config.reshape_hidden_states:
            return y
        y = y[:, self.num_protected :]
        return split_dim(y.transpose(1, 2), 2, *tokens.layout.grid).contiguous()
