"""STViT-R in the published sizes, registered with timm."""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from .._config import config
from .checkpoint import rename_released
from .model import STViTR

# name -> options
_SIZES: dict[str, dict[str, Any]] = {
    "stvit_r_small": {},
    "stvit_r_base": {"embed_dim": 128, "num_heads": (4, 8, 16, 32)},
}
_DENSE = {"form": "dense", "output_norms": True}
_VARIANTS = {**_SIZES, **{f"{name}_dense": {**options, **_DENSE} for name, options in _SIZES.items()}}
default_cfgs = generate_default_cfgs({
    name: config(first_conv="patch_embed.proj.0", pool_size=(7, 7), fixed_input_size=not name.endswith("dense"))
    for name in _VARIANTS
})  # fmt: skip


def _create(variant: str, pretrained: bool, kwargs: dict[str, Any]) -> STViTR:
    options = {**_VARIANTS[variant], **kwargs}
    feature_cfg = {"out_indices": (0, 1, 2, 3), "feature_cls": "getter", "norm": options.get("output_norms", False)}
    return build_model_with_cfg(
        STViTR, variant, pretrained, feature_cfg=feature_cfg, pretrained_filter_fn=rename_released, **options
    )


@register_model
def stvit_r_small(pretrained: bool = False, **kwargs: Any) -> STViTR:
    """STViT-R-Swin-S for images of 224: 49.6 M parameters, 5.6 GMACs."""
    return _create("stvit_r_small", pretrained, kwargs)


@register_model
def stvit_r_base(pretrained: bool = False, **kwargs: Any) -> STViTR:
    """STViT-R-Swin-B for images of 224: 87.8 M parameters, 9.9 GMACs."""
    return _create("stvit_r_base", pretrained, kwargs)


@register_model
def stvit_r_small_dense(pretrained: bool = False, **kwargs: Any) -> STViTR:
    """STViT-R-Swin-S for images of any size, as a backbone for dense prediction."""
    return _create("stvit_r_small_dense", pretrained, kwargs)


@register_model
def stvit_r_base_dense(pretrained: bool = False, **kwargs: Any) -> STViTR:
    """STViT-R-Swin-B for images of any size, as a backbone for dense prediction."""
    return _create("stvit_r_base_dense", pretrained, kwargs)
