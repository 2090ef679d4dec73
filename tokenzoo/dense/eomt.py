"""EoMT: a plain ViT in which queries join the tokens for the last blocks and become masks."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..adapters.inspect import is_patched
from ..core.lift import lift
from ..core.tokens import Tokens
from ..cost.report import report
from ..ops.layer_macs import conv_macs, linear_macs
from ..ops.rows import split_dim
from .segmenter import pad_to_patches


class ScaleBlock(nn.Module):
    """Doubles a map: transposed convolution, GELU, depthwise convolution, norm."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.ConvTranspose2d(dim, dim, kernel_size=2, stride=2)
        self.conv2 = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim, bias=False)
        self.norm = LayerNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, 2H, 2W]."""
        return self.norm(self.conv2(F.gelu(self.conv1(x))))


class _Encoder(nn.Module):
    """The backbone and the normalisation of pixels, under the released names."""

    def __init__(self, backbone: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.backbone = backbone
        self.register_buffer("pixel_mean", torch.tensor(mean).reshape(1, -1, 1, 1))
        self.register_buffer("pixel_std", torch.tensor(std).reshape(1, -1, 1, 1))


class EoMT(nn.Module):
    """Encoder-only mask transformer, in its inference form (no masked attention); keys as released.

    `patch_model` on it patches the backbone: tokens may be reduced before and after the queries enter, queries are
    never touched, and patches are restored before the upscaling.

    Args:
        backbone: a timm `VisionTransformer` without rotary positions.
        num_classes: K, without the class "nothing".
        num_q: queries.
        num_blocks: blocks that the queries take part in.
        mean: of RGB channels in 0..1, subtracted before the model.
        std: of the channels, divided by.

    Raises:
        ValueError: a backbone that cannot take queries, or num_blocks outside of its depth.

    Source: Kerssies et al., "Your ViT is Secretly an Image Segmentation Model", CVPR 2025.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        num_q: int = 100,
        num_blocks: int = 4,
        mean: tuple[float, float, float] = (0.485, 0.456, 0.406),
        std: tuple[float, float, float] = (0.229, 0.224, 0.225),
    ) -> None:
        super().__init__()
        # subclasses may spell their embedding in another way; a patched one was checked when it was patched
        plain = type(backbone) in (VisionTransformer, VisionTransformerDistilled)
        if not plain and not (isinstance(backbone, VisionTransformer) and is_patched(backbone)):
            raise ValueError(
                f"EoMT: {type(backbone).__name__} is not a timm VisionTransformer; queries have no place in models "
                "with rotary positions or windows"
            )
        if not 1 <= num_blocks <= len(backbone.blocks):
            raise ValueError(f"EoMT: num_blocks={num_blocks}, but the backbone has {len(backbone.blocks)} blocks")
        dim, self.num_q, self.num_blocks, self.num_classes = backbone.embed_dim, num_q, num_blocks, num_classes
        self.classes: list[str] | None = None
        self.window: int | None = None
        self.stride: int | None = None
        self.encoder = _Encoder(backbone, mean, std)
        self.q = nn.Embedding(num_q, dim)
        self.class_head = nn.Linear(dim, num_classes + 1)
        self.mask_head = nn.Sequential(
            nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim)
        )
        doublings = max(1, int(math.log2(max(backbone.patch_embed.patch_size))) - 2)
        self.upscale = nn.Sequential(*(ScaleBlock(dim) for _ in range(doublings)))
        self.register_buffer("attn_mask_probs", torch.zeros(num_blocks))  # of training; kept for the checkpoints

    @property
    def tokenzoo_backbone(self) -> nn.Module:
        """The model that `patch_model` patches."""
        return self.encoder.backbone

    @property
    def mean(self) -> tuple[float, ...]:
        """Of RGB channels in 0..1, as stored with the weights; images are normalised before the model."""
        return tuple(self.encoder.pixel_mean.flatten().tolist())

    @property
    def std(self) -> tuple[float, ...]:
        """The same for the deviation."""
        return tuple(self.encoder.pixel_std.flatten().tolist())

    def forward(self, images: Tensor) -> Tensor:
        """Scores of every class and pixel [B, K, H, W] of normalised images [B, 3, H, W] of any size."""
        padded, _ = pad_to_patches(images, self.encoder.backbone.patch_embed.patch_size)
        masks, classes = self.predict(padded)
        masks = F.interpolate(masks, padded.shape[-2:], mode="bilinear", align_corners=False)
        masks = masks[:, :, : images.shape[-2], : images.shape[-1]]
        return torch.einsum("bqhw,bqc->bchw", masks.sigmoid(), classes.softmax(-1)[..., :-1])

    def predict(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mask logits [B, Q, h, w] and class logits [B, Q, K + 1] of normalised images in whole patches."""
        queries, patches = self._encode(images)
        maps = torch.einsum("bqc,bchw->bqhw", self.mask_head(queries), self.upscale(patches))
        return maps, self.class_head(queries)

    def _encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [B, Q, C] and patches [B, C, H / P, W / P] after the final norm."""
        backbone, prefix = self.encoder.backbone, self.encoder.backbone.num_prefix_tokens
        grid = tuple(backbone.patch_embed.dynamic_feat_size(images.shape[-2:]))
        entry = len(backbone.blocks) - self.num_blocks
        queries = self.q(torch.arange(self.num_q, device=images.device)).expand(images.shape[0], -1, -1)
        if not is_patched(backbone):
            x = backbone.norm_pre(backbone._pos_embed(backbone.patch_embed(images)))
            for block in backbone.blocks[:entry]:
                x = block(x)
            x = torch.cat([x[:, :prefix], queries, x[:, prefix:]], dim=1)
            for block in backbone.blocks[entry:]:
                x = block(x)
            x = backbone.norm(x)
            queries, x = x[:, prefix : prefix + self.num_q], x[:, prefix + self.num_q :]
        else:
            queries, x = self._encode_patched(backbone, images, queries, entry)
        return queries, split_dim(x.transpose(1, 2), 2, *grid)

    def _encode_patched(self, backbone: Any, images: Tensor, queries: Tensor, entry: int) -> tuple[Tensor, Tensor]:
        recipe, depth = backbone.tokenzoo_recipe, len(backbone.blocks)
        for method in recipe.methods:
            if method.closes_span and (method.place == "norm" or max(method.resolve_layers(depth)) >= entry):
                raise ValueError(
                    f"EoMT: {method.name} at {method.layers} comes after the queries have entered (block {entry}); "
                    "rebuild patches before that, or leave it out: they are restored after the final norm anyway"
                )
        prefix, count = backbone.num_protected, self.num_q
        for tokens in backbone.walk(images, last=entry - 1, dense=True):  # noqa: B007 (only the last one is wanted)
            pass
        before, tokens = tokens.trace, _with_queries(tokens, queries)
        for block in backbone.blocks[entry:]:
            tokens = block(tokens)
        x = lift(backbone.norm(tokens.x), recipe.lift_trace(tokens.trace), recipe.fill, backbone.norm)
        queries, x = x[:, prefix : prefix + count], torch.cat([x[:, :prefix], x[:, prefix + count :]], dim=1)
        return queries, lift(x, recipe.lift_trace(before), recipe.fill, backbone.norm)[:, prefix:]

    def head_macs(self, num_tokens: int, grid: tuple[int, int] | None = None) -> int:
        """Multiply-adds for one image of heads, upscaling, and the queries in the last blocks.

        The product of masks and classes for every pixel of the image, in `forward`, is left out like all resizing.

        Args:
            num_tokens: unused, upscaling sees the full grid.
            grid: patches (high, wide).

        Raises:
            ValueError: no grid.
        """
        if grid is None:
            raise ValueError("EoMT.head_macs needs the patch grid: upscaling works on the full map")
        dim, pixels, total = self.encoder.backbone.embed_dim, grid[0] * grid[1], self._query_macs(grid)
        for block in self.upscale:
            total += pixels * conv_macs(block.conv1)
            pixels *= 4
            total += pixels * conv_macs(block.conv2)
        linear = linear_macs(self.mask_head) + linear_macs(self.class_head)
        return total + self.num_q * (linear + dim * pixels)

    def _query_macs(self, grid: tuple[int, int]) -> int:
        """What the queries add to the blocks that they take part in; tokens counted at the input of a block."""
        backbone, total = self.encoder.backbone, 0
        size = tuple(side * patch for side, patch in zip(grid, backbone.patch_embed.patch_size))
        lengths = {row.block: row.tokens_in for row in report(backbone, size).rows}
        for index in range(len(backbone.blocks) - self.num_blocks, len(backbone.blocks)):
            block, n = backbone.blocks[index], lengths[index]
            linear = linear_macs(block)
            pairs = (n + self.num_q) ** 2 - n * n
            total += self.num_q * linear + 2 * block.attn.num_heads * block.attn.head_dim * pairs
        return total


def _with_queries(tokens: Tokens, queries: Tensor) -> Tokens:
    """Queries behind the prefix, as further tokens that no method touches."""
    prefix, count = tokens.layout.num_prefix, queries.shape[1]

    def insert(values: Tensor | None, new: Tensor | float | bool | int) -> Tensor | None:
        if values is None:
            return None
        if not isinstance(new, Tensor):
            new = values.new_full((values.shape[0], count, *values.shape[2:]), new)
        return torch.cat([values[:, :prefix], new, values[:, prefix:]], dim=1)

    positions = tokens.positions
    if positions is not None:  # patches are counted from the end of the prefix, which is longer now
        positions = torch.where(positions >= prefix, positions + count, positions)
    return tokens._replace(
        x=insert(tokens.x, queries.to(tokens.x.dtype)),
        layout=tokens.layout._replace(num_prefix=prefix + count),
        size=insert(tokens.size, 1.0),
        valid=insert(tokens.valid, True),
        positions=insert(positions, -1),
        coords=insert(tokens.coords, 0.0),
        trace=(),
    )
