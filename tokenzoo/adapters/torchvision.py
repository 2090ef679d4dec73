"""torchvision's vision_transformer.py: `vit_b_16`, `vit_b_32`, `vit_l_16`, `vit_l_32`, `vit_h_14` and their relatives.

Read from torchvision 0.21 and 0.29, which differ in type hints alone. Differences from upstream: the model's subclass
runs the parts of `encoder` one by one, so that features, intermediates and pictures are there as for timm's models
(`forward_features`, `forward_head`, `forward_intermediates`); attention runs through `scaled_dot_product_attention` in
every mode, and its output projection is called. Images have to be of the model's own size, as upstream.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.vision_transformer import EncoderBlock, VisionTransformer

from ..core.method import BlockShape
from ..core.recipe import Recipe
from ..core.tokens import Layout, Tokens
from ..ops.layer_macs import conv_macs, is_conv, linear_macs, unwrapped
from .backbone import Family
from .block import ReducingBlock
from .halving import half_tokens
from .model import ReducingModel
from .multihead import REDUCING_MULTIHEAD, call_multihead, check_multihead, multihead_shape


class ReducingEncoderBlock(ReducingBlock, EncoderBlock):
    """Pre-norm block with dropout behind attention."""

    def attention_input(self, x: Tensor) -> Tensor:
        return self.ln_1(x)

    def attention_layers(self) -> tuple[Any, ...]:
        return (self.self_attention,)

    def call_layer(self, layer: nn.Module, z: Tensor, attend: Callable[..., Tensor]) -> Tensor:
        return call_multihead(layer, z, attend)

    def attention_branch(self, outs: list[Tensor]) -> Tensor:
        return self.dropout(outs[0])

    def mlp_input(self, x: Tensor) -> Tensor:
        return self.ln_2(x)

    def shape(self) -> BlockShape:
        return multihead_shape(self.self_attention)


class ReducingTorchvisionTransformer(ReducingModel, VisionTransformer):
    """`VisionTransformer` whose blocks reduce tokens."""

    num_prefix_tokens, has_class = 1, True

    @property
    def blocks(self) -> nn.Sequential:
        return self.encoder.layers

    @property
    def norm(self) -> nn.Module:
        return self.encoder.ln

    @property
    def patch_embed(self) -> nn.Module:
        return self.conv_proj

    def grid_of(self, size: tuple[int, int]) -> tuple[int, int]:
        return tuple(side // self.patch_size for side in size)

    @property
    def own_grid(self) -> tuple[int, int]:
        return self.grid_of((self.image_size, self.image_size))

    def embed(self, x: Tensor) -> tuple[Tensor, Any]:
        encoder, x = self.encoder, self._process_input(x)
        x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1)
        return encoder.dropout(x + encoder.pos_embedding), None

    def embed_half(self, images: Tensor) -> Tensor:
        return half_tokens(self, images, self.conv_proj, self.encoder.pos_embedding[:, 1:], self.own_grid)

    def forward_head(self, x: Tensor | Tokens) -> Tensor:
        """Class scores, of the class token alone."""
        return self.heads(self.pool(x))

    def embed_macs(self, grid: tuple[int, int]) -> int:
        total, sides = 0, [side * self.patch_size for side in grid]
        for conv in filter(is_conv, self.conv_proj.modules()):
            shapes = zip(sides, conv.padding, conv.kernel_size, conv.stride)
            sides = [(side + 2 * pad - kernel) // stride + 1 for side, pad, kernel, stride in shapes]
            total += conv_macs(conv) * sides[0] * sides[1]
        return total

    def head_macs(self, n: int, layout: Layout) -> int:
        return linear_macs(self.heads)


def check_block(block: nn.Module) -> nn.Module | None:
    """An attention layer that is not torch's, None for that; adapters around it are looked through."""
    layer = unwrapped(block.self_attention)
    if type(layer) not in REDUCING_MULTIHEAD:
        return layer
    check_multihead(layer, "self_attention")
    return None


def check_recipe(model: nn.Module, recipe: Recipe) -> None:
    """Refuses recipes that this model cannot follow.

    Raises:
        ValueError: a method in front of block 0 needs images of half the size embedded, which a stem of several
            convolutions cannot do.
    """
    for method in recipe.methods:
        if method.place == "embed" and not is_conv(model.conv_proj):
            raise ValueError(
                f"{method.name} embeds images at half the size, which the conv_proj of {type(model).__name__}, a stem "
                "of several convolutions, cannot do; use a model without conv_stem_configs, or another method"
            )


def bypassed(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """Modules that are never called as a whole, and what to do instead."""
    blocks = "hook the blocks one by one (model.encoder.layers[i])"
    return [
        ("encoder", model.encoder, "hook its parts (encoder.dropout, encoder.layers[i], encoder.ln)"),
        ("encoder.layers", model.encoder.layers, blocks),
    ]


FAMILY = Family(
    name="torchvision",
    summary="torchvision vision_transformer.py: vit_b_16, vit_b_32, vit_l_16, vit_l_32, vit_h_14, convolutional stems",
    models={VisionTransformer: ReducingTorchvisionTransformer},
    blocks={EncoderBlock: ReducingEncoderBlock},
    attentions=REDUCING_MULTIHEAD,
    tried="torchvision 0.29",
    check_block=check_block,
    check_recipe=check_recipe,
    bypassed=bypassed,
)
