"""Entries of timm's table of pretrained configurations, for models whose weights are not hosted."""

from __future__ import annotations

from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD


def config(**changes: Any) -> dict[str, Any]:
    """An ImageNet-1k configuration without a place to fetch weights from.

    Args:
        changes: fields that differ.
    """
    common = {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "classifier": "head",
        "license": "apache-2.0",
    }
    return {**common, **changes}
