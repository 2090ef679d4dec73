"""transformers' DINOv3 ViT: class token, registers, patches with rotary positions.

Read from transformers 5.18 to 5.24. A token is rotated by the row of its original position, a merged one by that of the
token it merged into, one without a place not at all; `merged_positions="mean"` rotates by mean coordinates instead.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.models.dinov3_vit.modeling_dinov3_vit import (
    DINOv3ViTAttention,
    DINOv3ViTBackbone,
    DINOv3ViTBackboneOutput,
    DINOv3ViTLayer,
    DINOv3ViTModel,
)

from ...core.lift import lift
from ...core.tokens import Layout, Tokens
from ...ops.attention import Heads
from ...ops.rows import split_dim
from ..eva.rope import Rope, Waves, rotate
from .attention import HfAttention
from .dinov2 import PARTS, DinoModel, DinoTower
from .layer import HfLayer
from .outputs import asked, refuse_options, selected, whole_mask


class ReducingDINOv3ViTAttention(HfAttention, DINOv3ViTAttention):
    """`DINOv3ViTAttention` inside a layer that reduces tokens."""

    dropout_name = "dropout"

    def project(self, z: Tensor, rows: Tensor | None, with_values: bool = True) -> Heads:
        heads = super().project(z, rows, with_values)
        if rows is None:
            return heads
        q, k = (rotate(x, rows, half=True).to(x.dtype) for x in (heads.q, heads.k))
        return heads._replace(q=q, k=k)


class ReducingDINOv3ViTLayer(HfLayer, DINOv3ViTLayer):
    """`DINOv3ViTLayer` on tokens."""

    parts = PARTS

    def rotations(self, tokens: Tokens, rope: Rope | None) -> Tensor | None:
        return None if rope is None else rope.rows(tokens)

    def forward(
        self, x: Any, attention_mask: Tensor | None = None, position_embeddings: Any = None, **kwargs: Any
    ) -> Any:
        """Tokens to tokens; the cosines and sines are those of transformers, for layers that are called by hand."""
        if position_embeddings is not None:
            layout = self.tokenzoo.layout
            kwargs["rope"] = _table(position_embeddings, layout.num_prefix)
            if not isinstance(x, Tokens):
                layout.check_length(x.shape[1], self.tokenzoo.name)
                x = Tokens(x, layout._replace(standalone=True, track_positions=True))
        return super().forward(x, attention_mask, **kwargs)


class _Rotating(DinoTower):
    """Rotary tables of the grid of the images."""

    layers_path, norm_name, conv_path = "model.layer", "norm", "embeddings.patch_embeddings"

    def embed(self, x: Tensor) -> tuple[Tensor, Rope]:
        x = x.to(self.patch_embed.weight.dtype)
        waves = self._waves(self.grid_of(x.shape[-2:])) if self.tokenzoo_recipe.merged_positions == "mean" else None
        return self.embeddings(x), _table(self.rope_embeddings(x), self.num_protected, waves)

    def layout(self, grid: tuple[int, int], rope: Any = None) -> Layout:
        layout = super().layout(grid, rope)
        # mean coordinates are weighted by size
        return layout._replace(track_size=True) if rope is not None and rope.waves is not None else layout

    def _waves(self, grid: tuple[int, int]) -> Waves:
        """How to rebuild rows of the table from coordinates.

        Raises:
            ValueError: coordinates are drawn at random in training.
        """
        names = [name for name in ("pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale") if self._draws(name)]
        if self.training and names:
            raise ValueError(
                f"merged_positions='mean' rebuilds rotary tables, but {type(self).__name__} draws coordinates at "
                f"random in training ({', '.join(names)}); use merged_positions='destination' or set these to None"
            )
        bands = 2 * math.pi * self.rope_embeddings.inv_freq
        still = torch.zeros_like(bands)
        freqs = torch.stack([torch.cat([bands, still]), torch.cat([still, bands])])
        return Waves(freqs, tuple(2 / n for n in grid), tuple(1 / n - 1 for n in grid), True)

    def _draws(self, name: str) -> bool:
        return getattr(self.config, name, None) is not None


def _table(angles: tuple[Tensor, Tensor], num_prefix: int, waves: Waves | None = None) -> Rope:
    """The rotary table of cosines and sines [N, D]."""
    cos, sin = angles
    return Rope.of(torch.cat([sin, cos], dim=-1), num_prefix, waves)


class ReducingDINOv3ViTModel(_Rotating, DinoModel, DINOv3ViTModel):
    """`DINOv3ViTModel` whose layers reduce tokens."""


class ReducingDINOv3ViTBackbone(_Rotating, DINOv3ViTBackbone):
    """`DINOv3ViTBackbone`, its feature maps on the full grid; the last one, and the class tokens, are normed."""

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> Any:
        """As upstream; hidden states and `last_hidden_state` are the tokens that are left."""
        refuse_options(self, kwargs)
        recipe, wanted = self.tokenzoo_recipe, asked(self, kwargs, "output_hidden_states")
        maps, classes, states = [], [], []
        last = len(self.stage_names) - 1
        for index, tokens in enumerate(self.walk(pixel_values, whole_mask(None), trace=True, dense=True)):
            states.append(self._shown(tokens, recipe.dense))
            if self.stage_names[index] not in self.out_features:
                continue
            tap = partial(self.tap, index=index, norm=index == last or self.config.apply_layernorm)
            y = lift(tap(tokens.x), recipe.lift_trace(tokens.trace), recipe.fill, tap)
            classes.append(y[:, 0])
            y = y[:, self.num_protected :]
            if self.config.reshape_hidden_states:
                y = split_dim(y.transpose(1, 2), 2, *tokens.layout.grid).contiguous()
            maps.append(y)
        tokens = self._finish(tokens)
        output = DINOv3ViTBackboneOutput(
            feature_maps=tuple(maps),
            cls_tokens=tuple(classes) if getattr(self.config, "return_class_token", False) else None,
            hidden_states=selected(states, wanted),
        )
        output.last_hidden_state = self.lift_features(tokens) if recipe.dense else tokens.x
        return output if asked(self, kwargs, "return_dict") is not False else output.to_tuple()


MODELS = {DINOv3ViTModel: ReducingDINOv3ViTModel, DINOv3ViTBackbone: ReducingDINOv3ViTBackbone}
BLOCKS = {DINOv3ViTLayer: ReducingDINOv3ViTLayer}
ATTENTIONS = {DINOv3ViTAttention: ReducingDINOv3ViTAttention}
