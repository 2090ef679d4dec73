"""One way into a backbone for all dense models: tokens after the final norm, and the way back to the patch grid."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from ..adapters.inspect import describe, is_patched
from ..adapters.registry import family_of
from ..core.lift import lift
from ..ops.scan_order import from_scan


class Encoded(NamedTuple):
    """What a backbone hands to a decoder.

    Attributes:
        x: tokens after the final norm [B, N', C], prefix first.
        num_prefix: class, distillation and register tokens in front.
        grid: patches (high, wide) of the image.
        restore: carries values of these tokens [B, N', D] to all patches in raster order [B, H * W, D].
        features_of: the same for the tokens themselves, where dropped ones may come back with values of their own.
        restore_maps: the recipe wants the decoder to run on the reduced tokens and its class maps restored.
        valid: [B, N'] bool, False for padding tokens of images that keep fewer than others; None without.
    """

    x: Tensor
    num_prefix: int
    grid: tuple[int, int]
    restore: Callable[[Tensor], Tensor]
    features_of: Callable[[Tensor], Tensor]
    restore_maps: bool = False
    valid: Tensor | None = None

    def features(self) -> Tensor:
        """Patch features of the full grid in raster order [B, H * W, C]."""
        return self.features_of(self.x)


def encode(backbone: nn.Module, images: Tensor) -> Encoded:
    """Runs a backbone, patched or not, for a dense head.

    Args:
        backbone: a timm ViT-like model, or one that scans its tokens.
        images: [B, 3, H, W].
    """
    grid = tuple(backbone.patch_embed.dynamic_feat_size(images.shape[-2:]))
    prefix = backbone.num_prefix_tokens
    if not is_patched(backbone):
        x = from_scan(backbone.forward_features(images), _prefix_rows(backbone, grid))
        return Encoded(x, prefix, grid, lambda y: y[:, prefix:], lambda y: y[:, prefix:])
    recipe = backbone.tokenzoo_recipe
    prefix += recipe.protect
    tokens = backbone.forward_tokens(images, dense=True)
    trace = recipe.lift_trace(tokens.trace)

    def restore(y: Tensor) -> Tensor:
        return lift(y, trace, recipe.fill)[:, prefix:]

    def features_of(x: Tensor) -> Tensor:
        return lift(x, trace, recipe.fill, backbone.norm)[:, prefix:]

    # class maps cannot take the place of features that were dropped: then features are restored first
    stashed = recipe.fill.kind == "stash" and any(step.map.drops for step in trace)
    return Encoded(tokens.x, prefix, grid, restore, features_of, recipe.restores_maps and not stashed, tokens.valid)


def _prefix_rows(backbone: nn.Module, grid: tuple[int, int]) -> tuple[int, ...]:
    """Where prefix tokens are in the features of an unpatched model that scans; () for all that have them in front."""
    return () if family_of(backbone) is None else describe(backbone, grid).layout.scan_rows
