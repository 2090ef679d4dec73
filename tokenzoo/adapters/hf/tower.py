"""A vision tower of transformers: the loop over its layers, and its own output types.

Differences from upstream: the reducing class runs the layers itself (upstream's encoder module is passed by, and so are
its capturing hooks: hidden states are taken in the loop), since pooling has to know sizes and padding. What comes out
is upstream's: `last_hidden_state` are the tokens that are left, padding zero, or all of them in their original places
with dense=True in the recipe; `hidden_states` likewise; `pooler_output` is pooled as the tower does, with sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ...core.lift import lift
from ...core.tokens import Tokens
from ..classes import unwrapped
from ..features import Reads, encode
from ..halving import half_tokens
from ..model import ReducingModel
from ..refusals import refuse_vmap
from .naming import PlainName
from .outputs import asked, refuse_options, selected, whole_mask


def pair(size: Any) -> tuple[int, int]:
    """(high, wide) of a setting that may be one number."""
    return (size, size) if isinstance(size, int) else tuple(size)


class HfTower(PlainName, ReducingModel):
    """Mixin of towers; subclasses say where layers, final norm and patch convolution are, and how they pool."""

    layers_path: str = "encoder.layers"
    norm_name: str | None = None  # the norm behind the layers, None where only what is pooled goes through one
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
    def patch_embed(self) -> nn.Module:
        """The convolution that makes patches."""
        return attrgetter(self.conv_path)(self)

    @property
    def norm(self) -> nn.Module:
        """The norm behind the layers."""
        return nn.Identity() if self.norm_name is None else self._modules[self.norm_name]

    @property
    def own_grid(self) -> tuple[int, int]:
        return self.grid_of(pair(self.config.image_size))

    def checkpoints(self, index: int) -> bool:
        block = unwrapped(self.blocks[index])
        return block.gradient_checkpointing and block.training

    # ---- both ends

    def embed(self, x: Tensor) -> tuple[Tensor, Any]:
        return self._embedded(x), None

    def _embedded(self, x: Tensor) -> Tensor:
        """The tower's own embedding; positions follow the size of the image."""
        return self.embeddings(x.to(self.patch_embed.weight.dtype), **self._positions(x))

    def _positions(self, x: Tensor) -> dict[str, bool]:
        """What the embedding has to be told about positions."""
        resized = tuple(x.shape[-2:]) != pair(self.config.image_size) and not self.interpolates_alone
        return {"interpolate_pos_encoding": True} if resized else {}

    def embed_half(self, images: Tensor) -> Tensor:
        images, conv = images.to(self.patch_embed.weight.dtype), self.patch_embed
        # positions are what the tower adds to the patches of an empty image
        empty = torch.zeros_like(images[:1])
        places = self._embedded(empty)[:, self.num_prefix_tokens :] - conv(empty).flatten(2).transpose(1, 2)
        return half_tokens(self, images, conv, places, self.grid_of(images.shape[-2:]))

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
        self,
        images: Tensor,
        mask: Tensor | None,
        options: dict[str, Any],
        begin: Callable[[bool, bool], Tokens] | None = None,
    ) -> tuple[Tokens, Tensor, tuple[Tensor, ...] | None]:
        """What `forward` of a tower runs.

        Args:
            images: [B, C, H, W].
            mask: [B, N] of tokens that may be looked at, or a mask of four dimensions.
            options: the keyword arguments that upstream hands on from model to model; `tokenzoo_reads` is what a model
                around the tower does with `last_hidden_state`, `tokenzoo_dense` asks for all tokens in their places.
            begin: makes the tokens that enter layer 0, where that takes more than the images; it is told whether to
                keep the maps, and the values that dropped tokens had.

        Returns:
            Tokens behind the final norm, `last_hidden_state`, and the hidden states if they are asked for.
        """
        refuse_options(self, options)
        recipe, reads = self.tokenzoo_recipe, options.get("tokenzoo_reads")
        dense = recipe.dense or options.get("tokenzoo_dense", False)
        trace = dense or (reads is not None and reads.weighs(recipe))
        wanted, mask, states = asked(self, options, "output_hidden_states"), whole_mask(mask), []
        if begin is None:
            walk = self.walk(images, mask, trace=trace, dense=dense)
        else:
            refuse_vmap(recipe)
            walk = self.follow(begin(trace, dense), None, mask)
        for tokens in walk:
            if wanted is not False:
                states.append(self._shown(tokens, dense))
        tokens = self._finish(tokens)
        if dense:
            last = self.lift_features(tokens)
        else:
            last = tokens.x if reads is None else encode(tokens, reads, recipe)
        return tokens, last, selected(states, wanted)

    def _shown(self, tokens: Tokens, dense: bool) -> Tensor:
        """Tokens between two layers as a tensor [B, N, C], all of them in their places if that is asked for."""
        if dense:
            return self.in_place(tokens)
        return tokens.x if tokens.valid is None else tokens.x * tokens.valid.unsqueeze(-1).to(tokens.x.dtype)

    def in_place(self, tokens: Tokens) -> Tensor:
        """All tokens [B, N, C] in their places, in front of the final norm; `tokens` have to keep their trace."""
        recipe = self.tokenzoo_recipe
        return lift(tokens.x, recipe.lift_trace(tokens.trace), recipe.fill, partial(self.tap, index=-1, norm=False))

    def check_size(self, images: Tensor | None, interpolate: Any) -> None:
        """Refuses what upstream refuses.

        Args:
            images: [B, C, H, W].
            interpolate: whether positions may follow the size of the images.

        Raises:
            ValueError: no images, or of another size than the tower's own, without `interpolate_pos_encoding`.
        """
        if images is None:
            raise ValueError(f"{type(self).__name__}: give pixel_values")
        if not interpolate and tuple(images.shape[-2:]) != pair(self.config.image_size):
            raise ValueError(
                f"Input image size ({images.shape[-2]}*{images.shape[-1]}) doesn't match model "
                f"({'*'.join(map(str, pair(self.config.image_size)))}); pass interpolate_pos_encoding=True"
            )

    def output_of(
        self,
        images: Tensor,
        mask: Tensor | None,
        options: dict[str, Any],
        interpolate: Any = True,
        begin: Callable[[bool, bool], Tokens] | None = None,
    ) -> Any:
        """`forward` of towers that give `BaseModelOutputWithPooling`.

        Args:
            images: see `answer`.
            mask: see `answer`.
            options: see `answer`.
            interpolate: see `check_size`.
            begin: see `answer`.
        """
        self.check_size(images, interpolate)
        tokens, last, states = self.answer(images, mask, options, begin)
        pooled = self.pooled(self.read(tokens))
        output = BaseModelOutputWithPooling(last_hidden_state=last, pooler_output=pooled, hidden_states=states)
        return output if asked(self, options, "return_dict") is not False else output.to_tuple()
