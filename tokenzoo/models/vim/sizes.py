"""Registered sizes of Vision Mamba. Published accuracies are of patches 16 at strides 16 and 8, images of 224.

Source: Zhu, Liao, Zhang, Wang, Liu, Wang, "Vision Mamba: Efficient Visual Representation Learning with Bidirectional
State Space Model", ICML 2024.
"""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from .._config import config
from .model import VisionMamba
from .weights import checkpoint_filter_fn

_WIDTHS = {"vim_tiny": 192, "vim_small": 384, "vim_base": 768}
_SIZES = {
    f"{name}{suffix}": {"embed_dim": width, "stride": stride}
    for name, width in _WIDTHS.items()
    for suffix, stride in (("", None), ("_patch16_224", None), ("_patch16_stride8_224", 8))
}
default_cfgs = generate_default_cfgs(
    {name: config(fixed_input_size=True, crop_pct=0.875, first_conv="patch_embed.proj") for name in _SIZES}
)


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any]) -> VisionMamba:
    feature_cfg = {"out_indices": 3, "feature_cls": "getter"}
    options = {**_SIZES[variant], **kwargs}
    return build_model_with_cfg(
        VisionMamba, variant, pretrained, feature_cfg=feature_cfg, pretrained_filter_fn=checkpoint_filter_fn, **options
    )


@register_model
def vim_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-T: 7.1 M parameters, 1.8 GMACs at 224 (1.45 as published, one scan direction)."""
    return _create("vim_tiny_patch16_224", pretrained, kwargs)


@register_model
def vim_tiny_patch16_stride8_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-T with overlapping patches: 729 tokens and a class token at 224, 6.8 GMACs."""
    return _create("vim_tiny_patch16_stride8_224", pretrained, kwargs)


@register_model
def vim_tiny(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Short for `vim_tiny_patch16_224`."""
    return _create("vim_tiny", pretrained, kwargs)


@register_model
def vim_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-S: 25.8 M parameters, 5.9 GMACs at 224 (5.08 as published, one scan direction)."""
    return _create("vim_small_patch16_224", pretrained, kwargs)


@register_model
def vim_small_patch16_stride8_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-S with overlapping patches: 729 tokens and a class token at 224, 21.9 GMACs."""
    return _create("vim_small_patch16_stride8_224", pretrained, kwargs)


@register_model
def vim_small(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Short for `vim_small_patch16_224`."""
    return _create("vim_small", pretrained, kwargs)


@register_model
def vim_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-B: 97.6 M parameters, 20.9 GMACs at 224 (18.9 as published, one scan direction)."""
    return _create("vim_base_patch16_224", pretrained, kwargs)


@register_model
def vim_base_patch16_stride8_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-B with overlapping patches: 729 tokens and a class token at 224, 77.4 GMACs."""
    return _create("vim_base_patch16_stride8_224", pretrained, kwargs)


@register_model
def vim_base(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Short for `vim_base_patch16_224`."""
    return _create("vim_base", pretrained, kwargs)
