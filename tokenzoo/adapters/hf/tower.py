"""A vision tower of transformers: the loop over its layers, and its own output types.

Differences from upstream: the reducing class runs the layers itself (upstream's encoder module is passed by, and so are
its capturing hooks: hidden states are taken in the loop), since pooling has to know sizes and padding. What comes out
is upstream's: `last_hidden_state` are the tokens that are left, padding zero, or all of them in their original places
with dense=True in the recipe; `hidden_states` likewise; `pooler_output` is pooled as the tower does, with sizes.
"""

from __future__ import annotations

from functools import partial
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ...core.lift import lift
from ...core.tokens import Tokens
from ...ops.rows import split_dim
from ..classes import unwrapped
from ..features import Reads, encode
from ..heads import embed_macs
from ..model import ReducingModel
from .naming import PlainName
from .outputs import asked, refuse_options, selected, whole_mask


def pair(size: Any) -> tuple[int, int]:
    """(high, wide) of a setting that may be one number."""
    return (size, size) if isinstance(size, int) else tuple(size)


class HfTower(PlainName, ReducingModel):
    """Mixin of towers; subclasses say where layers, final norm and patch convolution are, and how they pool."""

    layers_path: str = "encoder.layers"
    norm_path: str | None = None  # the norm behind the layers, None where only what is pooled goes through one
    conv_path: str = "embeddings.patch_embeddings.projection"
    num_prefix_tokens: int = 1
    has_class: bool = True
    interpolates_alone: bool = False  # the embedding follows the image size without being asked to

    # ---- where the parts are

    @property
    def blocks(self) -> nn.ModuleList:
        """The layers."""
        return attrgetter(self.layers_path)(self)

    @property
    def norm(self) -> nn.Module:
        """The norm behind the layers."""
        return nn.Identity() if self.norm_path is None else attrgetter(self.norm_path)(self)

    @property
    def own_grid(self) -> tuple[int, int]:
        return self.grid_of(pair(self.config.image_size))

    def grid_of(self, size: tuple[int, int]) -> tuple[int, int]:
        return tuple(side // step for side, step in zip(size, pair(self.config.patch_size)))

    def checkpoints(self, index: int) -> bool:
        block = unwrapped(self.blocks[index])
        return block.gradient_checkpointing and block.training

    # ---- both ends

    def embed(self, x: Tensor) -> tuple[Tensor, Any]:
        return self._embedded(x), None

    def _embedded(self, x: Tensor) -> Tensor:
        """The tower's own embedding; positions follow the size of the image."""
        x = x.to(attrgetter(self.conv_path)(self).weight.dtype)
        resized = tuple(x.shape[-2:]) != pair(self.config.image_size) and not self.interpolates_alone
        return self.embeddings(x, **({"interpolate_pos_encoding": True} if resized else {}))

    def embed_half(self, images: Tensor) -> Tensor:
        high, wide = self.grid_of(images.shape[-2:])
        if high % 2 or wide % 2:
            raise ValueError(f"{type(self).__name__}: the {high} x {wide} patches cannot be halved; use even grids")
        conv = attrgetter(self.conv_path)(self)
        images = images.to(conv.weight.dtype)
        half = conv(F.interpolate(images, scale_factor=0.5, mode="bilinear", align_corners=False))
        # positions are what the tower adds to the patches of an empty image
        empty = torch.zeros_like(images[:1])
        places = self._embedded(empty)[:, self.num_prefix_tokens :] - conv(empty).flatten(2).transpose(1, 2)
        places = F.avg_pool2d(split_dim(places.transpose(1, 2).float(), 2, high, wide), 2).to(half.dtype)
        return (half + places).flatten(2).transpose(1, 2)

    def embed_macs(self, grid: tuple[int, int]) -> int:
        return embed_macs(attrgetter(self.conv_path)(self), grid)

    def head_macs(self, n: int, layout: Any) -> int:
        return 0

    def head_reads(self) -> Reads:
        return Reads()

    def pooled(self, tokens: Tokens) -> Tensor | None:
        """`pooler_output` of tokens behind the final norm."""
        return tokens.x[:, 0]

    def forward_head(self, x: Tensor | Tokens, pre_logits: bool = False) -> Tensor:
        """What the tower pools [B, C]; the class token, or the mean of the patches, where it does not.

        Args:
            x: tokens from `forward_tokens`, or what `forward_features` returned.
            pre_logits: there is no classifier in a tower, so it makes no difference.
        """
        tokens = self.read(x)
        pooled = self.pooled(tokens)
        if pooled is not None:
            return pooled
        return tokens.x[:, 0] if self.has_class else self.pool_tokens(tokens, "avg")

    # ---- transformers' own call

    def answer(
        self, images: Tensor, mask: Tensor | None, options: dict[str, Any], reads: Reads | None = None
    ) -> tuple[Tokens, Tensor, tuple[Tensor, ...] | None]:
        """What `forward` of a tower runs.

        Args:
            images: [B, C, H, W].
            mask: [B, N] of tokens that may be looked at, or a mask of four dimensions.
            options: the keyword arguments that upstream hands on from model to model.
            reads: what a head outside of the tower does with `last_hidden_state`.

        Returns:
            Tokens behind the final norm, `last_hidden_state`, and the hidden states if they are asked for.
        """
        refuse_options(self, options)
        recipe = self.tokenzoo_recipe
        weighs = reads is not None and reads.weighs(recipe)
        wanted = asked(self, options, "output_hidden_states")
        states = []
        walk = self.walk(images, whole_mask(mask), trace=weighs or recipe.dense, dense=recipe.dense)
        for tokens in walk:
            if wanted is not False:
                states.append(self._shown(tokens))
        tokens = self._finish(tokens)
        if recipe.dense:
            last = self.lift_features(tokens)
        else:
            last = tokens.x if reads is None else encode(tokens, reads, recipe)
        return tokens, last, selected(states, wanted)

    def _shown(self, tokens: Tokens) -> Tensor:
        """Tokens between two layers as a tensor [B, N, C]."""
        recipe = self.tokenzoo_recipe
        if recipe.dense:
            return lift(tokens.x, recipe.lift_trace(tokens.trace), recipe.fill, partial(self.tap, index=-1, norm=False))
        return tokens.x if tokens.valid is None else tokens.x * tokens.valid.unsqueeze(-1).to(tokens.x.dtype)

    def output_of(self, images: Tensor, mask: Tensor | None, options: dict[str, Any], interpolate: Any = True) -> Any:
        """`forward` of towers that give `BaseModelOutputWithPooling`.

        Args:
            images: see `answer`.
            mask: see `answer`.
            options: see `answer`; `tokenzoo_reads` is what a head outside does with `last_hidden_state`.
            interpolate: whether positions may follow the size of the image.

        Raises:
            ValueError: an image of another size than the tower's own, without `interpolate_pos_encoding`.
        """
        if images is None:
            raise ValueError(f"{type(self).__name__}: give pixel_values")
        if not interpolate and tuple(images.shape[-2:]) != pair(self.config.image_size):
            raise ValueError(
                f"Input image size ({images.shape[-2]}*{images.shape[-1]}) doesn't match model "
                f"({'*'.join(map(str, pair(self.config.image_size)))}); pass interpolate_pos_encoding=True"
            )
        reads = options.get("tokenzoo_reads")
        tokens, last, states = self.answer(images, mask, options, reads)
        pooled = self.pooled(self.read(tokens))
        output = BaseModelOutputWithPooling(last_hidden_state=last, pooler_output=pooled, hidden_states=states)
        return output if asked(self, options, "return_dict") is not False else output.to_tuple()
