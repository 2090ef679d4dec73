"""STViT-R (Chang et al., CVPR 2023)."""

from .model import STViTR

__all__ = ["STViTR"]
