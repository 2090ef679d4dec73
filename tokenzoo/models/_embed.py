"""What a patch embedding owes timm's VisionTransformer: sizes, checks, padding, output formats."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed, to_2tuple
from timm.models import register_notrace_module
from torch import Tensor, nn


def fit_positions(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Interpolates the positions of a checkpoint where the model is for another image size; for timm's loader.

    Args:
        state_dict: weights of a model for square images.
        model: VisionTransformer that they are for.
    """
    given, own = state_dict.get("pos_embed"), model.pos_embed
    if given is None or own is None or given.shape == own.shape:
        return state_dict
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    fitted = resample_abs_pos_embed(given, model.patch_embed.grid_size, num_prefix_tokens=prefix)
    return {**state_dict, "pos_embed": fitted}


@register_notrace_module  # sizes of images decide
class MapEmbed(nn.Module):
    """Base of embeddings that turn an image into a map of tokens; a subclass gives `embed_map` and `macs`.

    Args:
        img_size: image size in pixels, one number or (high, wide).
        patch_size: pixels per token, likewise.
        flatten: hand out [B, N, C]; else the map in `output_fmt`.
        output_fmt: "NCHW" or "NHWC", not flattened; None for the default.
        strict_img_size: refuse other sizes than `img_size`.
        dynamic_img_pad: fill images up to whole tokens with zeros on the right and at the bottom.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        flatten: bool = True,
        output_fmt: str | None = None,
        strict_img_size: bool = True,
        dynamic_img_pad: bool = False,
    ):
        super().__init__()
        self.patch_size = to_2tuple(patch_size)
        self.flatten = flatten and output_fmt is None
        self.output_fmt = output_fmt or "NCHW"
        self.strict_img_size = strict_img_size
        self.dynamic_img_pad = dynamic_img_pad
        self._set_size(img_size)

    def _set_size(self, img_size: int | tuple[int, int]) -> None:
        self.img_size = to_2tuple(img_size)
        if not self.dynamic_img_pad:
            self._check_multiple(*self.img_size)
        self.grid_size = self.dynamic_feat_size(self.img_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def _check_multiple(self, high: int, wide: int) -> None:
        if high % self.patch_size[0] or wide % self.patch_size[1]:
            raise ValueError(
                f"{type(self).__name__}: an image of {(high, wide)} pixels is not a whole number of {self.patch_size} "
                "patches; resize it, or create the model with dynamic_img_pad=True and dynamic_img_size=True"
            )

    def _check_size(self, high: int, wide: int) -> None:
        if self.strict_img_size and (high, wide) != self.img_size:
            raise ValueError(
                f"{type(self).__name__}: an image of {(high, wide)} pixels does not match the model's {self.img_size}; "
                "call model.set_input_size, or create the model with dynamic_img_size=True"
            )
        if not self.dynamic_img_pad:
            self._check_multiple(high, wide)

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Takes images of another size from now on.

        Args:
            img_size: new size in pixels, None keeps it.
            patch_size: None, or the present one.

        Raises:
            ValueError: another patch size.
        """
        if patch_size is not None and to_2tuple(patch_size) != self.patch_size:
            raise ValueError(
                f"{type(self).__name__}: the patch size is {self.patch_size} by construction; it cannot become "
                f"{to_2tuple(patch_size)}, change img_size instead"
            )
        if img_size is not None:
            self._set_size(img_size)

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Pixels per token, the larger side or both."""
        return max(self.patch_size) if as_scalar else self.patch_size

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Grid of tokens (high, wide) of an image size."""
        (high, wide), (p, q) = img_size, self.patch_size
        return (-(-high // p), -(-wide // q)) if self.dynamic_img_pad else (high // p, wide // q)

    def macs(self, grid: tuple[int, int]) -> int:
        """Multiply-adds of one image with a grid of tokens (high, wide); norms are free."""
        raise NotImplementedError

    def embed_map(self, x: Tensor) -> Tensor:
        """Image [B, C, H, W], whole tokens -> map [B, h, w, D]."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Image [B, C, H, W] -> tokens [B, N, D], or a map in the output format.

        Raises:
            ValueError: an image of another size where that is fixed, or of no whole number of tokens.
        """
        high, wide = x.shape[2], x.shape[3]
        if not torch.jit.is_scripting():  # TorchScript cannot compile the messages
            self._check_size(high, wide)
        if self.dynamic_img_pad:
            x = F.pad(x, [0, -wide % self.patch_size[1], 0, -high % self.patch_size[0]])
        x = self.embed_map(x)
        if self.flatten:
            return x.flatten(1, 2)
        return x if self.output_fmt == "NHWC" else x.permute(0, 3, 1, 2)
