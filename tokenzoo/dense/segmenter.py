"""A segmentation model: a plain ViT and a decoder that works token by token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.rows import split_dim
from .features import Encoded, encode


class Segmenter(nn.Module):
    """A timm ViT with a decoder of `tokenzoo.dense.heads`; `patch_model` on it patches the encoder.

    Images of any size go in: they are padded with zeros to whole patches, and the scores are cropped back. The encoder
    has to take the padded size (dynamic_img_size=True).

    Args:
        encoder: a timm ViT-like model.
        decoder: a head, tokens [B, N, C] to class maps [B, N, K]. Where the recipe has it run on reduced tokens and
            images keep different numbers of them, it is also given `valid` [B, N].
        num_classes: K.
        classes: names of the classes.
        mean: of the channels of RGB images in 0..1, subtracted before the model.
        std: of the channels, divided by.
        window: side of the training crop, for window inference; None for whole images.
        stride: of window inference.
        pad: where zeros go that fill images up to whole patches: "right" (and bottom) or "center" (all around).

    Source: Strudel, Garcia, Laptev, Schmid, "Segmenter: Transformer for Semantic Segmentation", ICCV 2021.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        num_classes: int,
        classes: list[str] | None = None,
        mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
        std: tuple[float, float, float] = (0.5, 0.5, 0.5),
        window: int | None = None,
        stride: int | None = None,
        pad: str = "right",
    ) -> None:
        super().__init__()
        self.check_encoder(encoder)
        if pad not in ("right", "center"):
            raise ValueError(f"Segmenter: pad={pad!r}; use 'right' or 'center'")
        if classes is not None and len(classes) != num_classes:
            raise ValueError(f"Segmenter: {len(classes)} class names for num_classes={num_classes}; give one per class")
        self.encoder, self.decoder, self.num_classes = encoder, decoder, num_classes
        self.classes = None if classes is None else list(classes)
        self.mean, self.std, self.window, self.stride, self.pad = tuple(mean), tuple(std), window, stride, pad

    @staticmethod
    def check_encoder(encoder: nn.Module) -> None:
        """Refuses models that give no patch tokens of one width.

        Raises:
            ValueError: the message names the class and what it lacks.
        """
        for name in ("patch_embed", "blocks", "num_prefix_tokens", "embed_dim"):
            if not hasattr(encoder, name):
                raise ValueError(
                    f"{type(encoder).__name__} has no {name}: it is not a plain ViT that a token head can follow"
                )

    @property
    def tokenzoo_backbone(self) -> nn.Module:
        """The model that `patch_model` patches."""
        return self.encoder

    def forward(self, images: Tensor) -> Tensor:
        """Class scores [B, K, H, W] of normalised images [B, 3, H, W]."""
        padded, (top, left) = pad_to_patches(images, self.encoder.patch_embed.patch_size, self.pad)
        maps = F.interpolate(self.class_maps(padded), padded.shape[-2:], mode="bilinear", align_corners=False)
        return maps[:, :, top : top + images.shape[-2], left : left + images.shape[-1]]

    def class_maps(self, images: Tensor) -> Tensor:
        """Class scores per patch [B, K, H / P, W / P] of images in whole patches [B, 3, H, W]."""
        return self.decode(encode(self.encoder, images))

    def decode(self, encoded: Encoded) -> Tensor:
        """Class scores per patch [B, K, H / P, W / P] of what the encoder gave, see `tokenzoo.dense.encode`."""
        if encoded.restore_maps:
            prefix, masked = encoded.num_prefix, {}
            if encoded.valid is not None:
                masked["valid"] = encoded.valid[:, prefix:]
            tokens = self.decoder(encoded.x[:, prefix:], **masked)
            front = tokens.new_zeros(tokens.shape[0], prefix, tokens.shape[2])
            maps = encoded.restore(torch.cat([front, tokens], dim=1))
        else:
            maps = self.decoder(encoded.features())
        return split_dim(maps.transpose(1, 2), 2, *encoded.grid)

    def head_macs(self, num_tokens: int, grid: tuple[int, int] | None = None) -> int:
        """Multiply-adds of the decoder for one image.

        Args:
            num_tokens: patch tokens that the decoder sees.
            grid: patches (high, wide); no decoder here depends on it.
        """
        return self.decoder.macs(num_tokens)


def pad_to_patches(
    images: Tensor, patch: int | tuple[int, int], where: str = "right"
) -> tuple[Tensor, tuple[int, int]]:
    """Images filled up with zeros to whole patches.

    Args:
        images: [B, 3, H, W].
        patch: side, or (high, wide), of a patch.
        where: zeros go "right" and to the bottom, or all around ("center").

    Returns:
        The padded images, and the (row, column) at which the image starts.
    """
    high, wide = (patch, patch) if isinstance(patch, int) else patch
    below, beside = -images.shape[-2] % high, -images.shape[-1] % wide
    top, left = (below // 2, beside // 2) if where == "center" else (0, 0)
    if below or beside:
        images = F.pad(images, (left, beside - left, top, below - top))
    return images, (top, left)
